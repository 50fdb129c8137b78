import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import NETWORKS, build, dense_jacobian, seeded_input, singular_values

import tfjacreg
from tfjacreg import JacobianOperator, estimators, networks, spectral_norm, vectors


def linear(matrix):
    """`f(x) = A x` with the matrix given."""
    matrix = np.asarray(matrix, keras.config.floatx())
    network = keras.Sequential(
        [keras.Input((matrix.shape[1],)), layers.Dense(matrix.shape[0], use_bias=False)]
    )
    network.set_weights([matrix.T])
    return network


def with_spectrum(values, n_out, n_in, seed=0):
    """A matrix with the singular values given."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(n_out, n_out)))[0][:, : len(values)]
    v = np.linalg.qr(rng.normal(size=(n_in, n_in)))[0][:, : len(values)]
    return u @ np.diag(values) @ v.T


def flat(a):
    return np.reshape(a, (len(a), -1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_and_complete_lanczos_against_svd(float64, name, batch):
    network = build(name)
    x = seeded_input(network.input_shape[1:], batch)
    jacobians = dense_jacobian(network, x)
    u, s, vt = np.linalg.svd(jacobians, full_matrices=False)
    n = min(jacobians.shape[1:])
    for method, iterations in (("exact", 1), ("lanczos", n)):
        t = spectral_norm(network, x, method=method, iterations=iterations)
        np.testing.assert_allclose(t.sigma, s[:, 0], rtol=1e-10)
        assert np.all(t.residual < 1e-9 * s[:, 0])
        sign = np.sign(np.sum(flat(t.u) * u[:, :, 0], axis=1))[:, None]
        np.testing.assert_allclose(flat(t.u), sign * u[:, :, 0], atol=1e-7)
        np.testing.assert_allclose(flat(t.v), sign * vt[:, 0], atol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32(name):
    network = build(name)
    x = seeded_input(network.input_shape[1:])
    s = singular_values(dense_jacobian(network, x))[:, 0]
    n = min(network(x)[0].shape.num_elements(), x[0].size)
    exact = spectral_norm(network, x, method="exact").sigma
    np.testing.assert_allclose(exact, s, rtol=1e-4)
    lanczos = spectral_norm(network, x, method="lanczos", iterations=n).sigma
    np.testing.assert_allclose(lanczos, exact, rtol=1e-4)


@pytest.mark.parametrize("name", ["conv_relu", "conv_tanh", "many_outputs", "one_output"])
def test_power_rises_to_the_exact_value_and_never_exceeds_it(float64, name):
    network = build(name)
    x = seeded_input(network.input_shape[1:])
    s = singular_values(dense_jacobian(network, x))[:, 0]
    last = 0
    for iterations in (1, 2, 4, 8, 100):
        sigma = spectral_norm(network, x, method="power", iterations=iterations).sigma.numpy()
        assert np.all(sigma <= s * (1 + 1e-12)) and np.all(sigma >= last * (1 - 1e-12))
        last = sigma
    np.testing.assert_allclose(last, s, rtol=1e-4)


def test_algorithm_1_in_numpy(float64):
    """The left vector after N iterations from the same start, from the dense Jacobian."""
    network = build("conv_relu")
    x = seeded_input(network.input_shape[1:])
    jacobians = dense_jacobian(network, x)
    op = JacobianOperator(network, x)
    start = vectors.random_unit(op.x, (3, 7))
    for iterations in (1, 2, 5):
        for number, jacobian in enumerate(jacobians):
            v = flat(start)[number]
            for _ in range(iterations):
                u = jacobian @ v
                u /= np.linalg.norm(u)
                v = jacobian.T @ u
                v /= np.linalg.norm(v)
            got = estimators.leading_left_vector(op, "power", iterations, start)[number]
            np.testing.assert_allclose(got, u, atol=1e-10)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_lanczos_is_optimal_in_its_krylov_space(float64, steps):
    """With its last product: the largest ||J^T u|| over the span of J v, (J J^T) J v, ..."""
    network = build("conv_relu")
    x = seeded_input(network.input_shape[1:])
    op = JacobianOperator(network, x)
    start = vectors.random_unit(op.x, (3, 7))
    complete, w = estimators.leading_left_vector_and_product(op, "lanczos", steps, start)
    np.testing.assert_allclose(w, op.rmatvec(complete), atol=1e-10)
    cheaper = estimators.leading_left_vector(op, "lanczos", steps, start)
    power = estimators.leading_left_vector(op, "power", steps, start)
    for number, jacobian in enumerate(dense_jacobian(network, x)):
        krylov = [jacobian @ flat(start)[number]]
        for _ in range(steps - 1):
            krylov.append(jacobian @ (jacobian.T @ krylov[-1]))
            krylov[-1] /= np.linalg.norm(krylov[-1])
        basis = np.linalg.qr(np.stack(krylov, axis=1))[0]
        best = np.linalg.norm(basis.T @ jacobian, 2)
        reached, nearly, plain = (
            np.linalg.norm(jacobian.T @ flat(u)[number]) for u in (complete, cheaper, power)
        )
        assert reached == pytest.approx(best, rel=1e-8)
        assert plain * (1 - 1e-12) <= nearly <= best * (1 + 1e-12)


class CountedProducts:
    """An operator that counts its products."""

    def __init__(self, op):
        self.op, self.x, self.primal = op, op.x, op.primal
        self.counts = {"matvec": 0, "rmatvec": 0}

    def matvec(self, v):
        self.counts["matvec"] += 1
        return self.op.matvec(v)

    def rmatvec(self, u):
        self.counts["rmatvec"] += 1
        return self.op.rmatvec(u)


@pytest.mark.parametrize(
    ("function", "method", "forward", "backward"),
    [
        (estimators.leading_left_vector, "power", 3, 2),
        (estimators.leading_left_vector, "lanczos", 3, 2),
        (estimators.leading_left_vector, "exact", 0, 5),
        (estimators.leading_left_vector_and_product, "power", 3, 3),
        (estimators.leading_left_vector_and_product, "lanczos", 3, 3),
        (estimators.leading_left_vector_and_product, "exact", 0, 6),
    ],
)
def test_number_of_products(function, method, forward, backward):
    """In training J^T u comes on top: Algorithm 1's 2 N products in all, for Lanczos too."""
    network = build("conv_relu")
    op = CountedProducts(JacobianOperator(network, seeded_input((8, 8, 2))))
    start = vectors.random_unit(op.x, (3, 7))
    function(op, method, 3, start)
    assert op.counts == {"matvec": forward, "rmatvec": backward}


