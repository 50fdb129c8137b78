"""Every argument of every public function, given what it cannot be: a clear error each time.

A function or an argument that is added without an entry here fails the test.
"""

import dataclasses
import functools
import inspect
import re
import signal
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg import attacks, datasets, networks, regularizers, robustness

NAN, INF = float("nan"), float("inf")
HUGE = 10**400  # Beyond every float.
FREE = object()  # Stands for an argument that takes whatever it gets.

NOT_NUMBERS = [None, "0.1", b"1", 1j, [0.1, 0.2], np.array([0.1, 0.2]), {}, object(), True]
NOT_POSITIVE = [*NOT_NUMBERS, 0, 0.0, -1, NAN, INF, -INF, HUGE, 1e300, 1e-300, np.float64("nan")]
NOT_FACTORS = [*NOT_NUMBERS, -1, -0.1, NAN, INF, HUGE, 1e300, np.float32("inf")]
NOT_COUNTS = [None, "2", 1j, [1], {}, True, 0, -1, 2.5, 1.0, NAN, INF, 2**31, HUGE, np.float32(2)]
# Of what is written into a graph once for each.
NOT_UNROLLED = [*NOT_COUNTS, 1001, 10**9]
NOT_SEEDS = ["0", 1j, [1], {}, True, -1, 2.5, NAN, 2**63, HUGE, np.float32(1)]
NOT_FRACTIONS = [*NOT_NUMBERS, 0, -0.5, 1.5, NAN, INF, HUGE]
NOT_BOOLEANS = [None, "no", "True", 0, 1, 1.0, [True], np.array([True, False])]
NOT_NETWORKS = [None, "lenet", 3, np.eye(3), lambda x: x, keras.layers.Dense, [], tf.Module()]
NOT_CHOICES = [None, "", "nothing", 3, ["power"], b"power", object()]
NOT_NAMES = ["nothing", 7, -1, 1.5, [0], {}, b"x", True, np.array([0, 1])]
# Where the network's own are not known yet.
NO_NAMES = [1.5, [0], {}, b"x", True, object(), np.array([0, 1])]
NOT_PATHS = [3, 1.5, [], {}, object(), "", "a\0b"]
NOT_FUNCTIONS = ["print", 3, [], {}]
# What no tensor is made of, or none that a Jacobian could be taken in.
NOT_TENSORS = [
    *(None, "x", b"x", object(), [], {}, [[1.0, 2.0], [3.0]], [["a"]], lambda: 0),
    *(np.zeros((0, 6), "float32"), np.float32(1), np.zeros((2, 6), complex)),
    *(np.array([{}]), tf.ragged.constant([[1.0], [1.0, 2.0]]), tf.sparse.eye(6)),
]
NOT_IMAGES = [
    *(None, "x", 0.5, [], {}, [[0.5, 0.5], [0.5]], [["a"]], object(), np.full((8, 6), 1.5)),
    *(np.full((8, 6), -0.1), np.full((8, 6), NAN), np.full((8, 6), INF), np.zeros((8, 6), "uint8")),
    *(np.zeros((8, 6), bool), np.zeros((8, 6), complex), np.zeros((0, 6)), np.zeros((8, 5))),
    *(np.zeros((8, 6, 1)), np.zeros(6), np.array([{}])),
]
NOT_LABELS = [
    *(None, "y", 0, [], {}, [[0], [0, 1]], ["a"] * 8, object(), np.zeros(8), np.zeros(8, bool)),
    *(np.zeros(8, complex), np.zeros(7, int), np.eye(8, 3, dtype=int), np.full(8, 3), [-1] * 8),
    *(np.full(8, 2**32), np.full(8, 2**63, "uint64"), np.full(8, NAN), [HUGE] * 8),
]


@functools.cache
def small():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)])


@functools.cache
def image_classifier():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4, 3, 1)), layers.Flatten(), layers.Dense(3)])


@functools.cache
def two_outputs():
    x = keras.Input((6,))
    return keras.Model(x, [layers.Dense(3)(x), layers.Dense(2)(x)])


@functools.cache
def jacobian():
    return tfjacreg.JacobianOperator(small(), X)


X = np.random.default_rng(0).uniform(size=(8, 6)).astype("float32")
Y = np.arange(8) % 3
IMAGES = np.random.default_rng(0).uniform(size=(8, 4, 3, 1)).astype("float32")
NOT_CLASSIFIERS = [*NOT_NETWORKS, keras.layers.Dense(3), two_outputs]

