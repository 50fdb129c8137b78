"""A callback that measures sigma during training."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import arguments, estimators, norms, signature
from tfjacreg.model import RegularizedModel

# Points measured at a time: every batch has this size, so that the measurement is traced once.
_BATCH = 128


class SpectralNormMonitor(keras.callbacks.Callback):
    """Measures `||df/dx||_2` at points of your choice at the end of epochs, in inference mode.

    Adds `val_sigma_mean`, `val_sigma_median`, `val_sigma_q95` (95 % of the points have a smaller
    sigma) and `val_sigma_max` to the logs of the epoch. Callbacks that come later in the list find
    them there: `CSVLogger`, `TensorBoard`, `ModelCheckpoint`,
    `EarlyStopping(monitor="val_sigma_max", mode="min")` (Keras does not know that less is better).
    Between two measurements the logs repeat the last one.

    Args:
        x: What the network takes, `[P, *in]` (or a list, tuple or dict), in the network's own
            units, as for `spectral_norm`.
        method: `"power"`, `"lanczos"` or `"exact"`; see `norms.spectral_norm`.
        iterations: The N of Algorithm 1, or the number of Lanczos steps.
        every: Measure in the first epoch and in every `every`-th epoch after it.
        input: The floating input that the Jacobian is taken with respect to; see
            `JacobianOperator`.
        output: The output that the Jacobian is taken of, likewise.

    Raises:
        TypeError: If `x` holds no real numbers or a ragged tensor, or `input` or `output` is not a
            position, key or name.
        ValueError: If an argument is out of range or `x` holds no point.
    """

    def __init__(
        self,
        x: Any,
        method: str = "lanczos",
        iterations: int = 8,
        every: int = 1,
        input: signature.Name = None,
        output: signature.Name = None,
    ) -> None:
        super().__init__()
        self.method = arguments.one_of("method", method, estimators.METHODS)
        self.iterations = arguments.unrolled_count("iterations", iterations)
        self.every = arguments.positive_integer("every", every)
        signature.refuse_ragged(keras.tree.flatten(x))
        self.x = keras.tree.map_structure(lambda t: None if t is None else np.asarray(t), x)
        leaves = [leaf for leaf in keras.tree.flatten(self.x) if leaf is not None]
        sizes = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                "`x` must hold at least one point along the first axis of every tensor, and the "
                f"same number in each. Received: tensors of {sorted(sizes)} points"
            )
        # Beside the input of the Jacobian there may be strings.
        numbers = [leaf for leaf in leaves if not _is_text(leaf)]
        if not numbers or any(leaf.dtype.kind in "cO" for leaf in numbers):
            kinds = sorted({str(leaf.dtype) for leaf in leaves})
            raise TypeError(f"`x` must hold real numbers. Received: tensors of dtype {kinds}")
        (self._points,) = sizes
        signature.check_name("input", input)
        signature.check_name("output", output)
        self._of: dict[str, Any] = {"input": input, "output": output}
        self._sigma: Any = None
        self._first: int | None = None
        self._last: dict[str, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Makes the function that measures a batch on the network that is being trained."""
        self._first = None
        network = self.model.network if isinstance(self.model, RegularizedModel) else self.model
        self._sigma = tf.function(
            lambda x: (
                norms.spectral_norm(
                    network, x, method=self.method, iterations=self.iterations, **self._of
                ).sigma
            ),
            autograph=False,
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures if it is due, and adds the result to the logs of the epoch."""
        if self._first is None:
            self._first = epoch
        if (epoch - self._first) % self.every == 0:
            sigma = self.measure()
            self._last = {
                "val_sigma_mean": float(np.mean(sigma)),
                "val_sigma_median": float(np.median(sigma)),
                "val_sigma_q95": float(np.quantile(sigma, 0.95)),
                "val_sigma_max": float(np.max(sigma)),
            }
        if logs is not None:
            logs.update(self._last)

    def measure(self) -> np.ndarray:
        """Measures sigma at every point, `[P]`, NumPy."""
        size = min(_BATCH, self._points)
        found = []
        for start in range(0, self._points, size):
            # The last batch is filled up with points from the beginning.
            rows = np.arange(start, start + size) % self._points
            batch = keras.tree.map_structure(
                lambda leaf, rows=rows: None if leaf is None else tf.constant(leaf[rows]), self.x
            )
            found.append(self._sigma(batch).numpy())
        return np.concatenate(found)[: self._points]


def _is_text(leaf: np.ndarray) -> bool:
    """Whether an array holds strings, which TensorFlow's are as objects."""
    return leaf.dtype.kind in "SU" or (
        leaf.dtype.kind == "O" and all(isinstance(one, bytes | str) for one in leaf.flat)
    )
