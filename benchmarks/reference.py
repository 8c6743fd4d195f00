"""The published algorithm, written plainly, to compare with: products with J by restarted double backward passes.

Zhang et al. 2023 (arXiv:2309.13016): lambda_max of J^T J by scipy's eigsh, whose 20 Lanczos vectors have one entry per
parameter (same spectrum as J J^T, far larger vectors); the exact damped I2F by fixed-step descent (its released code;
benchmarks/descent_solve.py runs it whole on a LeNet).
"""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.types import Batch

DESCENT_RATE, DESCENT_STEPS = 0.01, 2000


def plain_gradient(adapter: ModelAdapter, batch: Batch) -> list[Tensor]:
    """Return the gradient over the shared parameters by one plain backward pass: the unit of all costs."""
    selection = adapter.select("no-word-embeddings")
    parameters = adapter.parameters()
    theta = {n: parameters[n].detach().requires_grad_() for n in selection.names}
    loss = adapter.shared_loss(batch, adapter.input(batch), theta, selection)
    gradient = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return [g for g in gradient if g is not None]


class ParameterSpace:
    """Products with J = d g / d x for one batch, each on a graph of its own, as the published code takes them.

    Args:
        adapter: The model.
        batch: The private batch.
    """

    def __init__(self, adapter: ModelAdapter, batch: Batch):
        self.adapter, self.batch = adapter, batch
        self.selection = adapter.select("no-word-embeddings")
        parameters = adapter.parameters()
        self.parameters = {n: parameters[n].detach() for n in self.selection.names}
        self.x = adapter.input(batch)
        self.calls = 0
        """Products J^T J v so far."""

    def matvec(self, delta: list[Tensor]) -> Tensor:
        """Return J delta, shaped like x."""
        x, theta, loss = self._graph()
        gradient = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(gradient, delta, strict=True) if g is not None]
        return torch.autograd.grad([g for g, _ in pairs], x, [d for _, d in pairs])[0]

    def rmatvec(self, b: Tensor) -> list[Tensor]:
        """Return J^T b, one tensor per parameter."""
        x, theta, loss = self._graph()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        back = torch.autograd.grad(slope, theta, b, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(back, theta, strict=True)]

    def gram(self, vector: np.ndarray, *, grown: bool = False) -> np.ndarray:
        """Return J^T J v, one number per parameter, on the host as eigsh wants it.

        Args:
            vector: v.
            grown: Whether the result is joined as in the released code: each parameter's part is appended to a copy of
                all before it, which moves the square of the number of parameters.
        """
        self.calls += 1
        sizes = [p.numel() for p in self.parameters.values()]
        parts = torch.as_tensor(vector.reshape(-1), dtype=self.x.dtype, device=self.x.device).split(sizes)
        shaped = [part.view_as(p) for part, p in zip(parts, self.parameters.values(), strict=True)]
        back = [g.flatten() for g in self.rmatvec(self.matvec(shaped))]
        if not grown:
            return torch.cat(back).cpu().numpy()
        joined = back[0][:0]
        for part in back:
            joined = torch.cat([joined, part])
        return joined.cpu().numpy()

    def _graph(self) -> tuple[Tensor, list[Tensor], Tensor]:
        x = self.x.detach().requires_grad_()
        theta = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        return x, list(theta.values()), self.adapter.shared_loss(self.batch, x, theta, self.selection)


def descent_step(space: ParameterSpace, b: Tensor, delta: list[Tensor], damping: float) -> tuple[Tensor, float, float]:
    """Take one step of the published descent on ||J^T b - delta||^2 / 2 + damping ||b||^2 / 2.

    Args:
        space: J.
        b: The iterate, shaped like x.
        delta: One tensor per parameter.
        damping: As in A + damping I.

    Returns:
        The next iterate, ||(A + damping I) b - J delta|| before the step, and ||J^T b - delta|| after it, by which the
        released code sees a number that is none; three products in all.
    """
    missing = [d - p for d, p in zip(delta, space.rmatvec(b), strict=True)]
    residual = damping * b - space.matvec(missing)
    b = b - DESCENT_RATE * residual
    misfit = sum((p - d).square().sum().item() for p, d in zip(space.rmatvec(b), delta, strict=True))
    return b, residual.norm().item(), misfit**0.5


def parameter_space_lambda_max(space: ParameterSpace, *, tol: float = 0.0, grown: bool = False) -> float:
    """Return the largest eigenvalue of J^T J.

    Args:
        space: J.
        tol: Relative tolerance of eigsh; 0, as in the released code, is machine precision.
        grown: As of ``ParameterSpace.gram``.

    Returns:
        The eigenvalue.
    """
    size = sum(p.numel() for p in space.parameters.values())
    operator = LinearOperator((size, size), matvec=lambda v: space.gram(v, grown=grown), dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return float(eigsh(operator, k=1, tol=tol, v0=start, return_eigenvectors=False)[0])
