"""The common form of the peers in `peers.py`, and the process that runs the peers of a framework.

It imports nothing of tfjacreg: the other frameworks have an environment of their own.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FACTOR = 0.01
RATE, MOMENTUM = 1e-5, 0.8
# Of LeNet, in the order in which the file of the weights has them.
WEIGHTS = tuple(
    f"{layer}_{kind}"
    for layer in ("conv1", "conv2", "dense1", "dense2", "logits")
    for kind in ("kernel", "bias")
)


class Peer(NamedTuple):
    """One way to train LeNet on the first images of a file.

    Attributes:
        step: Takes one training step; returns the loss, not waited for.
        wait: Waits for a loss, and returns it as a number.
        estimate: The penalty's estimate for each example, at one draw of its random vectors; None
            where there is no penalty.
    """

    step: Callable[[], Any]
    wait: Callable[[Any], float]
    estimate: Callable[[int], np.ndarray] | None = None


def read(path: Path, batch: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The weights by name, in Keras' layout, images `[batch, 28, 28, 1]` and labels."""
    with np.load(path) as content:
        return {n: content[n] for n in WEIGHTS}, content["x"][:batch], content["y"][:batch]


def serve(makers: dict[str, Callable[[Path, int], Peer]], versions: dict[str, str]) -> None:
    """Answers each line of JSON on the input with one on the output.

    A line is the file, the batch size, the name of a peer and what it is to do: a number of steps,
    whose seconds are the answer, or the draws of estimates.
    """
    peers: dict[tuple[str, int, str], Peer] = {}
    answers = sys.stdout
    sys.stdout = sys.stderr  # What a framework prints is no answer.
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        path, batch, name, what, number = json.loads(line)
        key = path, batch, name
        if key not in peers:
            peers[key] = makers[name](Path(path), batch)
        peer = peers[key]
        if what == "steps":
            found: Any = seconds(peer, number)
        elif peer.estimate is None:
            found = None
        else:
            found = [peer.estimate(draw).tolist() for draw in range(number)]
        print(json.dumps(found), file=answers, flush=True)


def seconds(peer: Peer, steps: int) -> float:
    """The mean seconds of several steps in a row, waiting only for the last."""
    start = time.perf_counter()
    for _ in range(steps):
        loss = peer.step()
    peer.wait(loss)
    return (time.perf_counter() - start) / steps
