"""Watching sigma while a network is trained."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import arguments, estimators, norms, signature

# Points that are measured at a time: every batch has this size, so that it is traced once.
_BATCH = 128


class SpectralNormMonitor(keras.callbacks.Callback):
    """Measures `||df/dx||_2` on points of your choice at the end of an epoch, in inference mode.

    Adds to the epoch's logs `val_sigma_mean`, `val_sigma_median`, `val_sigma_q95` (the quantile
    that 95 % of the points lie below) and `val_sigma_max`. Callbacks that follow it in the list
    find them there: `CSVLogger`, `TensorBoard`, `ModelCheckpoint`,
    `EarlyStopping(monitor="val_sigma_max", mode="min")` (Keras does not know that less is better).
    Between two measurements the logs repeat the last one.

    Args:
        x: What the network takes, `[P, *in]` (or a list, tuple or dict), in the network's own
            units, as for `spectral_norm`.
        method: `"power"`, `"lanczos"` or `"exact"`; see `norms.spectral_norm`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
        every: Measure in the first epoch and in every `every`-th after it.
        input: Which floating input the Jacobian is taken in; see `JacobianOperator`.
        output: Which output it is of, likewise.

    Raises:
        TypeError: If `x` holds no real numbers, or a ragged tensor.
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
        self.x = keras.tree.map_structure(np.asarray, x)
        sizes = {len(leaf) if leaf.ndim else 0 for leaf in keras.tree.flatten(self.x)}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                "`x` must hold at least one point along the first axis of every tensor, and as "
                f"many in each. Received: tensors of {sorted(sizes)} points"
            )
        if any(leaf.dtype.kind in "cOSU" for leaf in keras.tree.flatten(self.x)):
            kinds = sorted({str(leaf.dtype) for leaf in keras.tree.flatten(self.x)})
            raise TypeError(f"`x` must hold real numbers. Received: tensors of dtype {kinds}")
        (self._points,) = sizes
        signature.check_name("input", input)
        signature.check_name("output", output)
        self._of: dict[str, Any] = {"input": input, "output": output}
        self._sigma: Any = None
        self._last: dict[str, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Makes the function that measures a batch, of the network that is trained now."""
        network = getattr(self.model, "network", self.model)
        self._sigma = tf.function(
            lambda x: (
                norms.spectral_norm(
                    network, x, method=self.method, iterations=self.iterations, **self._of
                ).sigma
            ),
            autograph=False,
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures, and adds what it finds to the epoch's logs."""
        if epoch % self.every == 0 or not self._last:
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
        """Sigma of every point, `[P]`."""
        size = min(_BATCH, self._points)
        found = []
        for start in range(0, self._points, size):
            # The last batch is filled up with points that were measured already.
            rows = np.arange(start, start + size) % self._points
            batch = keras.tree.map_structure(
                lambda leaf, rows=rows: tf.constant(leaf[rows]), self.x
            )
            found.append(self._sigma(batch).numpy())
        return np.concatenate(found)[: self._points]
