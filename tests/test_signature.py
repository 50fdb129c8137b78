"""Networks that take and give several tensors, of other dtypes and in other structures."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import operator, random_like, singular_values

import tfjacreg
from tfjacreg import (
    JacobianOperator,
    check_network,
    frobenius_norm,
    signature,
    spectral_norm,
)
from tfjacreg.jacobian import FORWARD_MODES

# Keras says so of a dict whose keys are not the names of its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")

B = 4
RNG = np.random.default_rng(3)
A = RNG.normal(size=(B, 4)).astype("float32")
C = RNG.normal(size=(B, 3)).astype("float32")
CODES = np.array([[1], [4], [0], [1]], "int32")


def two_by_two(inputs, outputs):
    """Two inputs, `a` and `c`, and two outputs that depend on both, and on each otherwise."""
    a, c = keras.Input((4,), name="a"), keras.Input((3,), name="c")
    hidden = layers.Dense(6, "tanh")(layers.Concatenate()([layers.Dense(5, "tanh")(a), c]))
    logits = layers.Dense(3, name="logits")(hidden)
    depth = layers.Dense(2, "softplus", name="depth")(layers.Concatenate()([hidden, c]))
    return keras.Model(inputs(a, c), outputs(logits, depth))


def with_codes():
    """Codes as a side input: integers."""
    a, code = keras.Input((4,), name="a"), keras.Input((1,), dtype="int32", name="code")
    looked_up = layers.Flatten()(layers.Embedding(5, 3)(code))
    hidden = layers.Dense(6, "tanh")(layers.Concatenate()([a, looked_up]))
    return keras.Model([a, code], layers.Dense(3, name="logits")(hidden))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Takes and gives dicts, and declares neither."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.out = layers.Dense(5, "tanh"), layers.Dense(3)

    def call(self, x):
        hidden = self.hidden(x["a"]) * keras.ops.mean(x["c"], axis=-1, keepdims=True)
        return {"logits": self.out(hidden), "hidden": hidden}


def nested():
    a, c = keras.Input((4,), name="a"), keras.Input((3,), name="c")
    code = keras.Input((1,), dtype="int32", name="code")
    hidden = layers.Dense(5, "tanh")(layers.Concatenate()([a, c, keras.ops.cast(code, "float32")]))
    outputs = {"heads": [layers.Dense(2, name="first")(hidden), layers.Dense(3)(hidden)]}
    return keras.Model({"pair": [a, c], "code": code}, outputs)


# Each: the network, what it takes, and by which names the input and the output go, with their
# positions among the flattened tensors.
CASES = {
    "list": (
        lambda: two_by_two(lambda a, c: [a, c], lambda y, d: [y, d]),
        [A, C],
        [((0, 0), (0, 0)), (("c", 1), ("depth", 1)), ((1, 1), ("logits", 0))],
    ),
    "dict": (
        lambda: two_by_two(lambda a, c: {"a": a, "c": c}, lambda y, d: {"logits": y, "depth": d}),
        {"c": C, "a": A},
        [(("a", 0), ("logits", 1)), (("c", 1), ("depth", 0)), ((1, 1), (1, 1))],
    ),
    # Sorted by key the inputs go in another order than by name.
    "keys_that_are_no_names": (
        lambda: two_by_two(lambda a, c: {"z": a, "b": c}, lambda y, d: {"one": y, "another": d}),
        {"z": A, "b": C},
        [(("z", 1), ("one", 1)), (("c", 0), ("another", 0)), (("a", 1), (0, 0))],
    ),
    "list_fed_with_names": (
        lambda: two_by_two(lambda a, c: [c, a], lambda y, d: [y, d]),
        {"a": A, "c": C},
        [(("a", 0), ("logits", 0)), (("c", 1), ("depth", 1))],
    ),
    "more_keys_than_inputs": (
        lambda: two_by_two(lambda a, c: [a, c], lambda y, d: [y, d]),
        {"a": A, "b": np.ones((B, 2), "float32"), "c": C},
        [(("c", 2), ("logits", 0))],
    ),
    "codes": (with_codes, [A, CODES], [((None, 0), (None, 0)), (("a", 0), ("logits", 0))]),
    "nested": (
        nested,
        {"pair": [A, C], "code": CODES},
        [(("pair.1", 2), ("heads.0", 0)), (("a", 1), ("heads.1", 1)), ((1, 1), (0, 0))],
    ),
    "subclassed": (
        Subclassed,
        {"a": A, "c": C},
        [(("a", 0), ("hidden", 0)), (("c", 1), ("logits", 1))],
    ),
}
NAMED = [(case, names) for case, (_, _, several) in CASES.items() for names in several]


def made(case):
    keras.utils.set_random_seed(2)
    make, x, _ = CASES[case]
    network = make()
    network(x)
    for weight in network.weights:
        if weight.name == "bias":
            weight.assign(np.random.default_rng(1).normal(size=weight.shape) * 0.1)
    return network, x


def dense(network, x, source, target, training=False):
    """`[B, n_out, n_in]` of one output in one input, a row for each output, without tfjacreg."""
    leaves = [tf.constant(leaf) for leaf in keras.tree.flatten(x)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(leaves[source])
        outputs = network(keras.tree.pack_sequence_as(x, leaves), training=training)
        y = keras.tree.flatten(outputs)[target]
        rows = tf.unstack(tf.reshape(y, (B, -1)), axis=1)
    return np.stack([tape.gradient(row, leaves[source]).numpy() for row in rows], axis=1)


@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize(("case", "names"), NAMED, ids=str)
def test_products_are_those_of_the_dense_jacobian(case, names, how, forward_mode):
    (source, number), (target, output_number) = names
    network, x = made(case)
    expected = dense(network, x, number, output_number)
    v = random_like(tf.constant(keras.tree.flatten(x)[number]))
    u = random_like(tf.zeros((B, expected.shape[1])), 1)

    def products(leaves):
        op = operator(
            network,
            keras.tree.pack_sequence_as(x, leaves),
            forward_mode,
            v,
            input=source,
            output=target,
        )
        return op.matvec(v), op.matvec(tf.identity(v)), op.rmatvec(u)

    leaves = [tf.constant(leaf) for leaf in keras.tree.flatten(x)]
    if how != "eager":
        products = tf.function(products, jit_compile=how == "xla")
    *forward, backward = products(leaves)
    for product in forward:
        np.testing.assert_allclose(product, np.einsum("boi,bi->bo", expected, v), atol=1e-5)
    np.testing.assert_allclose(backward, np.einsum("boi,bo->bi", expected, u), atol=1e-5)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize(("case", "names"), NAMED, ids=str)
def test_norms_are_those_of_the_dense_jacobian(case, names):
    (source, number), (target, output_number) = names
    network, x = made(case)
    values = singular_values(dense(network, x, number, output_number))
    of = {"input": source, "output": target}
    t = spectral_norm(network, x, method="exact", **of)
    np.testing.assert_allclose(t.sigma, values[:, 0], rtol=1e-4)
    assert t.v.shape == keras.tree.flatten(x)[number].shape
    frobenius = frobenius_norm(network, x, **of)
    np.testing.assert_allclose(frobenius, np.sqrt((values**2).sum(1)), rtol=1e-4)
    for forward_mode in FORWARD_MODES:
        check_network(network, x, forward_mode=forward_mode, **of)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (
            {"output": 0},
            r"several inputs .* `input=`.* 0 or .*'a', 1 or .*'c'\. Received: input=None",
        ),
        ({"input": 0}, r"several outputs .* `output=`.* 0 or '0' or 'logits', 1 or '1' or 'depth'"),
        ({"input": "b", "output": 0}, r"one floating input .*0 or .*'a'.*Received: input='b'"),
        ({"input": 2, "output": 0}, r"one floating input .*1 or .*'c'.*Received: input=2"),
        ({"input": True, "output": 0}, r"Received: input=True"),
        ({"input": 0, "output": "z"}, r"one floating output .*'logits'.*Received: output='z'"),
    ],
)
def test_what_could_be_meant_is_listed(of, expected):
    network, x = made("list")
    for measure in (spectral_norm, frobenius_norm, check_network, JacobianOperator):
        with pytest.raises((TypeError, ValueError), match=expected):
            measure(network, x, **of)


def test_a_key_goes_before_the_name_of_another_input():
    """The key of one is the name of the other: Keras takes the key."""
    network, x = two_by_two(lambda a, c: {"c": a, "a": c}, lambda y, d: y), {"c": A, "a": C}
    op = JacobianOperator(network, x, input="c")
    np.testing.assert_array_equal(op.x, A)


def test_integers_are_never_differentiated():
    network, x = made("codes")
    with pytest.raises(ValueError, match=r"`input` must be .*0 or .*'a'. Received: input='code'"):
        spectral_norm(network, x, input="code")
    tokens = keras.Sequential(
        [keras.Input((3,), dtype="int32"), layers.Embedding(5, 2), layers.Flatten()]
    )
    # Also as floats: Keras casts them to the integers that the Input declares.
    for x in (np.ones((B, 3), "int32"), np.ones((B, 3), "float32")):
        for measure in (spectral_norm, frobenius_norm, check_network, JacobianOperator):
            with pytest.raises(TypeError, match="needs a floating input.*int32"):
                measure(tokens, x)


@pytest.mark.parametrize("measure", [spectral_norm, frobenius_norm, check_network])
def test_tokens_of_a_network_that_declares_no_input(measure):
    network = keras.Sequential([layers.Embedding(5, 2), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(ValueError, match="differentiable operation"):
        measure(network, np.ones((B, 3), "int32"))


def test_what_is_not_there_is_left_out():
    """An optional `Input` takes None."""

    class Maybe(layers.Layer):
        def call(self, x, extra=None):
            return x if extra is None else x * extra

        def compute_output_spec(self, x, extra=None):
            return keras.KerasTensor(x.shape, x.dtype)

    x, extra = keras.Input((4,), name="x"), keras.Input((4,), name="extra", optional=True)
    network = keras.Model([x, extra], layers.Dense(2)(Maybe()(x, extra)))
    kernel = network.weights[0].numpy()
    sigma = spectral_norm(network, [A, None], method="exact").sigma
    np.testing.assert_allclose(sigma, [np.linalg.norm(kernel, 2)] * B, rtol=1e-5)
    with pytest.raises(ValueError, match="several inputs"):
        spectral_norm(network, [A, A])


class TestCasts:
    """What Keras casts is cast before anything is differentiated."""

    PIXELS = np.random.default_rng(0).integers(256, size=(B, 4, 4, 1)).astype("uint8")

    @staticmethod
    def layers():
        return [layers.Rescaling(1 / 255.0), layers.Flatten(), layers.Dense(3, "tanh")]

    def functional(self):
        inputs = keras.Input((4, 4, 1))
        outputs = inputs
        for layer in self.layers():
            outputs = layer(outputs)
        return keras.Model(inputs, outputs)

    def subclassed(self):
        class Network(keras.Model):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def call(self, x):
                for layer in self.inner:
                    x = layer(x)
                return x

        return Network(self.layers())

    def made(self, kind):
        keras.utils.set_random_seed(0)
        if kind == "sequential":
            return keras.Sequential([keras.Input((4, 4, 1)), *self.layers()])
        if kind == "sequential without Input":
            return keras.Sequential(self.layers())
        return getattr(self, kind)()

    KINDS = ("functional", "sequential", "sequential without Input", "subclassed")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", ["uint8", "int64", "float64", "float16"])
    def test_sigma_is_that_of_floats(self, kind, dtype):
        network, x = self.made(kind), self.PIXELS.astype(dtype)
        floats = tf.constant(self.PIXELS.astype("float32"))
        expected = singular_values(dense(network, floats, 0, 0).reshape(B, 3, -1))
        t = spectral_norm(network, x, method="exact")
        np.testing.assert_allclose(t.sigma, expected[:, 0], rtol=1e-4)
        check_network(network, x)

    @pytest.mark.filterwarnings("ignore:The inputs of network:tfjacreg.PenaltyWarning")
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("feed", ["arrays", "tf.data"])
    def test_fit_trains_as_with_floats(self, kind, feed):
        def fit(x):
            model = tfjacreg.RegularizedModel(
                self.made(kind), tfjacreg.regularizers.SpectralNorm(0.1, "exact", seed=0)
            )
            model.compile("sgd", "mse")
            y = np.zeros((B, 3), "float32")
            if feed == "tf.data":
                data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
                history = model.fit(data, epochs=2, verbose=0).history
            else:
                history = model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0).history
            return history, model.network.get_weights()

        expected, expected_weights = fit(self.PIXELS.astype("float32"))
        got, weights = fit(self.PIXELS)
        for key, values in expected.items():
            np.testing.assert_allclose(got[key], values, rtol=1e-5)
        for a, b in zip(expected_weights, weights, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6)
        assert expected["penalty"][0] > 0

    # Keras tells whoever gives it another structure than the network declares.
    @pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning")
    @pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"pixels": x}])
    def test_one_element_in_a_structure(self, wrap):
        inputs = keras.Input((4,), name="pixels")
        outputs = layers.Dense(3)(inputs)
        for declared in (inputs, [inputs], {"pixels": inputs}):
            network = keras.Model(declared, outputs)
            if isinstance(declared, dict) and isinstance(wrap(0), list):
                continue
            kernel = network.weights[0].numpy()
            sigma = spectral_norm(network, wrap(A), method="exact").sigma
            np.testing.assert_allclose(sigma, [np.linalg.norm(kernel, 2)] * B, rtol=1e-5)
            model = tfjacreg.RegularizedModel(network, "spectral")
            model.compile("sgd", "mse")
            history = model.fit(wrap(A), np.zeros((B, 3)), verbose=0).history
            assert history["penalty"][0] > 0

    @pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
    def test_axes_that_only_the_input_knows(self):
        """A generator tells no shapes."""
        network = self.functional()

        def batches():
            yield self.PIXELS.astype("float32"), np.zeros((B, 3), "float32")

        specs = tf.TensorSpec((None,) * 4, tf.float32), tf.TensorSpec((None, 3), tf.float32)
        data = tf.data.Dataset.from_generator(batches, output_signature=specs)
        penalty = tfjacreg.regularizers.SpectralNorm(0.0, "exact")
        model = tfjacreg.RegularizedModel(network, penalty)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        sigma = spectral_norm(network, self.PIXELS, method="exact").sigma
        got = model.fit(data, steps_per_epoch=1, verbose=0).history["penalty"]
        np.testing.assert_allclose(got, [np.mean(sigma)], rtol=1e-5)

    def test_the_policy_is_that_of_the_network(self):
        network = self.functional()
        keras.config.set_dtype_policy("mixed_float16")
        model = tfjacreg.RegularizedModel(network, "spectral")
        assert model.dtype_policy.name == "float32"
        x = np.full((2, 4, 4, 1), 1e5, "float32")
        np.testing.assert_array_equal(model.predict(x, verbose=0), network.predict(x, verbose=0))


def test_the_example_of_a_check_has_the_structure_of_the_data():
    for case, (_, x, _) in CASES.items():
        network, _ = made(case)
        specs = keras.tree.map_structure(lambda t: tf.TensorSpec((None, *t.shape[1:]), t.dtype), x)
        example = signature.example(network, specs)
        keras.tree.assert_same_structure(example, x)
        for got, given in zip(keras.tree.flatten(example), keras.tree.flatten(x), strict=True):
            assert got.shape == (2, *given.shape[1:])
            assert got.dtype == given.dtype
