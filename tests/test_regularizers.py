import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import seeded_input, singular_values

from tfjacreg import JacobianOperator, RegularizedModel, estimators, regularizers, vectors
from tfjacreg.jacobian import FORWARD_MODES
from tfjacreg.regularizers import (
    FrobeniusNorm,
    JacobianRegularizer,
    SpectralBound,
    SpectralNorm,
    WeightDecay,
)


def tiny(activation):
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 2, activation=activation),
            layers.Flatten(),
            layers.Dense(5, activation=activation),
            layers.Dense(3),
        ]
    )


def penalty_and_gradients(regularizer, network, x, state=None):
    state = regularizer.initial_state(network) if state is None else state
    variables = [v.value for v in network.trainable_variables]
    with tf.GradientTape() as tape:
        if isinstance(regularizer, JacobianRegularizer):
            tangent = regularizer.tangent_of_the_pass(tf.convert_to_tensor(x), state)
            penalty, _ = regularizer(JacobianOperator(network, x, tangent=tangent), state)
        else:
            penalty, _ = regularizer(network, state)
    zero = tf.UnconnectedGradients.ZERO
    return penalty, tape.gradient(penalty, variables, unconnected_gradients=zero)


def finite_difference_gradients(function, network, step=1e-6):
    """d function() / d weight by central differences, for every weight."""
    gradients = []
    for variable in network.trainable_variables:
        start = variable.numpy()
        gradient = np.zeros_like(start)
        for index in np.ndindex(*start.shape):
            values = []
            for sign in (1, -1):
                moved = start.copy()
                moved[index] += sign * step
                variable.assign(moved)
                values.append(function())
            gradient[index] = (values[0] - values[1]) / (2 * step)
        variable.assign(start)
        gradients.append(gradient)
    return gradients


