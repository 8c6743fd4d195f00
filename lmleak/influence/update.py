"""J of a FedAvg update: how the result of local training moves with the private input."""

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import DataError
from lmleak.gradients.aggregate import update_of
from lmleak.influence.jacobian import InputJacobian
from lmleak.types import Aggregation, Batch


class UpdateJacobian(InputJacobian):
    """J = d F / d x of the update F(x) = mean over clients of (theta_0 - theta_K) / (lr K).

    F is the mean over clients and steps of grad L_k(x; theta_k), where theta_k depends on x as well: derivatives go
    through all local steps. One client with one step is ``GradientJacobian``. x is (B, ...) over all clients and
    steps; an example that several epochs visit enters once. J^T v is the derivative in w of <J w, v>, one reverse
    pass over the graph of J w, which is linear in w. The graphs of all steps stay in memory.

    The extension to updates is ours; Zhang et al. 2023 (arXiv:2309.13016) treat one gradient.

    Args:
        adapter: The model.
        batch: The private batch, at which J is taken.
        aggregation: Clients, epochs, steps and learning rate.
        shared: Which parameters are theta; every trained one moves in the local steps. For text, word embeddings stay
            fixed during the steps (``update_of``).

    Raises:
        DataError: If the update does not depend on x.
    """

    def __init__(self, adapter: ModelAdapter, batch: Batch, aggregation: Aggregation, *, shared: str = "all"):
        names = adapter.select(shared).names
        parameters = adapter.parameters()
        super().__init__(adapter.input(batch), adapter.free(batch), {n: parameters[n].shape for n in names})
        self.by_autodiff = self.parameter_names
        self._x = self.x.detach().requires_grad_()
        update, _ = update_of(
            adapter, self._x, batch.targets, batch.layout, names, aggregation, create_graph=True
        )  # fmt: skip
        self._update = {n: u for n, u in update.items() if u.requires_grad}
        self._weights = {n: torch.zeros_like(u, requires_grad=True) for n, u in self._update.items()}
        product = self._product(self._weights, create_graph=True) if self._update else None
        if product is None or not product.requires_grad:
            raise DataError("the update does not depend on x, so J is zero")
        self._linear = product

    def _product(self, weights: dict[str, Tensor], *, create_graph: bool = False) -> Tensor | None:
        (product,) = torch.autograd.grad(
            [self._update[n] for n in weights], self._x, list(weights.values()),
            create_graph=create_graph, retain_graph=True, allow_unused=True,
        )  # fmt: skip
        return product

    def _matvec(self, delta):
        used = {n: d for n, d in delta.items() if n in self._update}
        product = self._product(used) if used else None
        return torch.zeros_like(self.x) if product is None else product

    def _rmatvec(self, v):
        leaves = list(self._weights.values())
        values = torch.autograd.grad(self._linear, leaves, v, retain_graph=True, allow_unused=True)
        found = {n: p for n, p in zip(self._weights, values, strict=True) if p is not None}
        return {n: found.get(n, self.x.new_zeros(shape)) for n, shape in self.parameter_shapes.items()}
