"""The tangents that operations have by rules of our own: their values, and what they cost."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import operations, product_by_first_derivatives, seeded_input, slope
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import forwardprop

from tfjacreg import JacobianOperator, RegularizedModel, networks, regularizers
from tfjacreg.rewrites import tangents

RAW = tf.raw_ops
POINT = np.array([[0.6, -0.7, 1.3, 0.4], [-1.2, 0.9, 0.5, -0.3]])


def image(x):
    """Eight numbers as two images of 2x2 pixels and three channels."""
    return tf.reshape(tf.stack([x, 2 * x, x * x], -1), (-1, 2, 2, 3))


def volume(x):
    return image(x)[:, tf.newaxis]


def split(x):
    first, second = tf.split(x, 2, -1)
    return first * second


def split_by_sizes(x):
    first, second = tf.split(x, [1, 3], -1)
    return first * second


def unstacked(x):
    first, second, *_ = tf.unstack(x, axis=1)
    return first * second


KERNEL = np.random.default_rng(0).normal(size=(2, 2, 3, 3))

# A function of x that calls the operation, with both factors of a product a function of x.
OF_X = {
    "Add": lambda x: RAW.Add(x=x, y=x[:, :1]),
    "AddN": lambda x: tf.add_n([x, x * x, tf.ones_like(x)]),
    "AddV2": lambda x: tf.ones((3, 1, 4), x.dtype) + x[0] + x,
    "AvgPool": lambda x: tf.nn.avg_pool2d(image(x), 2, 1, "SAME"),
    # In single precision alone.
    "AvgPool3D": lambda x: tf.cast(
        tf.nn.avg_pool3d(tf.cast(volume(x), "float32"), [1, 2, 1], 1, "SAME"), x.dtype
    ),
    "BatchMatMul": lambda x: RAW.BatchMatMul(x=image(x), y=image(x), adj_x=True),
    "BatchMatMulV2": lambda x: tf.matmul(image(x), image(x), transpose_b=True),
    "BatchMatMulV3": lambda x: RAW.BatchMatMulV3(x=image(x), y=image(x), Tout=x.dtype, adj_y=True),
    "BatchToSpaceND": lambda x: tf.batch_to_space(image(x), [2, 1], [[0, 0], [0, 1]]),
    "BiasAdd": lambda x: tf.nn.bias_add(x, x[0] * x[1]),
    "BroadcastTo": lambda x: tf.broadcast_to(x[:, tf.newaxis], (2, 3, 4)),
    "Cast": lambda x: tf.cast(tf.cast(x, "float32"), x.dtype),
    "ConcatV2": lambda x: tf.concat([x, tf.ones_like(x), x * x], axis=1),
    "Conv2D": lambda x: tf.nn.conv2d(image(x), KERNEL * x[0, 0], [1, 2], "SAME"),
    "Conv2DBackpropInput": lambda x: tf.nn.conv2d_transpose(
        image(x), KERNEL * x[0, 0], (2, 4, 4, 3), 2
    ),
    "Conv3D": lambda x: tf.nn.conv3d(volume(x), KERNEL[None] * x[0, 0], [1] * 5, "SAME"),
    "Conv3DBackpropInputV2": lambda x: tf.nn.conv3d_transpose(
        volume(x), KERNEL[None] * x[0, 0], (2, 1, 4, 4, 3), [1, 1, 2, 2, 1]
    ),
    "Cumsum": lambda x: tf.cumsum(x, 1, exclusive=True, reverse=True),
    "DepthToSpace": lambda x: tf.nn.depth_to_space(tf.concat([image(x)] * 4, -1), 2),
    "DepthwiseConv2dNative": lambda x: tf.nn.depthwise_conv2d(
        image(x), KERNEL * x[0, 0], [1, 1, 1, 1], "SAME"
    ),
    "DepthwiseConv2dNativeBackpropInput": lambda x: tf.nn.depthwise_conv2d_backprop_input(
        (2, 2, 2, 3), KERNEL[..., :1] * x[0, 0], image(x), [1, 1, 1, 1], "SAME"
    ),
    "Einsum": lambda x: tf.einsum("bhwc,bhvc->bwv", image(x), image(x)),
    "Elu": tf.nn.elu,
    "Erf": tf.math.erf,
    "Erfc": tf.math.erfc,
    "Exp": tf.exp,
    "ExpandDims": lambda x: tf.expand_dims(x, 1),
    "GatherNd": lambda x: tf.gather_nd(x, [[0, 1], [1, 3], [0, 1]]),
    "GatherV2": lambda x: tf.gather(x, [3, 0, 0], axis=1),
    "Identity": tf.identity,
    "IdentityN": lambda x: tf.identity_n([x, x * x])[1],
    "LeakyRelu": lambda x: tf.nn.leaky_relu(x, 0.3),
    "Log": lambda x: tf.math.log(x * x),
    "LogSoftmax": tf.nn.log_softmax,
    "MatMul": lambda x: tf.matmul(x, x, transpose_a=True),
    "Mean": lambda x: tf.reduce_mean(image(x), [1, 2], keepdims=True),
    "MirrorPad": lambda x: tf.pad(x, [[0, 0], [1, 2]], "REFLECT"),
    "Mul": lambda x: x * x[:, :1],
    "Neg": lambda x: -x,
    "Pack": lambda x: tf.stack([x, tf.ones_like(x), x * x], axis=1),
    "Pad": lambda x: tf.pad(x, [[0, 0], [1, 2]]),
    "PadV2": lambda x: tf.pad(x, [[0, 0], [1, 2]], constant_values=3.0),
    "RealDiv": lambda x: (x / x[:, :1]) + 2 / x,
    "Relu": tf.nn.relu,
    "Relu6": lambda x: tf.nn.relu6(7 * x),
    "Reshape": lambda x: tf.reshape(x, (4, 2)),
    "ReverseV2": lambda x: tf.reverse(x, [1]),
    "Roll": lambda x: tf.roll(x, 1, 1),
    "Rsqrt": lambda x: tf.math.rsqrt(x * x),
    "Select": lambda x: RAW.Select(condition=x > 0, x=x * x, y=x),
    "SelectV2": lambda x: tf.where(x > 0, x * x, 1.0),
    "Selu": tf.nn.selu,
    "Sigmoid": tf.sigmoid,
    "Slice": lambda x: tf.slice(x, [0, 1], [2, 2]),
    "Softmax": tf.nn.softmax,
    "Softplus": tf.nn.softplus,
    "Softsign": tf.nn.softsign,
    "SpaceToBatchND": lambda x: tf.space_to_batch(image(x), [2, 1], [[0, 0], [0, 0]]),
    "SpaceToDepth": lambda x: tf.nn.space_to_depth(image(x), 2),
    "Split": split,
    "SplitV": split_by_sizes,
    "Sqrt": lambda x: tf.sqrt(x * x),
    "Square": tf.square,
    "SquaredDifference": lambda x: (
        tf.math.squared_difference(x, x[:, :1])
        + tf.math.squared_difference(x, 1.0)
        + tf.math.squared_difference(tf.ones_like(x), x)
    ),
    "Squeeze": lambda x: tf.squeeze(x[:, tf.newaxis, :1], 1),
    "StridedSlice": lambda x: x[::-1, 1:3, tf.newaxis],
    "Sub": lambda x: (x - 1.0) + (1.0 - x[:, :1]) + (x - x * x),
    "Sum": lambda x: tf.reduce_sum(image(x), [1, 2]),
    "Tanh": tf.tanh,
    "Tile": lambda x: tf.tile(x, [1, 2]),
    "Transpose": lambda x: tf.transpose(x),
    "Unpack": unstacked,
}
# The same functions in double precision.
IN_DOUBLE = {
    "AvgPool3D": lambda x: tf.nn.avg_pool2d(image(x), [2, 1], 1, "SAME"),
    "Cast": tf.identity,
}


class Shifted(layers.Layer):
    """A function of the input and a weight for each element; all examples are one.

    The tangent of their sum does not depend on the weight: what its derivative is a function of has
    to be known to the tape itself.
    """

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.shift = self.add_weight(shape=POINT.shape, initializer="zeros")

    def call(self, x):
        x = tf.reshape(x, POINT.shape) + self.shift
        return tf.reshape(self.function(x), (1, -1))


@pytest.fixture
def asked(monkeypatch):
    """How often each rule was followed, and each operation left to TensorFlow."""
    ours, theirs = collections.Counter(), collections.Counter()

    def counted(name, rule):
        def follow(op):
            ours[name] += 1
            return rule(op)

        return follow

    helper = forwardprop._jvp_helper

    def left(name, *args):
        theirs[name] += 1
        return helper(name, *args)

    monkeypatch.setattr(
        tangents, "RULES", {name: counted(name, rule) for name, rule in tangents.RULES.items()}
    )
    monkeypatch.setattr(forwardprop, "_jvp_helper", left)
    return ours, theirs


def test_every_rule_is_tested():
    assert tangents.IS_REGISTERED
    assert set(OF_X) == set(tangents.RULES)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("name", OF_X)
def test_a_rule_against_differences(float64, asked, name, in_graph):
    """J v against differences of the values, and the gradients of `<u, J v>` against those of J v
    by TensorFlow's reverse mode."""
    network, oracle = Shifted(OF_X[name]), Shifted(IN_DOUBLE.get(name, OF_X[name]))
    x = tf.constant(POINT.reshape(1, -1))
    v = tf.constant(np.random.default_rng(1).normal(size=x.shape))
    size = network(x).shape
    u = tf.constant(np.random.default_rng(2).normal(size=size))
    weights = oracle.trainable_weights

    def of_the_pass(x):
        with tf.GradientTape() as tape:
            op = JacobianOperator(network, x, tangent=v)
            total = tf.reduce_sum(u * op.tangent_out)
        zero = tf.UnconnectedGradients.ZERO
        return op.tangent_out, tape.gradient(total, network.shift.value, unconnected_gradients=zero)

    product, gradient = (tf.function(of_the_pass) if in_graph else of_the_pass)(x)
    ours, _ = asked
    assert ours[name]
    step = 1e-6
    values = [oracle(x + sign * step * v).numpy() for sign in (1, -1)]
    expected = (values[0] - values[1]) / (2 * step)
    tolerance = 1e-6 if name in IN_DOUBLE else 1e-8
    np.testing.assert_allclose(product, expected, rtol=tolerance, atol=tolerance)
    along = np.random.default_rng(3).normal(size=weights[0].shape)
    wanted = slope(lambda: product_by_first_derivatives(oracle, x, u, v), weights, [along])
    assert abs(np.sum(gradient * along) - wanted) < 1e-6 * max(1, abs(wanted))