@pytest.mark.parametrize("method", estimators.METHODS)
def test_left_vector_of_zero_is_zero(method):
    op = JacobianOperator(linear(np.zeros((3, 4))), np.ones((2, 4), "float32"))
    u, w = estimators.leading_left_vector_and_product(
        op, method, 2, vectors.random_unit(op.x, (0, 0))
    )
    np.testing.assert_array_equal(w, np.zeros((2, 4)))
    np.testing.assert_array_equal(u, np.zeros((2, 3)))


def test_projections_of_successive_draws_differ():
    """Two draws of two projections are the one draw of four."""
    op = JacobianOperator(build("conv_tanh"), seeded_input((8, 8, 2)))
    first, second = (estimators.squared_frobenius_sample(op, 2, (5, draw)) for draw in (0, 1))
    four = estimators.squared_frobenius_sample(op, 4, (5, 0))
    np.testing.assert_allclose((first + second) / 2, four, rtol=1e-5)


@pytest.mark.parametrize("part", [1e-1, 1e-3, 1e-5])
def test_what_is_left_is_orthogonal_to_the_basis(part):
    """In float32, however small the part outside the basis: one pass would leave 1e-7 / part."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 3)))[0].T
    basis = [tf.constant(d[None], tf.float32) for d in directions[:2]]
    a = basis[0] + 2 * basis[1] + tf.constant(part * directions[2][None], tf.float32)
    left, u = estimators._next_direction(a, basis, [tf.ones(1)])
    assert float(left[0]) == pytest.approx(part, rel=1e-6 / part)
    assert np.linalg.norm(u) == pytest.approx(1, rel=1e-6)
    for b in basis:
        assert abs(float(tf.reduce_sum(u * b))) < 3e-7


def test_rounding_is_no_direction():
    """What lies in the span of the basis leaves 0, beside an example that leaves something."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 3)))[0].T
    basis = [tf.constant(np.stack([d, d]), tf.float32) for d in directions[:2]]
    outside = tf.constant(np.stack([0 * directions[2], directions[2]]), tf.float32)
    left, u = estimators._next_direction(basis[0] + 2 * basis[1] + outside, basis, [tf.ones(2)])
    np.testing.assert_allclose(left, [0, 1], atol=1e-6)
    assert float(left[0]) == 0 and np.all(u[0] == 0)
    np.testing.assert_allclose(u[1], directions[2], atol=1e-6)