MEASURED = {
    "network": NOT_NETWORKS,
    "x": NOT_TENSORS,
    "input": NOT_NAMES,
    "output": NOT_NAMES,
}
JUDGED = {
    "classifier": NOT_CLASSIFIERS,
    "x": NOT_IMAGES,
    "y": NOT_LABELS,
    "seed": [None, "0", 1j, [1], {}, True, -1, 2.5, NAN],
    "batch_size": NOT_COUNTS,
    "progress": NOT_FUNCTIONS,
}
STEPS = [*NOT_COUNTS[:2], "ab", 0, -1, 2.5, NAN, True, 2**31, [], [0, 1], [2, 1], [1, 1], [1, "a"]]
PENALTY = {"factor": NOT_FACTORS, "seed": NOT_SEEDS, "fraction": NOT_FRACTIONS}
SHAPES = [None, 28, "28x28", (28, 28), (28, 28, 0), (28, 28, -1), (28.0, 28, 1), (True, 28, 1)]
SHAPES += [(2, 2, 1), (2**16, 2**16, 1), (NAN, 28, 1), (HUGE, 28, 1), {}, ("a", "b", "c")]
SIZED = {"input_shape": SHAPES, "num_classes": NOT_COUNTS}
WIDTHS = [*NOT_POSITIVE, 1000.0]

