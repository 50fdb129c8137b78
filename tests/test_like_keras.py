"""A RegularizedModel beside the plain functional model that it wraps, attribute by attribute."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfjacreg import RegularizedModel, regularizers

RNG = np.random.default_rng(0)
X = {"code": RNG.integers(0, 3, 12).astype("int32"), "img": RNG.normal(size=(12, 6))}
X["img"] = X["img"].astype("float32")
Y = RNG.integers(0, 3, 12)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def network():
    keras.utils.set_random_seed(1)
    image, code = keras.Input((6,), name="img"), keras.Input((), dtype="int32", name="code")
    hidden = layers.Concatenate()([layers.Dense(4, "tanh")(image), layers.Embedding(3, 2)(code)])
    logits = layers.Dense(3, name="logits")(hidden)
    return keras.Model({"code": code, "img": image}, logits, name="both")


def compiled(model, **options):
    model.compile(keras.optimizers.SGD(0.1), LOSS, **options)
    return model


def wrapped(penalty="spectral"):
    return RegularizedModel(network(), penalty, input="img")


SAME = "same"
# Every public attribute that is no method: that of the network itself, or another one, because ...
ATTRIBUTES = {
    **dict.fromkeys(["input", "inputs", "input_shape", "output", "outputs", "output_shape"], SAME),
    **dict.fromkeys(["operations", "output_names", "trainable_variables", "losses"], SAME),
    **dict.fromkeys(["trainable_weights", "trainable", "built", "compiled", "dtype"], SAME),
    **dict.fromkeys(["dtype_policy", "compute_dtype", "input_dtype", "variable_dtype"], SAME),
    **dict.fromkeys(["dtype_policy", "quantization_mode", "supports_masking"], SAME),
    **dict.fromkeys(["jit_compile", "run_eagerly", "steps_per_execution"], SAME),
    **dict.fromkeys(["distribute_strategy", "unrolled_steps_per_execution"], SAME),
    **dict.fromkeys(["supports_jit", "activity_regularizer"], SAME),
    **dict.fromkeys(["train_function", "test_function", "predict_function"], SAME),
    "name": "a model around another has a name of its own",
    "path": "likewise",
    "layers": "it has one layer, the network, whose own are model.network.layers",
    "metrics": "it has that of the penalty besides",
    "metrics_names": "likewise",
    "metrics_variables": "likewise",
    "variables": "it has those of the penalty besides",
    "weights": "likewise",
    "non_trainable_variables": "likewise",
    "non_trainable_weights": "likewise",
    "autocast": "the network casts its own inputs",
    "input_spec": "the network looks at its own inputs",
    "call_signature_parameters": "its `call` takes no mask",
    "network": "the network",
    "regularizer": "the penalty",
}
# Objects of Keras' own that are new at each look, or that raise an error.
NOT_COMPARED = {"compiled_metrics", "distribute_reduction_method"}


def looked_at(model, name):
    try:
        return getattr(model, name)
    except AttributeError:
        return AttributeError


def public(model):
    """What is no method: of the class a property, of the instance any value."""
    names = {name for name in dir(model) if not name.startswith("_")}
    return {name for name in names if not callable(getattr(type(model), name, None))}


def is_same(one, other):
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(map(is_same, one.values(), other.values()))
    return one is other or (not isinstance(one, keras.KerasTensor) and one == other) is True


def test_every_attribute_is_that_of_the_network_or_differs_for_a_reason():
    model = wrapped()
    own = model.network
    seen = (public(own) | public(model)) - NOT_COMPARED
    assert seen - set(ATTRIBUTES) == set()
    for name in seen:
        of_network, of_model = looked_at(own, name), looked_at(model, name)
        assert is_same(of_model, of_network) == (ATTRIBUTES[name] == SAME), name


def test_the_table_of_the_guide_says_so_too():
    """A row of the network's own names attributes that are the same, others those that differ."""
    page = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
    table = page.split("## Attributes of a RegularizedModel")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", table, re.M)
    kinds = {name: what for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    methods = {"save", "get_config", "clone_model", "export", "save_weights", "get_layer"}
    assert methods < set(kinds) and len(kinds) > 25
    for name in set(kinds) - methods:
        assert (kinds[name] == "the network's own") == (ATTRIBUTES[name] == SAME), name


def test_the_table_is_no_longer_than_it_must_be():
    model = wrapped()
    assert set(ATTRIBUTES) <= public(model) | public(model.network)
    assert not is_same([1, model.input], [1, wrapped().input])  # The comparison can fail.


def test_a_network_without_known_inputs_has_none_of_its_own():
    """As the network alone: then scikit-learn's wrappers and others ask for something else."""
    model = RegularizedModel(keras.Sequential([layers.Dense(3)]), "spectral")
    for name in ("inputs", "outputs", "input_shape", "output_shape"):
        assert not hasattr(model, name)
    compiled(model).fit(X["img"], Y, **FIT)
    assert model.output_shape == model.network.output_shape == (None, 3)


def test_a_part_of_the_network_by_its_inputs():
    model = wrapped()
    part = keras.Model(model.input, model.get_layer("logits").output)
    assert model.get_layer("both") is model.get_layer(index=0) is model.network
    with pytest.raises(ValueError, match="No such layer: nobody.*logits"):
        model.get_layer("nobody")
    np.testing.assert_array_equal(part.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("layout", ["dict", "list", "one"])
def test_export_has_the_names_and_dtypes_of_the_network(tmp_path, layout):
    own, x = network(), X
    if layout == "list":
        own, x = keras.Model(own.inputs, own.outputs), list(X.values())
    elif layout == "one":
        own, x = keras.Sequential([keras.Input((6,), name="img"), layers.Dense(3)]), X["img"]
    model = RegularizedModel(own, "spectral", input="img")
    signatures = []
    for name, exported in (("network", own), ("model", model)):
        exported.export(tmp_path / name, format="tf_saved_model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / name)
        specs = loaded.signatures["serving_default"].structured_input_signature[1]
        signatures.append({key: (spec.shape, spec.dtype) for key, spec in specs.items()})
        served = loaded.serve(tf.nest.map_structure(tf.constant, x))
        np.testing.assert_allclose(served, own.predict(x, verbose=0), atol=1e-6)
    assert signatures[0] == signatures[1]
    assert any("img" in key for key in signatures[1])


class Doubled(RegularizedModel):
    """With a call of its own: then that is what is exported."""

    def call(self, inputs, training=None):
        return 2 * self.network(inputs, training=training)


class Bare(layers.Layer):
    """A layer that is no model: it has no export of its own."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("kind", ["a call of its own", "no model"])
def test_export_of_what_is_more_or_less_than_a_network(tmp_path, kind):
    image = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model = Doubled(image) if kind == "a call of its own" else RegularizedModel(Bare())
    expected = model.predict(X["img"], verbose=0)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.serve(X["img"]), expected, atol=1e-6)


class Named(keras.metrics.MeanSquaredError):
    """A metric of the users, by any name."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(0.0, y_pred, sample_weight)


@pytest.mark.parametrize(
    ("names", "ours", "eager"),
    [
        (["accuracy"], "penalty", False),
        (["penalty"], "regularizer_penalty", True),
        (["penalty", "regularizer_penalty"], "regularizer_regularizer_penalty", False),
        (["regularizer_penalty"], "penalty", False),
    ],
)
def test_a_metric_of_any_name_keeps_it(names, ours, eager):
    """Values, validation and evaluate are those of plain Keras; the penalty stands beside."""
    plain = compiled(network(), metrics=[Named(name) for name in names], run_eagerly=eager)
    model = wrapped(regularizers.SpectralNorm(0.0, "exact"))
    compiled(model, metrics=[Named(name) for name in names], run_eagerly=eager)
    expected = plain.fit(X, Y, validation_data=(X, Y), **FIT).history
    got = model.fit(X, Y, validation_data=(X, Y), **FIT).history
    assert got.pop(ours)[0] > 0
    assert set(got) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5)
    expected = plain.evaluate(X, Y, verbose=0, return_dict=True)
    got = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert got == pytest.approx(expected, rel=1e-5)
    assert set(model.train_on_batch(X, Y, return_dict=True)) == {"loss", *names, ours}


def test_a_metric_that_the_network_keeps_may_be_called_loss():
    """Of the two Keras logs the last; but the network's own is not fed with the loss."""
    own = network()
    own.tracked = keras.metrics.Mean(name="loss")
    model = compiled(RegularizedModel(own, "spectral", input="img"))
    model.fit(X, Y, **FIT)
    assert float(own.tracked.count) == 0


def of_images(penalty):
    """An embedding has no linear map that `SpectralBound` knows."""
    keras.utils.set_random_seed(1)
    return RegularizedModel(keras.Sequential([keras.Input((6,)), layers.Dense(3)]), penalty)


@pytest.mark.parametrize("penalty", regularizers.BY_NAME)
def test_a_network_frozen_as_a_whole_after_a_first_fit(penalty, tmp_path):
    """As in Keras: it says so and trains nothing; the file can be loaded, cloned and judged."""
    model = compiled(of_images(penalty))
    model.fit(X["img"], Y, **FIT)
    model.network.trainable = False
    compiled(model)
    before = model.network.get_weights()
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        history = model.fit(X["img"], Y, **FIT).history
    for a, b in zip(before, model.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    data = model.evaluate(X["img"], Y, verbose=0)
    got = history["loss"][0] - model.regularizer.factor * history["penalty"][0]
    assert got == pytest.approx(data, rel=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(X["img"], Y, verbose=0) == pytest.approx(data, rel=1e-6)
    assert not keras.models.clone_model(again).trainable_variables
    with pytest.raises(ValueError, match="nothing to regularize"):
        RegularizedModel(model.network, penalty)


def test_a_frozen_model_is_a_layer_of_another_that_trains():
    """Nothing of it is trained, so no penalty would be lost."""
    inner = of_images("spectral")
    inner.network.trainable = False
    image = keras.Input((6,))
    outer = compiled(keras.Model(image, layers.Dense(3)(inner(image))))
    before = inner.network.get_weights()
    outer.fit(X["img"], Y, **FIT)
    for a, b in zip(before, inner.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_network_or_penalty_needs_another_model():
    """Its step and state would go on with the first one, in silence."""
    model = of_images("spectral")
    for name, value in (("regularizer", regularizers.SpectralNorm(7.0)), ("regularizer", None)):
        with pytest.raises(AttributeError, match=f"RegularizedModel.*anew.*Received: {name}="):
            setattr(model, name, value)
    before = model.network
    with pytest.raises(AttributeError, match="Received: network="):
        model.network = of_images(None).network
    assert model.network is before
    model.more = layers.Dense(2)  # As a functional model may be given one.
    assert model.layers == [before, model.more]


@pytest.mark.parametrize("way", ["clone_model", "config", "json"])
def test_a_copy_is_a_model_of_its_own(way):
    model = wrapped(regularizers.SpectralNorm(0.3, "lanczos", 2, threshold=0.1))
    before = model.network.get_weights()
    copy = {
        "clone_model": lambda: keras.models.clone_model(model),
        "config": lambda: RegularizedModel.from_config(model.get_config()),
        "json": lambda: keras.models.model_from_json(model.to_json()),
    }[way]()
    assert copy.to_json() == model.to_json()
    assert copy.network is not model.network and copy.regularizer is not model.regularizer
    compiled(copy).fit(X, Y, **FIT)
    for a, b in zip(before, model.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [w.shape for w in copy.get_weights()] == [w.shape for w in model.get_weights()]


def test_a_config_says_what_was_given_and_no_more():
    config = wrapped().get_config()
    assert set(config) == {
        *("name", "trainable", "dtype"),
        *("network", "regularizer", "input", "output"),
    }
    assert (config["input"], config["output"]) == ("img", None)


def test_a_weights_file_is_one_of_the_network_and_back(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = compiled(wrapped())
    model.fit(X, Y, **FIT)
    model.save_weights(path)
    alone = network()
    alone.load_weights(path)
    for a, b in zip(model.network.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    alone.set_weights([2 * w for w in alone.get_weights()])
    alone.save_weights(path)
    state = model.get_weights()[0]
    model.load_weights(path)
    for a, b in zip(model.network.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.get_weights()[0], state)


@pytest.mark.parametrize("penalty", ["spectral", None])
def test_a_weights_file_keeps_the_optimizer_and_the_state_of_the_penalty(tmp_path, penalty):
    """Training goes on from it as without a break; the file of a second save replaces the first."""
    path = str(tmp_path / "model.weights.h5")
    model, other = wrapped(penalty), wrapped(penalty)
    for each in (model, other):
        each.compile(keras.optimizers.Adam(0.1), LOSS)
        each.fit(X, Y, **FIT)
    model.save_weights(path)
    model.fit(X, Y, **FIT)
    model.save_weights(path)
    other.load_weights(path)
    expected, got = (each.fit(X, Y, **FIT).history["loss"] for each in (model, other))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


def test_a_weights_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """And only if the user says so, as in Keras, where that is asked."""
    model, path = wrapped("spectral"), tmp_path / "model.weights.h5"
    compiled(model).fit(X, Y, **FIT)
    model.save_weights(path)
    before = path.read_bytes()
    monkeypatch.setattr("builtins.input", lambda _: "n")
    model.fit(X, Y, **FIT)
    model.save_weights(path, overwrite=False)
    assert path.read_bytes() == before

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tfjacreg.weights_files.put_network_first", killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_weights(path)
    assert path.read_bytes() == before
    monkeypatch.setattr("builtins.input", lambda _: "y")
    model.save_weights(path, overwrite=False)
    assert list(tmp_path.iterdir()) == [path]
    other = network()
    other.load_weights(path)
    for a, b in zip(model.network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Mistaken(regularizers.JacobianRegularizer):
    """A penalty with a mistake, before or after a product that has no derivative."""

    def __init__(self, mistake):
        super().__init__(0.1)
        self.mistake = mistake

    def per_example(self, jacobian, key):
        return self.mistake(jacobian)


class NoPenalty(regularizers.JacobianRegularizer):
    pass


@pytest.mark.parametrize(
    ("penalty", "error", "message"),
    [
        (lambda: Mistaken(lambda _: {}["typo"]), KeyError, "^'typo'$"),
        (lambda: Mistaken(lambda jacobian: jacobian.typo), AttributeError, "no attribute 'typo'"),
        (lambda: NoPenalty(0.1), TypeError, "must define per_example"),
    ],
)
def test_a_mistake_in_a_penalty_is_shown_as_it_is(penalty, error, message):
    model = compiled(wrapped(penalty()))
    with pytest.raises(error, match=message):
        model.fit(X, Y, **FIT)