def assert_all_close(got, expected, atol):
    assert any(np.any(np.abs(e) > 100 * atol) for e in expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


CONVERGED = {
    "exact": {"method": "exact"},
    "lanczos": {"method": "lanczos", "iterations": 4},
    "power": {"method": "power", "iterations": 400},
}


def compiled_jacobian(network, x):
    """A function that gives the dense Jacobian at the weights of the moment, quickly."""
    x = tf.constant(x)

    @tf.function
    def jacobian():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = network(x)
        return tape.batch_jacobian(y, x, experimental_use_pfor=False)

    return lambda: jacobian().numpy().reshape(len(x), network.output_shape[-1], -1)


@pytest.mark.parametrize(
    ("method", "activation", "squared"),
    [("exact", "relu", False), ("exact", "tanh", True), ("lanczos", "tanh", False)],
)
def test_gradient_against_finite_differences_of_numpys_svd(float64, method, activation, squared):
    network = tiny(activation)
    x = seeded_input((4, 4, 1), 2)

    jacobian = compiled_jacobian(network, x)

    def mean_sigma():
        sigma = singular_values(jacobian())[:, 0]
        return np.mean(sigma**2 if squared else sigma)

    regularizer = SpectralNorm(1, **CONVERGED[method], squared=squared, seed=0)
    penalty, gradients = penalty_and_gradients(regularizer, network, x)
    assert float(penalty) == pytest.approx(mean_sigma(), rel=1e-8)
    assert_all_close(gradients, finite_difference_gradients(mean_sigma, network), atol=2e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_a_threshold_between_the_examples_sigmas(float64, squared):
    """Half of the batch is above it: values and gradients by finite differences of NumPy's SVD."""
    network = tiny("tanh")
    x = seeded_input((4, 4, 1), 4)
    jacobian = compiled_jacobian(network, x)
    threshold = np.median(singular_values(jacobian())[:, 0])

    def expected():
        excess = np.maximum(singular_values(jacobian())[:, 0] - threshold, 0)
        assert np.count_nonzero(excess) == 2
        return np.mean(excess**2 if squared else excess)

    regularizer = SpectralNorm(1, "exact", squared=squared, threshold=threshold)
    penalty, gradients = penalty_and_gradients(regularizer, network, x)
    assert float(penalty) == pytest.approx(expected(), rel=1e-8)
    assert_all_close(gradients, finite_difference_gradients(expected, network), atol=1e-7)


@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_gradient_against_that_of_the_dense_svd(float64, method, forward_mode):
    """TensorFlow's own derivative of the SVD of the dense Jacobian: singular values are apart."""
    network = tiny("tanh")
    x = tf.constant(seeded_input((4, 4, 1), 2))
    variables = [v.value for v in network.trainable_variables]
    with tf.GradientTape() as outer:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = network(x)
        jacobians = tf.reshape(tape.batch_jacobian(y, x), (2, 3, 16))
        sigma = tf.linalg.svd(jacobians, compute_uv=False)[:, 0]
        expected = tf.reduce_mean(sigma)
    zero = tf.UnconnectedGradients.ZERO
    expected_gradients = outer.gradient(expected, variables, unconnected_gradients=zero)
    settings = dict(CONVERGED[method])
    if method == "power":
        settings["iterations"] = 60
    regularizer = SpectralNorm(1, **settings, seed=0, forward_mode=forward_mode)
    penalty, gradients = penalty_and_gradients(regularizer, network, x)
    np.testing.assert_allclose(penalty, expected, rtol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_unconverged_gradient_holds_u_and_v(float64):
    """N = 1: the gradient of <u, J v> with the u and v of this step, by finite differences."""
    network = tiny("tanh")
    x = seeded_input((4, 4, 1), 2)
    regularizer = SpectralNorm(1, seed=5)
    penalty, gradients = penalty_and_gradients(regularizer, network, x)
    op = JacobianOperator(network, x)
    u = estimators.leading_left_vector(op, "power", 1, vectors.random_unit(op.x, (5, 0)))
    v = vectors.unit(op.rmatvec(u))
    u, v = u.numpy(), v.numpy().reshape(2, -1)

    jacobian = compiled_jacobian(network, x)

    def held():
        return np.mean(np.einsum("bi,bij,bj->b", u, jacobian(), v))

    assert float(penalty) == pytest.approx(held())
    assert_all_close(gradients, finite_difference_gradients(held, network), atol=2e-7)


@pytest.mark.parametrize("method", estimators.METHODS)
@pytest.mark.parametrize("forward_mode", FORWARD_MODES)
def test_zero_network(method, forward_mode):
    network = tiny("relu")
    for variable in network.variables:
        variable.assign(np.zeros(variable.shape))
    regularizer = SpectralNorm(1, method, 2, seed=0, forward_mode=forward_mode)
    penalty, gradients = penalty_and_gradients(regularizer, network, seeded_input((4, 4, 1)))
    assert float(penalty) == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def linear(kernel):
    network = keras.Sequential(
        [keras.Input((kernel.shape[0],)), layers.Dense(kernel.shape[1], use_bias=False)]
    )
    network.set_weights([kernel])
    return network


def test_linear_network_in_closed_form(float64):
    """sigma = ||W||_2 with gradient u v^T; the mean of the Frobenius draws is ||W||_F^2, 2 W."""
    kernel = np.random.default_rng(0).normal(size=(5, 3))
    network = linear(kernel)
    x = np.zeros((4, 5))
    left, s, right = np.linalg.svd(kernel)
    penalty, (gradient,) = penalty_and_gradients(SpectralNorm(1, "exact"), network, x)
    assert float(penalty) == pytest.approx(s[0])
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-10)

    draws = [
        penalty_and_gradients(FrobeniusNorm(1, 2), network, np.zeros((50, 5)), [np.array([7, k])])
        for k in range(80)
    ]
    penalties = np.array([float(p) for p, _ in draws])
    gradients = np.array([g[0].numpy() for _, g in draws])
    error = penalties.std() / np.sqrt(80)
    assert abs(penalties.mean() - np.sum(kernel**2)) < 4 * error < 0.5
    error = gradients.std(axis=0) / np.sqrt(80)
    assert np.all(np.abs(gradients.mean(axis=0) - 2 * kernel) < 4.5 * error)


def test_frobenius_gradient_of_one_draw(float64):
    """Eq. (2) for one draw, with its v, by finite differences over the dense Jacobian."""
    network = tiny("tanh")
    x = seeded_input((4, 4, 1), 2)
    penalty, gradients = penalty_and_gradients(FrobeniusNorm(1, 2, seed=5), network, x)
    like = tf.zeros((2, 3), tf.float64)
    projections = [vectors.random_unit(like, (5, j)).numpy() for j in range(2)]

    jacobian = compiled_jacobian(network, x)

    def eq2():
        rows = [np.einsum("bi,bij->bj", v, jacobian()) for v in projections]
        return 3 / 2 * sum(np.sum(row**2) for row in rows) / len(x)

    assert float(penalty) == pytest.approx(eq2())
    assert_all_close(gradients, finite_difference_gradients(eq2, network), atol=2e-6)


def test_draws_change_from_step_to_step():
    network = tiny("tanh")
    x = seeded_input((4, 4, 1))
    for regularizer in (SpectralNorm(1, seed=3), FrobeniusNorm(1, seed=3)):
        state = regularizer.initial_state(network)
        values = []
        for _ in range(2):
            penalty, state = regularizer(JacobianOperator(network, x), state)
            values.append(float(penalty))
        again, _ = regularizer(JacobianOperator(network, x), regularizer.initial_state(network))
        assert values[0] != values[1] and values[0] == float(again)


def layer_matrices(network):
    """The matrix of every layer with a kernel, column by column."""
    matrices = []
    for layer in network.layers:
        if layer.weights:
            shape = layer.input.shape[1:]
            basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
            alone = type(layer).from_config({**layer.get_config(), "activation": "linear"})
            alone.build((None, *shape))
            alone.set_weights(layer.get_weights())
            columns = alone(basis) - alone(0 * basis)
            matrices.append(columns.numpy().reshape(len(basis), -1).T)
    return matrices


def test_spectral_bound_penalty(float64):
    """One iteration a step, kept from step to step, converges to eq. (5) and to its gradient."""
    network = tiny("relu")
    regularizer = SpectralBound(1, seed=0)
    state = regularizer.initial_state(network)
    values = []
    for _ in range(40):
        penalty, state = regularizer(network, state)
        values.append(float(penalty))

    def eq5():
        return sum(np.linalg.norm(matrix, 2) ** 2 for matrix in layer_matrices(network))

    assert values[0] < 0.99 * values[-1] and np.all(np.diff(values) > -1e-12)
    assert values[-1] == pytest.approx(eq5(), rel=0.02)
    many = SpectralBound(1, iterations=1000, seed=0)
    penalty, gradients = penalty_and_gradients(many, network, np.zeros((1, 4, 4, 1)), state)
    assert float(penalty) == pytest.approx(eq5(), rel=1e-8)
    assert_all_close(gradients, finite_difference_gradients(eq5, network), atol=1e-5)


def test_spectral_bound_recovers_from_a_layer_of_zeros():
    network = linear(np.zeros((3, 2)))
    regularizer = SpectralBound(1, seed=0)
    penalty, gradients = penalty_and_gradients(regularizer, network, np.zeros((1, 3)))
    assert float(penalty) == 0 and np.all(gradients[0] == 0)
    _, state = regularizer(network, regularizer.initial_state(network))
    network.set_weights([np.eye(3, 2)])
    penalty, _ = regularizer(network, state)
    assert float(penalty) > 0.1


def test_weight_decay_is_for_kernels_only(float64):
    network = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)]
    )
    for variable in network.trainable_variables:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    x = np.zeros((1, 4))
    penalty, gradients = penalty_and_gradients(WeightDecay(1), network, x)
    kernels = [v.numpy() for v in network.variables if v.name == "kernel"]
    assert len(kernels) == 2
    assert float(penalty) == pytest.approx(sum(np.sum(k**2) for k in kernels))
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        expected = 2 * variable.numpy() if variable.name == "kernel" else np.zeros(variable.shape)
        np.testing.assert_allclose(gradient, expected)


