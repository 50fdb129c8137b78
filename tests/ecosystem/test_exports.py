"""ONNX and LiteRT files of a model: the network's own names, dtypes and outputs."""

import keras
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

from tfjacreg import RegularizedModel

RNG = np.random.default_rng(0)
X = {
    "code": RNG.integers(0, 3, (5, 1)).astype("int32"),
    "img": RNG.normal(size=(5, 6)).astype("float32"),
}


def wrapped():
    image, code = keras.Input((6,), name="img"), keras.Input((1,), dtype="int32", name="code")
    words = layers.Flatten()(layers.Embedding(3, 2)(code))
    hidden = layers.Concatenate()([layers.Dense(4, "tanh")(image), words])
    network = keras.Model({"code": code, "img": image}, layers.Dense(3, name="logits")(hidden))
    return RegularizedModel(network, "spectral", input="img")


# The exporters' own: an alias of NumPy that is gone, and what the converters call.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
class TestExport:
    def test_onnx(self, tmp_path):
        model = wrapped()
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        kinds = {put.name: put.type for put in session.get_inputs()}
        assert kinds == {"code": "tensor(int32)", "img": "tensor(float)"}
        (found,) = session.run(None, X)
        np.testing.assert_allclose(found, model.predict(X, verbose=0), atol=1e-6)

    def test_litert(self, tmp_path):
        model = wrapped()
        model.export(tmp_path / "model.tflite", format="litert", verbose=False)
        interpreter = Interpreter(str(tmp_path / "model.tflite"))
        runner = interpreter.get_signature_runner()
        assert {n: put["dtype"] for n, put in runner.get_input_details().items()} == {
            "code": np.int32,
            "img": np.float32,
        }
        (found,) = runner(**X).values()
        np.testing.assert_allclose(found, model.predict(X, verbose=0), atol=1e-6)
