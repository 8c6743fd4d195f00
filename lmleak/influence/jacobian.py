"""The operator J = d g / d x: how the shared gradient moves with the private input.

J is stored dx x P, as in Zhang et al. 2023 (arXiv:2309.13016): J delta is shaped like x, J^T v like theta.
With the loss L(x; theta), J[i, k] = d^2 L / dx_i dtheta_k and A = J J^T (dx x dx, positive semidefinite).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError, UnsupportedModelError
from lmleak.influence.factored import FactoredProducts
from lmleak.influence.perturbation import Perturbation
from lmleak.influence.products import AutodiffProducts, DenseProducts, Products
from lmleak.linops import FunctionOperator
from lmleak.lookup import lookup
from lmleak.types import Batch

IMPLEMENTATIONS: dict[str, type[Products]] = {
    "factored": FactoredProducts, "autodiff": AutodiffProducts, "dense": DenseProducts,
}  # fmt: skip


class InputJacobian(ABC):
    """A linear map from theta-shaped to x-shaped tensors, on the free coordinates of x.

    Args:
        x: The point it is taken at.
        free: Boolean, like x: False on padding, whose rows are zero.
        parameter_shapes: Shape per parameter name.
    """

    perturbation_scale: float = 1.0
    """The attacker sees delta times this; 1 except for attackers who normalise the gradient."""
    by_autodiff: tuple[str, ...] = ()
    """Parameters whose products go by double backward: as exact as the others, but slower and larger in memory."""
    block_size: int = 1
    """Products A v that ``gram_operator().matmat`` makes in one pass: 1 where several cost what they cost one by one.

    On one core a pass takes 0.3 to 0.5 of the time on small models and short texts, and 0.7 to 0.8 on BERT-base at 32
    tokens; it gains nothing at 128 (benchmarks/results/block_products.md).
    """

    def __init__(self, x: Tensor, free: Tensor, parameter_shapes: Mapping[str, torch.Size]):
        self.x, self.free, self.parameter_shapes = x, free, dict(parameter_shapes)
        self.dx = int(free.sum())

    @abstractmethod
    def _matvec(self, delta: Mapping[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def _rmatvec(self, v: Tensor) -> dict[str, Tensor]: ...

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of theta, in the model's order."""
        return tuple(self.parameter_shapes)

    @property
    def shape(self) -> tuple[int, int]:
        """(dx, P)."""
        return self.dx, sum(s.numel() for s in self.parameter_shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x, and of every product."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Where products live."""
        return self.x.device

    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """Return J delta, shaped like x, zero on padding.

        Args:
            delta: One tensor per parameter name, shaped like the parameter; missing names count as zero. Each is asked
                for when its layer's turn comes and dropped after it, so a mapping that makes them (``UnitNoise``) is
                never held as a whole.

        Returns:
            The product.

        Raises:
            DataError: On names outside theta or wrong shapes.
        """
        if not isinstance(delta, Mapping):
            raise DataError(f"delta must map parameter names to tensors, got {type(delta).__name__}")
        for name in delta:
            if name not in self.parameter_shapes:
                raise DataError(f"delta names {name!r}, which is not among the shared parameters")
        return self._matvec(Perturbation(delta, self.parameter_shapes, self.x)) * self.free

    def rmatvec(self, v: Tensor) -> dict[str, Tensor]:
        """Return J^T v, one tensor per parameter name; v is shaped like x, its padding is ignored."""
        self._check_vector(v)
        return self._rmatvec(v * self.free)

    def gram(self, v: Tensor) -> Tensor:
        """Return A v = J J^T v, shaped like x."""
        self._check_vector(v)
        return self._gram(v * self.free) * self.free

    def _gram(self, v: Tensor) -> Tensor:
        return self._matvec(self._rmatvec(v))

    def _check_vector(self, v: Tensor) -> None:
        if not isinstance(v, Tensor) or v.shape != self.x.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise DataError(f"expected a vector shaped like x, {tuple(self.x.shape)}, got {got}")

    def flatten(self, v: Tensor) -> Tensor:
        """Return the free coordinates of an x-shaped tensor as a vector (dx,)."""
        return v[self.free]

    def unflatten(self, flat: Tensor) -> Tensor:
        """Return an x-shaped tensor from its free coordinates, zero on padding."""
        return torch.zeros_like(self.x).masked_scatter(self.free, flat)

    def gram_operator(self) -> FunctionOperator:
        """Return A on flat vectors (dx,), for the solvers; it counts its products, and makes several at once."""
        return FunctionOperator(
            lambda flat: self.flatten(self.gram(self.unflatten(flat))),
            size=self.dx, dtype=self.dtype, device=self.device, positive_semidefinite=True,
            matmat=self._gram_columns, block_size=self.block_size,
        )  # fmt: skip

    def _gram_columns(self, columns: Tensor) -> Tensor:
        """Return A V, (dx, k), in one batched pass through the graphs."""
        free, vectors = self.free.reshape(-1), self.x.new_zeros(columns.shape[1], self.x.numel())
        vectors[:, free] = columns.T
        products = torch.func.vmap(self.gram)(vectors.reshape(-1, *self.x.shape))
        return products.reshape(vectors.shape)[:, free].T


class GradientJacobian(InputJacobian):
    """J for one batch.

    Args:
        adapter: The model.
        batch: The private batch, at which J is taken.
        shared: Which parameters are theta (``ModelAdapter.select``).
        implementation: "factored" (token-sized factors, double backward where a layer's kind is unknown), "autodiff"
            (double backward for all) or "dense" (small problems, the oracle).
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        batch: Batch,
        *,
        shared: str = "no-word-embeddings",
        implementation: str = "factored",
    ):
        selection = adapter.select(shared)
        parameters = adapter.parameters()
        self.theta = {name: parameters[name] for name in selection.names}
        super().__init__(adapter.input(batch), adapter.free(batch), {n: p.shape for n, p in self.theta.items()})
        products_class = lookup("implementation", implementation, IMPLEMENTATIONS)
        devices = sorted({str(p.device) for p in self.theta.values()})
        if len(devices) > 1 and implementation != "autodiff":
            raise UnsupportedCombinationError(
                f"the model lies on {', '.join(devices)}, and implementation={implementation!r} adds up on one device "
                "what its layers give; write implementation='autodiff'"
            )
        self.implementation = implementation

        def loss(theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                return adapter.shared_loss(batch, x, theta, selection)

        self._loss = loss
        self._model = adapter.model
        with self._explained():
            self._products: Products = products_class(self._loss, self.theta, self.x, adapter.model)
        self.block_size = self._products.block_size

    def __repr__(self) -> str:
        named = self.by_autodiff if self.implementation == "factored" else ()
        rest = f", by double backward: {', '.join(named)}" if named else ""
        return f"GradientJacobian({self.shape[0]} x {self.shape[1]}, {self.implementation}{rest})"

    @property
    def by_autodiff(self) -> tuple[str, ...]:
        """Parameters whose products go by double backward: with "factored", those of layers of unknown kinds."""
        return tuple(n for n in self.parameter_names if n in self._products.by_autodiff)

    def _matvec(self, delta):
        with self._explained():
            return self._products.matvec(delta)

    def _rmatvec(self, v):
        with self._explained():
            return self._products.rmatvec(v, self.parameter_names)

    def _gram(self, v):
        with self._explained():
            return self._products.gram(v, self.parameter_names)

    @contextmanager
    def _explained(self):
        """Turn what torch says of derivatives that do not exist, or cannot be traced, into a refusal with advice."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if hasattr(self, "_products") and "modified by an inplace operation" in str(error):
                raise DataError(
                    "the model's weights, or x, were changed in place since this operator was built on them "
                    f"({error}); build it anew: GradientJacobian(adapter, batch)"
                ) from error
            another = "a model without it" if self.implementation == "autodiff" else "implementation='autodiff'"
            raise UnsupportedModelError(
                f"products with J by implementation={self.implementation!r} fail in this model: "
                f"{str(error).partition(chr(10))[0]} ({type(error).__name__}); try {another}"
            ) from error

    def restrict(self, names: Iterable[str]) -> "GradientJacobian":
        """Return J on some of its parameters, sharing the graphs: what a partial release leaves.

        Args:
            names: Parameters to keep.

        Returns:
            The restricted operator.

        Raises:
            ConfigError: If a name is unknown or none is kept.
        """
        kept = set(names)
        if not kept or kept - set(self.theta):
            raise ConfigError(f"expected some of the {len(self.theta)} shared parameters, got {sorted(kept)[:3]}")
        restricted = object.__new__(GradientJacobian)
        restricted.__dict__ |= self.__dict__
        restricted.theta = {n: p for n, p in self.theta.items() if n in kept}
        restricted.parameter_shapes = {n: p.shape for n, p in restricted.theta.items()}
        return restricted

    def verify(self, *, seed: int = 0) -> float:
        """Compare the products with those of double backward, which knows no kinds of layers, at random vectors.

        Compared are J^T v per parameter, A v (in a block as well, where products are made so), and J delta with every
        parameter's part of equal length, each relative to the reference: a parameter whose part of J^T v is below a
        tenth of the largest counts relative to that much, since it may be nothing but rounding (the bias of keys in
        attention). Costs about ten gradients, and memory for a second set of graphs.

        Args:
            seed: Of v.

        Returns:
            The largest difference.

        Raises:
            UnsupportedModelError: If it is above 3 sqrt(epsilon), 1e-3 in float32 and 4e-8 in float64, or if double
                backward itself is at odds with its adjoint.
            DataError: If J^T v is zero.
        """
        with self._explained():
            reference = AutodiffProducts(self._loss, self.theta, self.x, self._model)
        v = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(self.x)
        v = v * self.free
        pulled, expected = self.rmatvec(v), reference.rmatvec(v, self.parameter_names)
        largest = max(t.norm() for t in expected.values())
        if largest == 0:
            raise DataError(f"J^T v is zero in {self.dtype} for a random v: the gradient does not move with the input")
        size = {n: t.norm() for n, t in expected.items()}
        difference = lambda got, wanted, least=0.0: ((got - wanted).norm() / wanted.norm().clamp(min=least)).item()
        differences = {f"J^T v at {n}": difference(pulled[n], t, 0.1 * largest) for n, t in expected.items()}
        even = {n: t / size[n].clamp(min=1e-3 * largest) for n, t in expected.items()}
        pushed, product = (reference.matvec(delta) * self.free for delta in (even, expected))
        differences |= {"J delta": difference(self.matvec(even), pushed), "A v": difference(self.gram(v), product)}
        if self.block_size > 1:
            (column,) = self._gram_columns(self.flatten(v)[:, None]).T
            differences["A v in a block"] = difference(column, self.flatten(product))
        most = 3 * torch.finfo(self.dtype).eps ** 0.5
        adjoint = (v * pushed).sum(), sum((t * even[n]).sum() for n, t in expected.items())
        if not abs(adjoint[0] - adjoint[1]) <= most * v.norm() * pushed.norm():
            raise UnsupportedModelError(
                f"double backward is at odds with itself in this model, <v, J delta> = {adjoint[0]:.4g} but "
                f"<J^T v, delta> = {adjoint[1]:.4g}: a function of the model has a backward that is not its derivative"
            )
        worst = max(differences, key=differences.get)
        if not differences[worst] <= most:
            raise UnsupportedModelError(
                f"{worst} differs from double backward by {differences[worst]:.2g}: a layer of this model is not what "
                "it looks like, or its derivatives are not reproducible (dropout, random numbers); "
                "write implementation='autodiff'"
            )
        return differences[worst]

    def to_dense(self) -> Tensor:
        """Return J on the free coordinates as a matrix (dx, P); small problems only."""
        return DenseProducts(self._loss, self.theta, self.x, self._model).matrix[self.free.reshape(-1)]


class CosineJacobian(InputJacobian):
    """J of the gradient's direction, for attackers that match it by cosine similarity (GS).

    With u = g / ||g||: J_c = J (I - u u^T) / ||g||. At x0 the Hessian of 1 - cos(g(x), g0) is J_c J_c^T, and an
    attacker who receives g0 + delta errs by (J_c J_c^T)^-1 J_c delta / ||g|| to first order. Attacker: Geiping et
    al. 2020, arXiv:2003.14053; the operator is our extension of Zhang et al. 2023.

    Args:
        jacobian: J.
        gradient: g at x0, one tensor per parameter of J.
    """

    def __init__(self, jacobian: InputJacobian, gradient: Mapping[str, Tensor]):
        super().__init__(jacobian.x, jacobian.free, jacobian.parameter_shapes)
        self.jacobian, self.by_autodiff, self.block_size = jacobian, jacobian.by_autodiff, jacobian.block_size
        gradient = {n: gradient[n].to(jacobian.x) for n in jacobian.parameter_names}
        self.norm = sum(g.double().square().sum() for g in gradient.values()).sqrt().item()
        if self.norm == 0:
            raise DataError("the gradient is zero and has no direction to match")
        self.direction = {n: g / self.norm for n, g in gradient.items()}
        self.perturbation_scale = 1.0 / self.norm

    def _tangent(self, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (I - u u^T) delta / ||g||."""
        along = sum((self.direction[n] * d).sum() for n, d in delta.items())
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return {n: (delta.get(n, zero) - along * u) / self.norm for n, u in self.direction.items()}

    def _matvec(self, delta):
        return self.jacobian.matvec(self._tangent(delta))

    def _rmatvec(self, v):
        return self._tangent(self.jacobian.rmatvec(v))

    def _gram(self, v):
        """Return (A v - (J u) <J u, v>) / ||g||^2."""
        along = self._along
        return (self.jacobian.gram(v) - along * (along * v).sum()) / self.norm**2

    @cached_property
    def _along(self) -> Tensor:
        """J u."""
        return self.jacobian.matvec(self.direction)
