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

DESCENT_RATE = 0.01


def plain_gradient(adapter: ModelAdapter, batch: Batch) -> list[Tensor]:
    """Return the gradient over the shared parameters by one plain backward pass: the unit of all costs."""
    selection = adapter.select("no-word-embeddings")
    parameters = adapter.parameters()
    theta = {n: parameters[n].detach().requires_grad_() for n in selection.names}
    loss = adapter.shared_loss(batch, adapter.input(batch), theta, selection)
    gradient = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return [g for g in gradient if g is not None]


class ParameterSpace:
    """Products with J = d g / d x for one batch, each with graphs of its own, as the published code takes them.

    Args:
        adapter: The model.
        batch: The private batch.
    """

    def __init__(self, adapter: ModelAdapter, batch: Batch):
        self.adapter, self.batch = adapter, batch
        self.selection = adapter.select("no-word-embeddings")
        self.sizes = [adapter.parameters()[n].numel() for n in self.selection.names]
        self.x = adapter.input(batch)
        self.calls = 0
        """Products J^T J v so far."""

    def graphs(self) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None], Tensor]:
        """Return x, theta, g and dL/dx with graphs."""
        parameters = self.adapter.parameters()
        theta = {n: parameters[n].detach().requires_grad_() for n in self.selection.names}
        x = self.x.detach().requires_grad_()
        loss = self.adapter.shared_loss(self.batch, x, theta, self.selection)
        *gradient, slope = torch.autograd.grad(loss, [*theta.values(), x], create_graph=True, allow_unused=True)
        return x, theta, gradient, slope

    def product(self, vector: np.ndarray) -> np.ndarray:
        """Return J^T J v, one number per parameter, on the host as eigsh wants it."""
        self.calls += 1
        x, theta, gradient, slope = self.graphs()
        parts = torch.as_tensor(vector.reshape(-1), dtype=x.dtype, device=x.device).split(self.sizes)
        pairs = [(g, p.view_as(g)) for g, p in zip(gradient, parts, strict=True) if g is not None]
        (jv,) = torch.autograd.grad([g for g, _ in pairs], x, [p for _, p in pairs], retain_graph=True)
        back = torch.autograd.grad(slope, list(theta.values()), jv, allow_unused=True)
        flat = [
            torch.zeros_like(t).flatten() if b is None else b.flatten()
            for b, t in zip(back, theta.values(), strict=True)
        ]
        return torch.cat(flat).cpu().numpy()

    def gram(self, b: Tensor) -> Tensor:
        """Return J J^T b, shaped like x."""
        _, theta, _, slope = self.graphs()
        back = torch.autograd.grad(slope, list(theta.values()), b, allow_unused=True)
        x, theta, gradient, _ = self.graphs()
        pairs = [(g, p) for g, p in zip(gradient, back, strict=True) if g is not None and p is not None]
        return torch.autograd.grad([g for g, _ in pairs], x, [p for _, p in pairs])[0]


def descent_step(space: ParameterSpace, b: Tensor, response: Tensor, damping: float) -> Tensor:
    """Return b after one step of the published descent on ||J^T b - delta||^2 / 2 + damping ||b||^2 / 2.

    Args:
        space: J.
        b: The iterate, shaped like x.
        response: J delta.
        damping: As in A + damping I.

    Returns:
        The next iterate.
    """
    return b - DESCENT_RATE * (space.gram(b) + damping * b - response)


def parameter_space_lambda_max(space: ParameterSpace, *, tol: float = 0.0) -> float:
    """Return the largest eigenvalue of J^T J.

    Args:
        space: J.
        tol: Relative tolerance of eigsh; 0, as in the released code, is machine precision.

    Returns:
        The eigenvalue.
    """
    size = sum(space.sizes)
    operator = LinearOperator((size, size), matvec=space.product, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return float(eigsh(operator, k=1, tol=tol, v0=start, return_eigenvectors=False)[0])
