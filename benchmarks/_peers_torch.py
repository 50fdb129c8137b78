"""LeNet in PyTorch: plain, with Algorithm 1 (N = 1) in two ways, and with other penalties."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import _peers
import numpy as np
import torch
from torch import nn
from torch.nn import functional

# The logits and the estimate of every example, or None.
Penalized = Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def lenet(weights: dict[str, np.ndarray]) -> nn.Module:
    """The network, with Keras' weights: kernels HWIO, and the flattened image HWC."""
    network = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    arrays = []
    for name in _peers.WEIGHTS:
        array = weights[name]
        if name == "dense1_kernel":
            array = array.reshape(5, 5, 16, 120).transpose(2, 0, 1, 3).reshape(400, 120)
        if name.startswith("conv") and array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        arrays.append(torch.from_numpy(np.ascontiguousarray(array)))
    with torch.no_grad():
        for parameter, array in zip(network.parameters(), arrays, strict=True):
            parameter.copy_(array)
    return network


def unit(a: torch.Tensor) -> torch.Tensor:
    """Each example divided by its length."""
    return a / a.flatten(1).norm(dim=1).reshape(-1, *[1] * (a.ndim - 1))


def lengths(a: torch.Tensor) -> torch.Tensor:
    """`[B, ...]` to `[B]`."""
    return a.flatten(1).norm(dim=1)


def plain(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """No penalty."""
    return network(x), None


def double_backward(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 with backward passes alone: J v is the derivative of J^T w in w."""
    x = x.requires_grad_()
    logits = network(x)
    w = torch.zeros_like(logits, requires_grad=True)
    (of_w,) = torch.autograd.grad(logits, x, w, create_graph=True)
    (tangent,) = torch.autograd.grad(of_w, w, unit(torch.randn_like(x)), retain_graph=True)
    (back,) = torch.autograd.grad(logits, x, unit(tangent).detach(), create_graph=True)
    return logits, lengths(back)


def functions(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 by `torch.func.jvp` and `torch.func.vjp`."""
    with torch.no_grad():
        _, tangent = torch.func.jvp(network, (x,), (unit(torch.randn_like(x)),))
    logits, pull_back = torch.func.vjp(network, x)
    (back,) = pull_back(unit(tangent))
    return logits, lengths(back)


def of_deepinv(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deepinv's penalty with one iteration, for each example."""
    from deepinv.loss import JacobianSpectralNorm

    x = x.requires_grad_()
    logits = network(x)
    penalty = JacobianSpectralNorm(max_iter=1, tol=0.0, reduction="none")
    return logits, penalty(logits, x)


def frobenius(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`n_out ||J^T u||^2` for one random unit u, as the package jacobian_regularizer has it."""
    x = x.requires_grad_()
    logits = network(x)
    u = unit(torch.randn_like(logits))
    (back,) = torch.autograd.grad(logits, x, u, create_graph=True)
    return logits, logits.shape[1] * lengths(back) ** 2


PENALTIES: dict[str, Penalized] = {
    "plain": plain,
    "double_backward": double_backward,
    "functions": functions,
    "deepinv": of_deepinv,
    "frobenius": frobenius,
}


def made(path: Path, batch: int, penalized: Penalized) -> _peers.Peer:
    """A peer with one of the penalties."""
    weights, images, labels = _peers.read(path, batch)
    network = lenet(weights)
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    y = torch.from_numpy(labels)
    optimizer = torch.optim.SGD(network.parameters(), _peers.RATE, _peers.MOMENTUM)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits, values = penalized(network, x.detach())
        loss = functional.cross_entropy(logits, y)
        if values is not None:
            loss = loss + _peers.FACTOR * values.mean()
        loss.backward()
        optimizer.step()
        return loss

    def estimate(draw: int) -> np.ndarray:
        torch.manual_seed(draw)
        _, values = penalized(network, x.detach())
        assert values is not None  # noqa: S101
        return values.detach().numpy()

    return _peers.Peer(step, lambda loss: loss.item(), None if penalized is plain else estimate)


def maker(penalized: Penalized) -> Callable[[Path, int], _peers.Peer]:
    """Makes peers with a penalty."""
    return lambda path, batch: made(path, batch, penalized)


if __name__ == "__main__":
    packages = ("torch", "deepinv")
    _peers.serve(
        {name: maker(penalized) for name, penalized in PENALTIES.items()},
        {package: importlib.metadata.version(package) for package in packages},
    )