@pytest.mark.parametrize("method", estimators.METHODS)
@pytest.mark.parametrize(
    "spectrum",
    [[3.0, 2.0, 1.0, 0.5], [2.0, 2.0, 2.0, 1.0], [5.0], [1.0, 1e-9], [4.0, 4.0 - 1e-9, 1.0]],
    ids=["separate", "repeated", "rank one", "tiny second", "nearly repeated"],
)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_prescribed_spectrum(float64, method, spectrum, shape):
    matrix = with_spectrum(spectrum, *shape)
    x = np.zeros((2, shape[1]))
    t = spectral_norm(linear(matrix), x, method=method, iterations=60 if method == "power" else 6)
    np.testing.assert_allclose(t.sigma, spectrum[0], rtol=1e-7)
    for u, v, sigma, residual in zip(
        *(a.numpy() for a in (t.u, t.v, t.sigma, t.residual)), strict=True
    ):
        assert np.linalg.norm(u) == pytest.approx(1) and np.linalg.norm(v) == pytest.approx(1)
        np.testing.assert_allclose(matrix @ v, sigma * u, atol=1e-9)
        expected = np.linalg.norm(matrix.T @ u - sigma * v)
        assert float(residual) == pytest.approx(expected, abs=1e-9)


def test_exact_under_xla_is_as_right_as_without(float64):
    """XLA's own eigenvectors are right to 1e-6 only."""
    matrices = [np.random.default_rng(n).normal(size=(3, 5)) for n in range(50)]
    network = linear(np.zeros((3, 5)))
    x = np.zeros((1, 5))

    @tf.function(jit_compile=True)
    def compiled(matrix):
        network.weights[0].assign(matrix)
        t = spectral_norm(network, x, method="exact")
        return t.u[0], tf.linalg.eigh(tf.matmul(matrix, matrix, transpose_a=True))[1][:, -1]

    errors, errors_of_xla = [], []
    for matrix in matrices:
        u, of_xla = (a.numpy() for a in compiled(tf.constant(matrix.T)))
        left = np.linalg.svd(matrix)[0][:, 0]
        errors.append(min(np.linalg.norm(u - left), np.linalg.norm(u + left)))
        errors_of_xla.append(min(np.linalg.norm(of_xla - left), np.linalg.norm(of_xla + left)))
    assert max(errors) < 1e-11 < 1e-8 < max(errors_of_xla)


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_some_singular_value_is_within_the_residual(float64, method):
    network = build("many_outputs")
    x = seeded_input((3,), 20)
    values = singular_values(dense_jacobian(network, x))
    for iterations in (1, 2):
        t = spectral_norm(network, x, method=method, iterations=iterations, seed=iterations)
        nearest = np.min(np.abs(values - t.sigma[:, None]), axis=1)
        assert np.all(nearest <= t.residual.numpy() + 1e-12)
        if iterations == 1:
            assert np.max(t.residual) > 1e-3


@pytest.mark.parametrize("method", estimators.METHODS)
def test_zero_network(method):
    network = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Conv2D(2, 2, activation="relu"), layers.Flatten()]
    )
    network.set_weights([np.zeros(w.shape) for w in network.get_weights()])
    x = seeded_input((4, 4, 1))
    t = spectral_norm(network, x, method=method)
    assert np.all(t.sigma.numpy() == 0) and np.all(t.residual.numpy() == 0)
    for vector in (t.u, t.v):
        np.testing.assert_allclose(np.linalg.norm(flat(vector), axis=1), 1, rtol=1e-6)


