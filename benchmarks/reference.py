"""The published algorithm, written plainly, to compare with: lambda_max by eigsh over parameter space.

Zhang et al. 2023 (arXiv:2309.13016) apply v -> J^T (J v) by restarted double backward passes and hand it to scipy's
eigsh, whose 20 Lanczos vectors have one entry per parameter. Same spectrum as J J^T, far larger vectors.
"""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from lmleak.adapters.base import ModelAdapter
from lmleak.types import Batch


def parameter_space_lambda_max(adapter: ModelAdapter, batch: Batch, *, tol: float = 1e-3) -> float:
    """Return the largest eigenvalue of J^T J.

    Args:
        adapter: The model.
        batch: The private batch.
        tol: Relative tolerance of eigsh.

    Returns:
        The eigenvalue.
    """
    selection = adapter.select("no-word-embeddings")
    names = selection.names
    sizes = [adapter.parameters()[n].numel() for n in names]

    def product(vector: np.ndarray) -> np.ndarray:
        theta = {n: adapter.parameters()[n].requires_grad_() for n in names}
        x = adapter.input(batch).requires_grad_()
        loss = adapter.shared_loss(batch, x, theta, selection)
        *gradient, input_gradient = torch.autograd.grad(
            loss, [*theta.values(), x], create_graph=True, allow_unused=True
        )
        parts = torch.as_tensor(vector.reshape(-1), dtype=x.dtype, device=x.device).split(sizes)
        pairs = [(g, p.view_as(t)) for g, p, t in zip(gradient, parts, theta.values(), strict=True) if g is not None]
        (jv,) = torch.autograd.grad([g for g, _ in pairs], x, [p for _, p in pairs], retain_graph=True)
        back = torch.autograd.grad(input_gradient, list(theta.values()), jv, allow_unused=True)
        flat = [
            torch.zeros_like(t).flatten() if b is None else b.flatten()
            for b, t in zip(back, theta.values(), strict=True)
        ]
        return torch.cat(flat).cpu().numpy()

    size = sum(sizes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return float(eigsh(operator, k=1, tol=tol, v0=start, return_eigenvectors=False)[0])