IMAGE = (8, 8, 4)
# Operations in the traced pass with a tangent: each once for the values, and once for the tangent.
LAYERS = {
    "Dense": ((4,), lambda: layers.Dense(3), {"MatMul": 2}),
    "Dense of a sequence": ((5, 4), lambda: layers.Dense(3, "gelu"), {}),
    "EinsumDense": ((5, 4), lambda: layers.EinsumDense("abc,cd->abd", (5, 3)), {}),
    "Conv1D": ((8, 4), lambda: layers.Conv1D(3, 3, padding="causal"), {"Conv2D": 2}),
    "Conv2D": (IMAGE, lambda: layers.Conv2D(3, 3, activation="relu"), {"Conv2D": 2}),
    "Conv2D, dilated": (IMAGE, lambda: layers.Conv2D(3, 3, dilation_rate=2), {"Conv2D": 2}),
    "Conv2D, depthwise groups": (
        IMAGE,
        lambda: layers.Conv2D(4, 3, groups=4),
        {"DepthwiseConv2dNative": 2},
    ),
    "Conv2D, groups": (IMAGE, lambda: layers.Conv2D(4, 3, groups=2), {"Conv2D": 4}),
    "Conv3D": ((4, 4, 4, 2), lambda: layers.Conv3D(3, 2), {"Conv3D": 2}),
    "Conv1DTranspose": ((8, 4), lambda: layers.Conv1DTranspose(3, 3), {"Conv2DBackpropInput": 2}),
    "Conv2DTranspose": (
        IMAGE,
        lambda: layers.Conv2DTranspose(3, 3, strides=2),
        {"Conv2DBackpropInput": 2},
    ),
    "Conv3DTranspose": (
        (4, 4, 4, 2),
        lambda: layers.Conv3DTranspose(3, 2),
        {"Conv3DBackpropInputV2": 2},
    ),
    "DepthwiseConv1D": ((8, 4), lambda: layers.DepthwiseConv1D(3), {"DepthwiseConv2dNative": 2}),
    "DepthwiseConv2D": (IMAGE, lambda: layers.DepthwiseConv2D(3), {"DepthwiseConv2dNative": 2}),
    "SeparableConv1D": (
        (8, 4),
        lambda: layers.SeparableConv1D(3, 3),
        {"DepthwiseConv2dNative": 2, "Conv2D": 2},
    ),
    "SeparableConv2D": (
        IMAGE,
        lambda: layers.SeparableConv2D(3, 3),
        {"DepthwiseConv2dNative": 2, "Conv2D": 2},
    ),
    "AveragePooling2D": (IMAGE, lambda: layers.AveragePooling2D(2), {"AvgPool": 2}),
    "AveragePooling3D": ((4, 4, 4, 2), lambda: layers.AveragePooling3D(2), {"AvgPool3D": 2}),
    "GlobalAveragePooling2D": (IMAGE, layers.GlobalAveragePooling2D, {"Mean": 2}),
    "MaxPooling2D": (IMAGE, lambda: layers.MaxPooling2D(2), {"MaxPool": 1, "AvgPool": 2}),
    "MaxPooling2D, overlapping": (IMAGE, lambda: layers.MaxPooling2D(3, 2), {"AddN": 2}),
    "BatchNormalization": (IMAGE, layers.BatchNormalization, {"Rsqrt": 1}),
    "LayerNormalization": ((5, 4), layers.LayerNormalization, {"Rsqrt": 2, "RsqrtGrad": 1}),
    "UpSampling2D": (IMAGE, lambda: layers.UpSampling2D(2, interpolation="bilinear"), {"AddN": 4}),
    "UpSampling2D, nearest": (IMAGE, lambda: layers.UpSampling2D(2), {}),
    "Resizing": (IMAGE, lambda: layers.Resizing(5, 6), {"AddN": 4}),
    "ZeroPadding2D": (IMAGE, lambda: layers.ZeroPadding2D(1), {"Pad": 2}),
    "Cropping2D": (IMAGE, lambda: layers.Cropping2D(1), {"StridedSlice": 2}),
    "Attention": ((5, 4), lambda: attention((5, 4)), {"Einsum": 6, "BatchMatMulV2": 8}),
    "LSTM, unrolled": ((2, 3), lambda: layers.LSTM(4, unroll=True), {"MatMul": 7}),
}


