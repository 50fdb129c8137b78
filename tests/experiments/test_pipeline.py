"""The batches that a run trains on: their order, and crops and flips."""

import numpy as np
import tensorflow as tf

from tfjacreg.experiments import pipeline


def test_every_epoch_has_its_own_order_and_all_examples():
    x = np.arange(50, dtype="float32").reshape(50, 1, 1, 1)
    y = np.arange(50, dtype="int32")
    epoch = tf.Variable(0, dtype=tf.int64)
    batches = pipeline.training_batches(x, y, 16, 3, epoch, augment=False)
    orders = []
    for number in (0, 1, 0):
        epoch.assign(number)
        seen = list(batches.as_numpy_iterator())
        assert [len(labels) for _, labels in seen] == [16, 16, 16, 2]
        orders.append(np.concatenate([labels for _, labels in seen]))
        np.testing.assert_array_equal(
            np.concatenate([images.ravel() for images, _ in seen]), orders[-1]
        )
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert np.any(orders[0] != orders[1]) and np.all(orders[0] == orders[2])


def test_augmentation_crops_and_flips():
    """Every augmented image is one of the 81 crops of the padded image, mirrored or not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6, 5, 2)).astype("float32")
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    epoch = tf.Variable(0, dtype=tf.int64)
    batches = pipeline.training_batches(x, np.arange(64), 64, 3, epoch, augment=True)
    images, labels = next(batches.as_numpy_iterator())
    found = set()
    for image, label in zip(images, labels, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(padded[label, top : top + 6, left : left + 5][:, ::flip], image)
        ]
        assert matches
        found.add(matches[0])
    assert len({t for t, _, _ in found}) > 5 and len({left for _, left, _ in found}) > 5
    assert {flip for _, _, flip in found} == {1, -1}
    epoch.assign(1)
    assert np.any(next(batches.as_numpy_iterator())[0] != images)