def test_zero_and_other_examples_side_by_side():
    network = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False), layers.ReLU()])
    network.set_weights([np.float32([[1, 1], [1, 2], [1, 3]])])
    x = np.float32([[1, 1, 1], [-1, -1, -1]])
    for method in estimators.METHODS:
        sigma = spectral_norm(network, x, method=method, iterations=8).sigma
        np.testing.assert_allclose(
            sigma, [np.linalg.norm([[1, 1], [1, 2], [1, 3]], 2), 0], rtol=1e-4
        )


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("method", estimators.METHODS)
def test_scale(method, scale):
    matrix = with_spectrum([3.0, 1.0], 5, 8)
    t = spectral_norm(linear(scale * matrix), np.zeros((1, 8), "float32"), method=method)
    np.testing.assert_allclose(t.sigma, 3 * scale, rtol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("method", estimators.METHODS)
def test_what_cannot_be_measured_is_not_zero(method, jit_compile):
    """NaN, infinite and too large for a square in float32, beside an example that is well."""
    kernel = np.float32([[1, 2, 3], [4, 5, 6], [0, 0, 0]])
    network = keras.Sequential([keras.Input((3,)), layers.Dense(3, use_bias=False), layers.ReLU()])
    x = tf.constant([[1.0, 1, 1], [-1, -1, -1]])  # The second has all its units off.

    @tf.function(jit_compile=jit_compile)
    def measure(x):
        return spectral_norm(network, x, method=method).sigma

    for entry in (np.nan, np.inf, 1e20):
        kernel[2, 0] = entry
        network.set_weights([kernel])
        sigma = measure(x).numpy()
        assert not np.isfinite(sigma[0]), entry
        # 0 times NaN or infinity is NaN.
        assert sigma[1] == 0 or not np.isfinite(entry), entry
    kernel[2, 0] = 0
    network.set_weights([kernel])
    np.testing.assert_allclose(measure(x), [np.linalg.norm(kernel, 2), 0], rtol=1e-2)


def test_seeds():
    network = build("conv_relu")
    x = seeded_input(network.input_shape[1:])

    def sigma(seed):
        return spectral_norm(network, x, method="power", iterations=1, seed=seed).sigma.numpy()

    np.testing.assert_array_equal(sigma(3), sigma(3))
    assert np.all(sigma(3) != sigma(4)) and np.all(sigma(None) != sigma(None))


def test_random_unit_is_uniform_on_the_sphere():
    drawn = vectors.random_unit(tf.zeros((20000, 3)), (1, 2)).numpy()
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-5)
    # Each coordinate of a uniform point on the sphere in three dimensions is uniform in [-1, 1].
    for k in range(3):
        histogram = np.histogram(drawn[:, k], bins=10, range=(-1, 1))[0]
        assert np.all(np.abs(histogram - 2000) < 5 * np.sqrt(1800))
    np.testing.assert_allclose(drawn.T @ drawn / 20000, np.eye(3) / 3, atol=0.015)
    same, other = (vectors.random_unit(tf.zeros((20000, 3)), (1, d)).numpy() for d in (2, 3))
    np.testing.assert_array_equal(same, drawn)
    assert abs(np.mean(np.sum(other * drawn, axis=1))) < 0.02


def test_frobenius_norm(float64):
    network = build("conv_tanh")
    x = seeded_input(network.input_shape[1:])
    expected = np.linalg.norm(dense_jacobian(network, x), axis=(1, 2))
    np.testing.assert_allclose(tfjacreg.frobenius_norm(network, x), expected, rtol=1e-10)
    squares = np.stack(
        [
            tfjacreg.frobenius_norm(network, x, num_projections=3, seed=seed).numpy() ** 2
            for seed in range(60)
        ]
    )
    error = squares.std(axis=0) / np.sqrt(len(squares))
    assert np.all(np.abs(squares.mean(axis=0) - expected**2) < 4 * error)
    assert np.all(error < 0.1 * expected**2)
    a, b = (tfjacreg.frobenius_norm(network, x, num_projections=1, seed=5) for _ in range(2))
    np.testing.assert_array_equal(a, b)


