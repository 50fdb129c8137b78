"""What the attacks and the robustness measures share."""

import numpy as np
import pytest
import tensorflow as tf

from tfjacreg.judging.classifiers import scaled_margin


@pytest.mark.parametrize("factor", [1, 300, 1e-3])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_margin_is_scaled_as_in_the_dlr_loss(classes, factor):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, classes)), rng.integers(0, classes, 50)
    ranked = -np.sort(-logits, axis=1)
    own = logits[np.arange(50), labels]
    other = np.where(own == ranked[:, 0], ranked[:, 1], ranked[:, 0])
    expected = (own - other) / (ranked[:, 0] - ranked[:, min(2, classes - 1)])
    found = scaled_margin(labels, tf.constant(factor * logits, tf.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