def attention(shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layers.MultiHeadAttention(2, 3)(inputs, inputs))


PRODUCTS = {name for name in tangents.RULES if "Conv" in name or "Mat" in name} | {"Einsum"}


@pytest.mark.parametrize("name", LAYERS)
def test_no_product_with_a_zero_tangent(asked, name):
    """Nothing is left to TensorFlow, and each operation comes twice: for the values and for J v."""
    shape, layer, expected = LAYERS[name]
    network = keras.Sequential([keras.Input(shape), layer()])
    spec = tf.TensorSpec((2, *shape))

    def forward(x, v):
        op = JacobianOperator(network, x, training=True, tangent=v)
        return op.primal, op.tangent_out

    def plain(x):
        return network(x, training=True)

    found, once = operations(forward, spec, spec), operations(plain, spec)
    assert not asked[1]
    assert not any("Call" in kind for kind in found)
    for kind, count in expected.items():
        assert found[kind] == count, found
    if not network.layers[0].name.startswith(("conv2d", "functional", "lstm")):
        for kind in PRODUCTS & set(once):
            assert found[kind] == 2 * once[kind]


def lenet_step(forward_mode):
    keras.utils.set_random_seed(0)
    penalty = regularizers.SpectralNorm(0.01, seed=0, forward_mode=forward_mode)
    model = RegularizedModel(networks.get("lenet", (28, 28, 1), 10), penalty)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    data = tf.constant(seeded_input((28, 28, 1), 4)), tf.constant([1, 2, 3, 4])
    return model, data