class Counting(layers.Layer):
    """Counts its passes, in a variable and in a loss."""

    def build(self, input_shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x):
        self.count.assign_add(1.0)
        self.add_loss(keras.ops.mean(x))
        return x


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_a_fraction_of_the_batch(compiled):
    """Penalty and weight gradient are means over all choices of those of the chosen examples."""
    network = tiny("tanh")
    x = tf.constant(seeded_input((4, 4, 1), 6))
    weights = [v.value for v in network.trainable_variables]

    def gradient(x, state, regularizer):
        with tf.GradientTape() as tape:
            operator = JacobianOperator(network, x, training=True)
            value, state = regularizer(operator, state)
        gradients = tape.gradient(
            value, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [value, *gradients], state

    if compiled != "eager":
        gradient = tf.function(gradient, jit_compile=compiled == "xla", reduce_retracing=True)
    whole, part = (SpectralNorm(1, "exact", seed=0, fraction=f) for f in (1.0, 0.35))
    alone = [
        [np.array(a) for a in gradient(x[i : i + 1], whole.initial_state(network), whole)[0]]
        for i in range(6)
    ]
    # Two of six: round(0.35 * 6). Each step must be the mean of two different examples.
    state, seen = part.initial_state(network), set()
    for _ in range(40 if compiled == "graph" else 8):
        got, state = gradient(x, state, part)
        pairs = [(i, j) for i in range(6) for j in range(i)]
        errors = [abs(float(got[0]) - (alone[i][0] + alone[j][0]) / 2) for i, j in pairs]
        i, j = pairs[int(np.argmin(errors))]
        seen |= {i, j}
        for a, b, c in zip(got, alone[i], alone[j], strict=True):
            np.testing.assert_allclose(a, (b + c) / 2, atol=1e-5 * np.max(np.abs(b + c)))
    if compiled == "graph":
        assert seen == set(range(6))


def test_examples_are_drawn_equally_often():
    penalty = SpectralNorm(1, fraction=0.5)
    operator = JacobianOperator(layers.ReLU(), tf.reshape(tf.range(5.0), (5, 1, 1, 1)))
    counts = np.zeros(5)
    for draw in range(400):
        part = penalty._sampled(operator, (tf.constant(3, tf.int64), tf.constant(draw, tf.int64)))
        chosen = part.x.numpy().ravel().astype(int)
        assert len(set(chosen)) == len(chosen) == 2
        counts[chosen] += 1
    # 400 draws of 2 of 5: 160 each, with a standard deviation of 9.8.
    assert np.all(np.abs(counts - 160) < 40)


def test_a_fraction_leaves_no_trace_in_the_network():
    network = keras.Sequential([keras.Input((3,)), Counting(), layers.Dense(2)])
    operator = JacobianOperator(network, seeded_input((3,), 8), training=True)
    assert float(network.layers[0].count) == 1 and len(network.losses) == 1
    regularizer = SpectralNorm(1, iterations=3, fraction=0.5)
    regularizer(operator, regularizer.initial_state(network))
    assert float(network.layers[0].count) == 1 and len(network.losses) == 1


@pytest.mark.parametrize("layer", [layers.BatchNormalization(), layers.Dropout(0.5)])
def test_a_fraction_of_examples_that_depend_on_the_batch_is_refused(layer):
    network = keras.Sequential([keras.Input((3,)), layer, layers.Dense(2)])
    model = RegularizedModel(network, SpectralNorm(0.1, fraction=0.5))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Use fraction=1. Received.*(BatchNorm|Dropout)"):
        model.fit(seeded_input((3,), 8), np.zeros((8, 2)), verbose=0)


def test_penalties_of_weights_need_no_forward_pass():
    network = keras.Sequential([keras.Input((3,)), Counting(), layers.Dense(2)])
    for regularizer in (SpectralBound(1), WeightDecay(1)):
        penalty, _ = regularizer(network, regularizer.initial_state(network))
        assert float(penalty) > 0 and float(network.layers[0].count) == 0


EXAMPLES = [
    SpectralNorm(0.1, "lanczos", 3, True, 5, "transpose", 0.25),
    SpectralNorm(0.1),
    FrobeniusNorm(0.2, num_projections=4, seed=1, fraction=0.5),
    SpectralBound(0.3, iterations=2, seed=9),
    WeightDecay(0.4),
]


@pytest.mark.parametrize("regularizer", EXAMPLES, ids=lambda r: type(r).__name__)
def test_serialization(regularizer):
    config = keras.saving.serialize_keras_object(regularizer)
    assert config["registered_name"] == f"tfjacreg>{type(regularizer).__name__}"
    plain = {"class_name": type(regularizer).__name__, "config": regularizer.get_config()}
    for copy in (
        keras.saving.deserialize_keras_object(config),
        regularizers.get(config),
        regularizers.get(plain),
        type(regularizer).from_config(regularizer.get_config()),
    ):
        assert type(copy) is type(regularizer)
        assert copy.get_config() == regularizer.get_config()


def test_numbers_of_numpy_are_kept_as_numbers_of_python():
    """A config that is written as JSON holds nothing else."""
    for made in (
        SpectralNorm(np.float32(0.5), iterations=np.int64(2), seed=np.int32(3)),
        FrobeniusNorm(np.float32(0.5), num_projections=np.int64(2), seed=np.int64(3)),
        SpectralBound(np.float64(0.5), iterations=np.int64(2), seed=np.int64(3)),
    ):
        config = made.get_config()
        assert json.loads(json.dumps(config)) == config and config["factor"] == 0.5


def test_get():
    assert regularizers.get(None) is None
    for name, cls in regularizers.BY_NAME.items():
        made = regularizers.get(name)
        assert type(made) is cls and made.factor == regularizers.DEFAULT_FACTOR
        assert regularizers.get(made) is made


BAD = {
    "factor": (lambda: SpectralNorm(-0.1), ValueError, "`factor` must be .*factor=-0.1"),
    "factor_nan": (lambda: WeightDecay(float("nan")), ValueError, "`factor` must be .*nan"),
    "factor_type": (lambda: FrobeniusNorm("a"), ValueError, "`factor` must be .*'a'"),
    "iterations": (lambda: SpectralNorm(1, iterations=0), ValueError, "`iterations`.*=0"),
    "bound_iterations": (lambda: SpectralBound(1, iterations=-1), ValueError, "`iterations`"),
    "fraction": (lambda: SpectralNorm(1, fraction=0), ValueError, "`fraction`.*=0"),
    "fraction_above_1": (lambda: FrobeniusNorm(1, fraction=1.5), ValueError, "`fraction`.*=1.5"),
    "fraction_type": (lambda: FrobeniusNorm(1, fraction="a"), ValueError, "`fraction` must be"),
    "method": (lambda: SpectralNorm(1, "svd"), ValueError, "power.*lanczos.*exact.*svd"),
    "projections": (lambda: FrobeniusNorm(1, 0), ValueError, "`num_projections`.*=0"),
    "seed": (lambda: SpectralNorm(1, seed=1.5), ValueError, "`seed`.*=1.5"),
    "bound_seed": (lambda: SpectralBound(1, seed=-2), ValueError, "`seed`.*=-2"),
    "forward_mode": (lambda: SpectralNorm(1, forward_mode="x"), ValueError, "accumulator"),
    "name": (lambda: regularizers.get("l2"), ValueError, "frobenius.*spectral.*'l2'"),
    "class_name": (
        lambda: regularizers.get({"class_name": "Ridge", "config": {"factor": 1.0}}),
        ValueError,
        "FrobeniusNorm.*Received.*Ridge",
    ),
    "no_class_name": (lambda: regularizers.get({}), ValueError, "`class_name`.*Received: {}"),
    "type": (lambda: regularizers.get(3), TypeError, "None, a name.*Received: 3"),
    "no_kernel": (
        lambda: SpectralBound(1).initial_state(
            keras.Sequential([keras.Input((2,)), layers.ReLU()])
        ),
        ValueError,
        "no layer with a kernel",
    ),
    "no_trainable_kernel": (
        lambda: WeightDecay(1)(
            keras.Sequential([keras.Input((2,)), layers.BatchNormalization()]), []
        ),
        ValueError,
        "no trainable kernel",
    ),
    "base_of_weights": (
        lambda: regularizers.WeightRegularizer(1)(None, []),
        TypeError,
        "must define __call__",
    ),
    "base_of_the_jacobian": (
        lambda: regularizers.JacobianRegularizer(1).per_example(None, None),
        TypeError,
        "must define per_example",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()