# For every function: arguments that are right, and for each argument values that are not.
TABLE = {
    "JacobianOperator": (
        dict(network=small, x=X),
        MEASURED | {"training": NOT_BOOLEANS, "tangent": [*NOT_TENSORS[1:], X[:, :5], X[:3]]},
    ),
    "JacobianOperator.matvec": (dict(self=jacobian, v=X), {"v": [*NOT_TENSORS, X[:, :5], X[:3]]}),
    **{
        f"JacobianOperator.{name}": (
            dict(self=jacobian, u=X[:, :3]),
            {"u": [*NOT_TENSORS, X, X[:3, :3]]},
        )
        for name in ("rmatvec", "rmatvec_to_transpose")
    },
    "RegularizedModel": (
        dict(network=small),
        {
            "network": NOT_NETWORKS,
            "regularizer": ["", "l1", 3, 0.1, [], {}, {"class_name": "Dense", "config": {}}],
            "input": NO_NAMES,
            "output": NO_NAMES,
            "kwargs": FREE,  # Keras' own.
        },
    ),
    "check_network": (
        dict(network=small, x=X),
        MEASURED
        | {"training": NOT_BOOLEANS, "jit_compile": NOT_BOOLEANS, "forward_mode": NOT_CHOICES}
        | {"x": [*NOT_TENSORS, X[:1]]}
        | {"output": ["nothing", 1.5]},  # Found out late: a check takes its time.
    ),
    "hold_constant": ({}, {}),
    "norms.spectral_norm": (
        dict(network=small, x=X),
        MEASURED | {"method": NOT_CHOICES, "iterations": NOT_UNROLLED, "seed": NOT_SEEDS},
    ),
    "norms.frobenius_norm": (
        dict(network=small, x=X, num_projections=1),
        MEASURED | {"num_projections": NOT_UNROLLED[1:], "seed": NOT_SEEDS},
    ),
    "norms.spectral_bound": (
        dict(network=small),
        {"network": [*NOT_NETWORKS, two_outputs], "iterations": NOT_UNROLLED},
    ),
    "callbacks.SpectralNormMonitor": (
        dict(x=X),
        {
            "x": NOT_TENSORS,
            "method": NOT_CHOICES,
            "iterations": NOT_UNROLLED,
            "every": NOT_COUNTS,
            "input": NO_NAMES,
            "output": NO_NAMES,
        },
    ),
    "attacks.pgd": (
        dict(classifier=small, x=X, y=Y, iterations=1),
        JUDGED
        | {"eps": NOT_POSITIVE, "step_size": NOT_POSITIVE, "iterations": STEPS}
        | {"loss": NOT_CHOICES, "random_start": NOT_BOOLEANS},
    ),
    "attacks.tpgd": (
        dict(classifier=small, x=X, y=Y, iterations=1),
        JUDGED | {"eps": NOT_POSITIVE, "step_size": NOT_POSITIVE, "iterations": STEPS},
    ),
    "attacks.square": (
        dict(classifier=image_classifier, x=IMAGES, y=Y, iterations=1),
        JUDGED | {"eps": NOT_POSITIVE, "iterations": STEPS},
    ),
    "robustness.noise_accuracy": (
        dict(classifier=small, x=X, y=Y, variances=[0.1]),
        JUDGED
        | {"draws": NOT_COUNTS}
        | {
            "variances": [
                *(None, 0.1, "0.1", "abc", [], [[0.1]], [-0.1], [NAN], [INF], [1e300], [HUGE]),
                *([True], ["0.1"], [0.1j], [None], [0.1, [0.2]], {}, object()),
            ]
        },
    ),
    "robustness.boundary_distance": (
        dict(classifier=small, x=X, y=Y, samples=2),
        JUDGED
        | {"samples": NOT_COUNTS, "spheres": NOT_COUNTS}
        | {"max_radius": NOT_POSITIVE[1:], "resolution": [*NOT_POSITIVE, 1e-20]},
    ),
    "robustness.minimal_distance": (
        dict(classifier=small, x=X, y=Y, starts=1, iterations=1),
        JUDGED | {"starts": NOT_COUNTS, "iterations": NOT_COUNTS},
    ),
    "datasets.load": (
        dict(name="digits"),
        {
            "name": [None, "", "mnist", 3, ["digits"], b"digits", {}],
            "data_dir": NOT_PATHS,
            "seed": [None, *NOT_SEEDS],
        },
    ),
    "datasets.prepare": (
        dict(name="kmnist", source_dir="nowhere"),
        {
            "name": [None, "", "mnist", "digits", 3, ["kmnist"], b"kmnist", {}],
            "source_dir": [None, *NOT_PATHS],
            "data_dir": NOT_PATHS,
        },
    ),
    "networks.lenet": ({}, SIZED | {"initialization": NOT_CHOICES}),
    "networks.vgg16": ({}, SIZED | {"width": WIDTHS}),
    "networks.resnet20": ({}, SIZED | {"width": WIDTHS}),
    "networks.get": (
        dict(name="lenet", input_shape=(28, 28, 1), num_classes=10),
        SIZED
        | {"name": [None, "", "alexnet", 3, ["lenet"], b"lenet", {}]}
        | {
            "options": [
                *(dict(width=2), dict(depth=3), dict(name="vgg16", width=-1)),
                *(dict(initialization="torch"), dict(name="resnet20", initialization="pytorch")),
            ]
        },
    ),
    "regularizers.Regularizer": (dict(factor=1), {"factor": NOT_FACTORS}),
    "regularizers.WeightRegularizer": (dict(factor=1), {"factor": NOT_FACTORS}),
    "regularizers.JacobianRegularizer": (dict(factor=1), PENALTY),
    "regularizers.SpectralNorm": (
        dict(factor=1),
        PENALTY
        | {"method": NOT_CHOICES, "iterations": NOT_UNROLLED, "squared": NOT_BOOLEANS}
        | {"forward_mode": NOT_CHOICES, "threshold": NOT_FACTORS},
    ),
    "regularizers.FrobeniusNorm": (dict(factor=1), PENALTY | {"num_projections": NOT_UNROLLED}),
    "regularizers.SpectralBound": (
        dict(factor=1),
        {"factor": NOT_FACTORS, "iterations": NOT_UNROLLED, "seed": NOT_SEEDS},
    ),
    "regularizers.WeightDecay": (dict(factor=1), {"factor": NOT_FACTORS}),
    "regularizers.get": (
        dict(identifier="spectral"),
        {
            "identifier": [
                *("", "l1", b"spectral", 3, 0.1, [], {}, object(), keras.regularizers.L2(0.1)),
                *({"class_name": "Dense"}, {"class_name": "SpectralNorm"}, {"class_name": 3}),
                *({"class_name": "SpectralNorm", "config": c} for c in (None, 3, {}, {"f": 1})),
                {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}},
            ]
        },
    ),
}
# By which word an argument is known in the messages, where that is not its name.
CALLED = {
    ("regularizers.get", "identifier"): "regularizer|class_name|config|factor",
    ("RegularizedModel", "regularizer"): "regularizer|class_name|config",
    ("networks.get", "options"): "width|depth|initialization",
    ("datasets.prepare", "name"): "Data sets",
    ("norms.spectral_bound", "network"): "network|norm",
}
# What functions return.
RECORDS = {"SingularTriplet", "attacks.AttackResult", "datasets.Split", "datasets.Dataset"}
# What `RegularizedModel`, Keras or a penalty calls: a penalty of one's own overrides them.
HOOKS = {
    *("JacobianOperator.subset", "JacobianOperator.traced", "JacobianOperator.once"),
    *("JacobianOperator.moved", "JacobianOperator.run_again"),
    *("RegularizedModel.factor_changes", "regularizers.Regularizer.followed_by"),
    *("regularizers.Regularizer.initial_state", "regularizers.Regularizer.from_config"),
    *(
        f"regularizers.JacobianRegularizer.{name}"
        for name in ("initial_state", "per_example", "tangent", "tangent_of_the_pass")
    ),
    *("regularizers.SpectralNorm.per_example", "regularizers.SpectralNorm.tangent"),
    *("regularizers.FrobeniusNorm.per_example", "regularizers.SpectralBound.initial_state"),
}