class VariedBatchNorm(layers.BatchNormalization):
    def build(self, input_shape):
        super().build(input_shape)
        self.gamma.assign(np.linspace(-0.5, 0.4, input_shape[self.axis]))
        self.moving_variance.assign(np.geomspace(1e-3, 4, input_shape[self.axis]))


class Lora(layers.Dense):
    """Its kernel is a sum, the second part of which is not 0."""

    def build(self, input_shape):
        super().build(input_shape)
        for weight in self.enable_lora(2) or self.trainable_variables:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))


class Standardized(layers.Conv2D):
    """Weight standardization."""

    def convolution_op(self, inputs, kernel):
        kernel = kernel - keras.ops.mean(kernel, (0, 1, 2))
        spread = keras.ops.std(kernel, (0, 1, 2))
        return super().convolution_op(inputs, kernel / spread)


def doubled(kind, *args):
    """A layer of a class of Keras whose own `call` returns twice what the class returns."""

    class Doubled(kind):
        def call(self, inputs, **options):
            return 2 * super().call(inputs, **options)

    return Doubled(*args)


def quantized(mode):
    network = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    network.layers[0].quantize(mode)
    return network


MAPS = {
    "lora": ((6,), lambda: Lora(4)),
    "dense": ((7,), lambda: layers.Dense(4)),
    "einsum": ((3, 5), lambda: layers.EinsumDense("abc,cd->abd", (None, 4))),
    "conv": ((6, 5, 2), lambda: layers.Conv2D(3, 3)),
    "conv_same": ((6, 5, 2), lambda: layers.Conv2D(3, 3, padding="same")),
    "conv_stride": ((7, 6, 2), lambda: layers.Conv2D(3, 3, strides=2, padding="same")),
    "conv_dilated": ((7, 7, 1), lambda: layers.Conv2D(2, 2, dilation_rate=2)),
    "conv_grouped": ((4, 4, 4), lambda: layers.Conv2D(4, 3, groups=2)),
    "conv1d_causal": ((8, 2), lambda: layers.Conv1D(3, 3, padding="causal")),
    "conv3d": ((4, 4, 3, 1), lambda: layers.Conv3D(2, 2)),
    "conv_dilated_same": ((6, 5, 2), lambda: layers.Conv2D(2, 3, dilation_rate=2, padding="same")),
    "conv_1x1_stride": ((7, 6, 2), lambda: layers.Conv2D(3, 1, strides=2, padding="same")),
    "conv1d_1_stride": ((9, 2), lambda: layers.Conv1D(3, 1, strides=2)),
    "conv1d": ((9, 2), lambda: layers.Conv1D(3, 3, strides=2)),
    "conv1d_causal_dilated": (
        (8, 2),
        lambda: layers.Conv1D(3, 2, padding="causal", dilation_rate=3),
    ),
    "depthwise": ((5, 5, 2), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "depthwise_stride": (
        (6, 6, 2),
        lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"),
    ),
    "depthwise_dilated": ((6, 6, 1), lambda: layers.DepthwiseConv2D(2, dilation_rate=3)),
    "depthwise1d": ((7, 3), lambda: layers.DepthwiseConv1D(3, padding="same")),
    "transposed": ((4, 4, 2), lambda: layers.Conv2DTranspose(2, 3, strides=2, padding="same")),
    "transposed_valid": (
        (3, 4, 2),
        lambda: layers.Conv2DTranspose(3, 2, strides=3, output_padding=1),
    ),
    "transposed_output_padding": (
        (4, 4, 2),
        lambda: layers.Conv2DTranspose(2, 3, strides=2, padding="same", output_padding=0),
    ),
    "transposed1d": ((5, 2), lambda: layers.Conv1DTranspose(3, 3, strides=2)),
    "transposed3d": ((2, 3, 2, 1), lambda: layers.Conv3DTranspose(2, 2, strides=2)),
    "normalization": (
        (3, 2),
        lambda: layers.Normalization(mean=[1.0, 5.0], variance=[1e-2, 4.0]),
    ),
    "rescaling": ((4,), lambda: layers.Rescaling(-3.0, offset=7.0)),
    "batch_norm_axis": ((2, 3), lambda: VariedBatchNorm(axis=1)),
}


@pytest.mark.parametrize("name", MAPS)
def test_layer_norms_are_those_of_the_true_linear_map(float64, name):
    """Against the SVD of the layer's matrix, column by column; the reshaped kernel's is another."""
    shape, make = MAPS[name]
    layer = make()
    network = keras.Sequential([keras.Input(shape), layer])
    n_in = int(np.prod(shape))
    basis = np.eye(n_in).reshape(n_in, *shape)
    matrix = (network(basis) - network(0 * basis)).numpy().reshape(n_in, -1)
    assert tfjacreg.spectral_bound(network) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("dense", "float16"),
        *(
            (name, "bfloat16")
            for name in ("einsum", "conv_stride", "depthwise", "transposed", "batch_norm_axis")
        ),
    ],
)
def test_layer_norms_of_weights_in_half_precision(name, policy):
    """Computed in float32: against the SVD of the same weights' map in float64."""
    shape, make = MAPS[name]
    networks = []
    for dtype in (policy, "float64"):
        keras.config.set_dtype_policy(dtype)
        networks.append(keras.Sequential([keras.Input(shape, dtype=dtype), make()]))
    half, double = networks
    double.set_weights([w.astype("float64") for w in half.get_weights()])
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    matrix = (double(basis) - double(0 * basis)).numpy().reshape(len(basis), -1)
    expected = np.linalg.norm(matrix, 2)
    assert tfjacreg.spectral_bound(half) == pytest.approx(expected, rel=1e-5)
    if name != "batch_norm_axis":
        penalty = tfjacreg.regularizers.SpectralBound(1.0, iterations=30, seed=0)
        value, (state,) = penalty(half, penalty.initial_state(half))
        assert value.dtype == state.dtype == tf.float32
        np.testing.assert_allclose(value, expected**2, rtol=1e-2)