KINDS = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul")


def test_the_products_of_a_training_step(asked):
    """LeNet, one iteration: no more products than the transposed step has, of any kind."""
    found = {}
    for forward_mode in ("accumulator", "transpose"):
        model, data = lenet_step(forward_mode)
        counted = operations(model.train_step, data)
        found[forward_mode] = tuple(counted[kind] for kind in KINDS)
        assert not any("PartitionedCall" in kind for kind in counted)
    assert found == {"accumulator": (7, 2, 4, 20), "transpose": (7, 2, 4, 20)}
    assert not asked[1]


def test_where_tensorflow_does_not_ask(monkeypatch):
    """The present way is taken where there is no way to be asked: the same weights to rounding."""
    stepped = {}
    for rules in (tangents.RULES, {}):
        monkeypatch.setattr(tangents, "RULES", rules)
        model, data = lenet_step("accumulator")
        logs = tf.function(model.train_step)(data)
        stepped[bool(rules)] = [*(float(v) for v in logs.values()), *model.network.get_weights()]
    for ours, theirs in zip(stepped[True], stepped[False], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(pywrap_tfe, "TFE_Py_RegisterJVPFunction"), (forwardprop, "_jvp_dispatch")],
)
def test_a_tensorflow_without_these_names(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    assert not tangents._register()


def test_other_accumulators_are_left_alone(asked):
    """Outside of a pass, around one, and in a layer of one: each has its own tangents."""
    x, v = tf.constant([[0.3, 0.7]]), tf.constant([[1.0, 2.0]])

    def around(x, v):
        with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
            y = tf.tanh(x) * x
        return accumulator.jvp(y)

    expected = v * ((1 - tf.tanh(x) ** 2) * x + tf.tanh(x))
    np.testing.assert_allclose(around(x, v), expected, rtol=1e-6)
    assert not asked[0]

    class Slope(layers.Layer):
        def call(self, x):
            return around(x, v)

    with tf.autodiff.ForwardAccumulator(x, v) as outer:
        op = JacobianOperator(Slope(), x, tangent=2 * v)
    derivative = v * (2 * (1 - tf.tanh(x) ** 2) * (1 - x * tf.tanh(x)))
    np.testing.assert_allclose(op.primal, expected, rtol=1e-6)
    np.testing.assert_allclose(op.tangent_out, 2 * v * derivative, rtol=1e-5)
    np.testing.assert_allclose(outer.jvp(op.primal), v * derivative, rtol=1e-5)


def test_an_unreached_layer_has_no_tangent():
    """A branch that depends on a second input alone: its products are not computed again."""
    first, second = keras.Input((3,), name="first"), keras.Input((5,), name="second")
    joined = layers.Dense(4)(first) + layers.Dense(4)(second)
    network = keras.Model([first, second], layers.Dense(2)(joined))
    x = [tf.TensorSpec((2, 3)), tf.TensorSpec((2, 5))]

    def forward(first, second):
        op = JacobianOperator(network, [first, second], tangent=first, input=0)
        return op.primal, op.tangent_out

    assert operations(forward, *x)["MatMul"] == 5