def public():
    """Every public function, and every class by its constructor and its methods, by name."""
    found = {}
    for name in tfjacreg.__all__:
        member = getattr(tfjacreg, name)
        if isinstance(member, types.ModuleType):
            for inner, value in vars(member).items():
                own = getattr(value, "__module__", None) == member.__name__
                if own and callable(value) and not inner.startswith("_"):
                    found[f"{name}.{inner}"] = value
        elif not (inspect.isclass(member) and issubclass(member, Warning)):
            found[name] = member
    found = {f"norms.{name}" if f"norms.{name}" in found else name: v for name, v in found.items()}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            for inner, method in vars(value).items():
                method = getattr(method, "__func__", method)
                inherited = any(
                    hasattr(base, inner) and not base.__module__.startswith("tfjacreg")
                    for base in value.__mro__[1:]
                )
                if inspect.isfunction(method) and not inner.startswith("_") and not inherited:
                    found[f"{name}.{inner}"] = method
    return found


PUBLIC = public()


def parameters(function):
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls")]


def test_every_argument_of_every_public_function_has_an_entry():
    assert len(PUBLIC) > 30
    for name, function in PUBLIC.items():
        if name.rpartition(".")[2] in {r.rpartition(".")[2] for r in RECORDS}:
            assert issubclass(function, tuple) or dataclasses.is_dataclass(function), name
        elif name.rpartition(".")[0] in RECORDS or name in HOOKS or not parameters(function):
            continue
        else:
            assert name in TABLE, f"{name} has no entry in the table"
            assert set(TABLE[name][1]) == set(parameters(function)), name
    assert set(TABLE) <= set(PUBLIC) and set(PUBLIC) >= HOOKS


CASES = [
    (name, argument, number)
    for name, (_, bad) in TABLE.items()
    for argument, values in bad.items()
    if values is not FREE
    for number in range(len(values))
]


def call(name, change):
    arguments = {k: v() if v in FACTORIES else v for k, v in (TABLE[name][0] | change).items()}
    return PUBLIC[name](**arguments)


class _Factories:
    """Membership that asks no array whether it is equal to anything."""

    def __contains__(self, value):
        return any(value is f for f in (small, image_classifier, two_outputs, jacobian))


FACTORIES = _Factories()


@pytest.fixture(autouse=True)
def no_call_without_an_end():
    def end(*_):
        raise AssertionError("the call has no end")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)


def test_there_are_many_cases():
    print(f"{len(CASES)} calls with a bad argument of {len(TABLE)} functions")
    assert len(CASES) > 900


@pytest.mark.parametrize("name", [name for name in TABLE if name != "datasets.prepare"])
def test_the_good_arguments_are_good(name):
    call(name, {})


@pytest.mark.parametrize("name", TABLE)
def test_bad_arguments_are_refused_by_name(name, tmp_path, monkeypatch):
    """With ValueError or TypeError: which argument, and what was received."""
    monkeypatch.chdir(tmp_path)
    faults = []
    for _, argument, number in (case for case in CASES if case[0] == name):
        value = TABLE[name][1][argument][number]
        change = value if argument in ("options", "kwargs") else {argument: value}
        known_as = CALLED.get((name, argument), argument)
        told = f"{argument}={value!r:.60}: "
        try:
            call(name, change)
            faults.append(told + "taken")
        except (ValueError, TypeError) as error:
            text = str(error)
            if not re.search(rf"\b({known_as})\b", text) or "Received" not in text:
                faults.append(told + f"{type(error).__name__} {text[:200]}")
        except Exception as error:
            faults.append(told + f"{type(error).__name__} {str(error)[:200]}")
    assert not faults, "\n" + "\n".join(faults)
    assert not list(tmp_path.iterdir())


NUMBERS = [
    (name, argument, kind, value)
    for name, (_, bad) in TABLE.items()
    for argument, values in bad.items()
    for known, kind, value in (
        (NOT_COUNTS, np.int64, 1),
        (NOT_SEEDS, np.uint8, 3),
        (NOT_FACTORS, np.float32, 0.5),
        (NOT_FACTORS, np.int32, 1),
        (NOT_FRACTIONS, np.float64, 1.0),
        (NOT_POSITIVE, np.float32, 0.5),
        (NOT_BOOLEANS, np.bool_, True),
    )
    if values is known
]


@pytest.mark.parametrize(
    ("name", "argument", "kind", "value"),
    NUMBERS,
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_numbers_of_numpy_are_numbers(name, argument, kind, value):
    call(name, {argument: kind(value)})


def test_a_function_without_an_entry_is_seen(monkeypatch):
    def careless(x, n):
        return x, n

    careless.__module__ = attacks.__name__
    monkeypatch.setattr(attacks, "careless", careless, raising=False)
    assert "attacks.careless" in public()
    for module in (datasets, networks, regularizers, robustness):
        assert any(name.startswith(module.__name__.split(".")[1]) for name in TABLE)