def test_bound_of_a_chain(float64):
    network = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )
    norm = network.layers[1]
    norm.gamma.assign([1.0, -2.0, 0.5, 1.5])
    norm.moving_variance.assign([1.0, 4.0, 0.25, 0.01])
    scale = np.abs([1.0, -2.0, 0.5, 1.5] / np.sqrt(np.array([1.0, 4.0, 0.25, 0.01]) + norm.epsilon))
    first, second = network.layers[0].get_weights()[0], network.layers[2].get_weights()[0]
    expected = np.linalg.norm(first, 2) * scale.max() * np.linalg.norm(second, 2)
    assert tfjacreg.spectral_bound(network) == pytest.approx(expected, rel=1e-8)


def test_the_bound_bounds():
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        network = networks.lenet()
        x = seeded_input((28, 28, 1), 8)
        sigma = spectral_norm(network, x, method="exact").sigma
        assert np.max(sigma) < tfjacreg.spectral_bound(network, iterations=15)


def test_bound_counts_a_layer_as_often_as_it_runs(float64):
    """Also inside a nested network, but not for what other networks do with the same layer."""
    inputs = keras.Input((4,))
    shared, last = layers.Dense(4), layers.Dense(3)
    inner = keras.Model(inputs, shared(layers.ReLU()(shared(inputs))))
    outer = keras.Sequential([keras.Input((4,)), inner, layers.Activation("tanh"), last])
    first, second = (np.linalg.norm(layer.get_weights()[0], 2) for layer in (shared, last))
    assert tfjacreg.spectral_bound(inner) == pytest.approx(first**2, rel=1e-8)
    assert tfjacreg.spectral_bound(outer) == pytest.approx(first**2 * second, rel=1e-8)
    once = keras.Sequential([keras.Input((4,)), shared])
    assert tfjacreg.spectral_bound(once) == pytest.approx(first, rel=1e-8)


def test_bound_of_a_classifier_counts_its_normalization():
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu"), layers.Dense(3)])
    classifier = keras.Sequential(
        [keras.Input((6,)), layers.Normalization(mean=0.3, variance=0.01), network]
    )
    bounds = tfjacreg.spectral_bound(classifier), tfjacreg.spectral_bound(network)
    assert bounds[0] == pytest.approx(10 * bounds[1], rel=1e-4)
    sigma = spectral_norm(classifier, seeded_input((6,), 20), method="exact").sigma
    assert np.max(sigma) < bounds[0]


def branching(merge):
    inputs = keras.Input((4,))
    return keras.Model(inputs, merge(inputs, layers.Dense(4)(inputs)))


def two_outputs():
    inputs = keras.Input((4,))
    x = layers.Dense(4)(inputs)
    return keras.Model(inputs, [x, layers.Dense(2)(x)])


def frozen_gru():
    network = keras.Sequential([keras.Input((3, 2)), layers.GRU(2, name="frozen", use_cudnn=False)])
    network.trainable = False
    return network


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = layers.Dense(2)

    def call(self, x):
        return x + self.dense(x)


SMALL = linear(np.eye(2))
X = np.zeros((1, 2), "float32")
BAD = {
    "method": (lambda: spectral_norm(SMALL, X, method="svd"), "power.*lanczos.*exact.*'svd'"),
    "iterations": (lambda: spectral_norm(SMALL, X, iterations=0), "`iterations` must be .*=0"),
    "iterations_type": (lambda: spectral_norm(SMALL, X, iterations=2.0), "`iterations` .*=2.0"),
    "seed": (lambda: spectral_norm(SMALL, X, seed=-1), "`seed` must be None or .*=-1"),
    "projections": (
        lambda: tfjacreg.frobenius_norm(SMALL, X, num_projections=-1),
        "`num_projections` must be an integer >= 1. Received: num_projections=-1",
    ),
    "bound_iterations": (lambda: tfjacreg.spectral_bound(SMALL, iterations=0), "`iterations`"),
    "branches": (
        lambda: tfjacreg.spectral_bound(
            branching(lambda a, b: layers.Add(name="skip")([a, b])),
        ),
        "branches.*'skip'.*2 inputs",
    ),
    "branches_by_an_operator": (
        lambda: tfjacreg.spectral_bound(branching(lambda a, b: a + b)),
        "branches.*'add.*' .Add. with 2 inputs",
    ),
    "branches_to_two_outputs": (lambda: tfjacreg.spectral_bound(two_outputs()), "2 outputs"),
    "operation": (
        lambda: tfjacreg.spectral_bound(branching(lambda _, b: 3.0 * b)),
        "not a Keras layer.*'multiply.*' .Multiply.",
    ),
    "frozen_unknown_layer": (
        lambda: tfjacreg.spectral_bound(frozen_gru()),
        "linear map of this layer is not known.*'frozen' .GRU.",
    ),
    "subclassed": (lambda: tfjacreg.spectral_bound(Subclassed()), "keras.Input.*'own'"),
    "unknown_layer": (
        lambda: tfjacreg.spectral_bound(
            keras.Sequential([keras.Input((3, 2)), layers.GRU(2, name="recurrent")])
        ),
        "linear map of this layer is not known.*'recurrent' .GRU.",
    ),
    **{
        f"own_{name}": (
            lambda make=make: tfjacreg.spectral_bound(
                keras.Sequential([keras.Input((4, 4, 2)), make()])
            ),
            "linear map of this layer is not known.*Received",
        )
        for name, make in {
            "convolution_op": lambda: Standardized(3, 3),
            "call": lambda: doubled(layers.Dense, 3),
            "call_of_batch_norm": lambda: doubled(layers.BatchNormalization),
            "call_of_rescaling": lambda: doubled(layers.Rescaling, 1.0),
        }.items()
    },
    **{
        mode: (
            lambda mode=mode: tfjacreg.spectral_bound(quantized(mode)),
            "linear map of this layer is not known.*a quantized one.*Received",
        )
        for mode in ("int8", "float8")
    },
    "unbuilt": (
        lambda: tfjacreg.spectral_bound(keras.Sequential([layers.Dense(2)])),
        "keras.Input.*no known input",
    ),
    "unknown_size": (
        lambda: tfjacreg.spectral_bound(
            keras.Sequential([keras.Input((None, None, 1)), layers.Conv2D(1, 3)])
        ),
        "size of its input",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
