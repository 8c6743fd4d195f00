r"""Levenberg-Marquardt on gradient matching: nonlinear least squares in x, linearised at every step.

    F(x) = ||g(x) - g*||^2 / 2  +  w ||x - m||^2 / 2,    slope  s = J (g(x) - g*) + w (x - m)
    (J J^T + (w + damping) I) d = -s,                     x <- x + d  if F falls

with J = dg/dx, dx x P as in Zhang et al. 2023 (arXiv:2309.13016): near the truth, with g* = g(x0) + delta and w = 0,
the minimiser is x0 + (J J^T)^-1 J delta to first order, their eq. 4. With the prior x ~ N(m, tau^2 I) and noise
delta ~ N(0, sigma^2 I), ``w = sigma^2 / tau^2`` makes it the attacker of maximal posterior probability. J J^T, w and
the damping have the unit of gradient^2 / x^2. The damping follows the gain ratio (Nielsen 1999, IMM-REP-1999-05).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks.image_base import ImageProblem
from lmleak.errors import DataError
from lmleak.linops import FunctionOperator, conjugate_gradient
from lmleak.lookup import lookup

PRODUCT = 2
"""Gradients that one product with J or J^T is counted as: a backward pass through a gradient, so that a gradient and
its derivative are three. On the graphs that stay it takes the time of about one."""
DENSE_PIXELS = 512  # unknowns up to which J J^T is formed; beyond, conjugate gradients are cheaper
DENSE_NUMBERS = 2**26  # and as long as J holds no more numbers
ROWS = 64  # rows of J differentiated at once
CG_TOLERANCE = 1e-3  # relative residual of an inexact step; the next linearisation repairs the rest
CG_PRODUCTS = 200
SLOPE_TOLERANCE = 1e-10  # of the cosine between the residual and the range of J^T, about
ROUNDINGS = 4  # of the observed gradient: a residual of so many cannot be told from zero


class Linearization(ABC):
    """g at one x with its first derivative: the residual r = g(x) - g*, J r, and systems in J J^T.

    Products are double backward passes on graphs built once: J v = d<g, v>/dx is linear in v, and its derivative by v
    is J^T. The coordinates that the problem masks are no part of g.

    Args:
        problem: What is matched.
        x: (B, C, H, W).

    Raises:
        DataError: If no shared gradient depends on the images.
    """

    def __init__(self, problem: ImageProblem, x: Tensor):
        self.problem = problem
        self.x = x.detach().requires_grad_()
        self._gradient = compared(problem, problem.gradient(self.x, create_graph=True))
        if not self._gradient.requires_grad:
            raise DataError("the shared gradient does not depend on the images, so there is nothing to match")
        self.residual = self._gradient.detach() - compared(problem, problem.observed)
        """(P,)."""
        self.slope = self._times(self.residual)
        """J r, like x; :meth:`ImageProblem.gradient` counted it."""
        variable = torch.zeros_like(self._gradient).requires_grad_()
        (product,) = torch.autograd.grad(self._gradient, self.x, variable, create_graph=True)
        self._variable, self._product = variable, product
        self._count(1)

    def _count(self, products: int) -> None:
        self.problem.evaluations += products * PRODUCT * self.problem.aggregation.epochs

    def _times(self, delta: Tensor) -> Tensor:
        """Return J delta, (P,) -> like x."""
        (product,) = torch.autograd.grad(self._gradient, self.x, delta, retain_graph=True)
        return product

    def transposed(self, u: Tensor) -> Tensor:
        """Return J^T u, like x -> (P,)."""
        self._count(1)
        (product,) = torch.autograd.grad(self._product, self._variable, u, retain_graph=True)
        return product

    @abstractmethod
    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d of (J J^T + damping I) d = b, like x."""

    def curvature(self, d: Tensor) -> float:
        """Return ||J^T d||^2."""
        return _square(self.transposed(d))


class DenseLinearization(Linearization):
    """J J^T as a matrix (dx, dx), decomposed in float64: every damping is solved exactly, at no gradients.

    dx products with J^T, side by side.
    """

    def __init__(self, problem: ImageProblem, x: Tensor):
        super().__init__(problem, x)
        self._count(x.numel())
        directions = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
        rows = [
            torch.autograd.grad(
                self._product, self._variable, some, retain_graph=True, is_grads_batched=True
            )[0]
            for some in directions.split(ROWS)
        ]  # fmt: skip
        jacobian = torch.cat(rows).double()
        eigenvalues, self._vectors = torch.linalg.eigh(jacobian @ jacobian.T)
        self._eigenvalues = eigenvalues.clamp(min=0)

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d of (J J^T + damping I) d = b, like x."""
        coordinates = self._vectors.T @ b.reshape(-1).double()
        return (self._vectors @ (coordinates / (self._eigenvalues + damping))).reshape(b.shape).to(b)

    def curvature(self, d: Tensor) -> float:
        """Return ||J^T d||^2."""
        return (self._eigenvalues @ (self._vectors.T @ d.reshape(-1).double()).square()).item()


class MatrixFreeLinearization(Linearization):
    """J J^T known by products only: two per conjugate gradient."""

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d of (J J^T + damping I) d = b, like x, up to ``CG_TOLERANCE``."""

        def gram(flat: Tensor) -> Tensor:
            self._count(1)
            return self._times(self.transposed(flat.reshape(b.shape))).reshape(-1)

        operator = FunctionOperator(gram, b.numel(), b.dtype, b.device, positive_semidefinite=True)
        solved = conjugate_gradient(
            operator, b.reshape(-1), damping=damping, tol=CG_TOLERANCE, max_products=CG_PRODUCTS
        )
        return solved.solution.reshape(b.shape)


Linearize = Callable[[ImageProblem, Tensor], Linearization]
SOLVERS: dict[str, Linearize] = {"dense": DenseLinearization, "cg": MatrixFreeLinearization}


@dataclass(frozen=True)
class LeastSquares:
    """Where Levenberg-Marquardt ended: its best iterate, which is its last."""

    images: Tensor
    """(B, C, H, W)."""
    mismatch: float
    """||g(x) - g*||^2, in gradient^2, over the compared coordinates."""
    objective: float
    """2 F(x) = mismatch + w ||x - m||^2."""
    iterations: int
    """Steps tried."""
    stopped: str


def levenberg_marquardt(
    problem: ImageProblem,
    start: Tensor,
    *,
    prior_weight: float = 0.0,
    iterations: int = 100,
    damping: float = 1e-3,
    step_tolerance: float = 1e-8,
    solver: str | Linearize = "auto",
) -> LeastSquares:
    """Minimise ``||g(x) - g*||^2 + w ||x - m||^2`` from one start.

    No pixel range is enforced, so that in the linear regime the error is that of the influence function. A study on
    the data owner's side may start at the truth, to see the error of an attacker who finds the right minimum; the
    registered attack has no truth to start from.

    Args:
        problem: What is matched.
        start: (B, C, H, W), where it begins.
        prior_weight: w = sigma^2 / tau^2, in gradient^2 / x^2; m is the adapter's prior mean.
        iterations: Most steps tried; each costs one gradient, and one that is taken a linearisation besides.
        damping: At the start, in units of the curvature along the slope there.
        step_tolerance: Stop at steps below this part of ||x||.
        solver: "dense" (J J^T formed and decomposed in float64), "cg", or "auto": dense up to ``DENSE_PIXELS``
            unknowns if J holds no more than ``DENSE_NUMBERS``; or another way to linearise.

    Returns:
        The images, and why it stopped there.

    Raises:
        DataError: If the start has a wrong shape, or its gradient is not finite.
    """
    if start.shape != problem.shape:
        raise DataError(f"the start has shape {tuple(start.shape)}, expected (B, C, H, W) = {problem.shape}")
    linearize = SOLVERS[solver_for(problem, solver)] if isinstance(solver, str) else solver
    mean = problem.adapter.prior().mean.to(problem.device, problem.dtype)
    eps = torch.finfo(problem.dtype).eps

    def half_squares(x: Tensor, residual: Tensor) -> float:
        return (_square(residual) + prior_weight * _square(x - mean)) / 2

    observed = _square(compared(problem, problem.observed))
    x = start.detach().to(problem.device, problem.dtype)
    here = linearize(problem, x)
    value = half_squares(x, here.residual)
    if not math.isfinite(value):
        raise DataError("the gradient at the start is not finite; start from smaller images (init_scale)")
    slope = here.slope + prior_weight * (x - mean)
    scale = _along(here, slope)
    damping, growth = damping * scale, 2.0
    tried, stopped = 0, ""
    while not stopped:
        if 2 * value <= (ROUNDINGS * eps) ** 2 * observed:
            stopped = "converged: the gradient is matched to rounding"
            break
        if _norm(slope) <= SLOPE_TOLERANCE * math.sqrt(2 * value * (scale + prior_weight)):
            stopped = "converged: the slope is zero"
            break
        step = here.solve(-slope, prior_weight + damping)
        tried += 1
        predicted = -_dot(slope, step) - (here.curvature(step) + prior_weight * _square(step)) / 2
        if _norm(step) <= step_tolerance * _norm(x):
            stopped = "converged: the step is below tolerance"
        elif predicted <= eps * value:
            stopped = "converged: the predicted decrease is below rounding"
        elif tried == iterations:
            stopped = "iteration limit"
        trial = x + step
        reached = half_squares(trial, residual_at(problem, trial))
        if reached < value:
            gain = (value - reached) / predicted if predicted > 0 else 0.0
            damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
            x, value = trial, reached
            if not stopped:
                here = linearize(problem, x)
                slope = here.slope + prior_weight * (x - mean)
        else:
            damping, growth = damping * growth, 2 * growth
    prior = prior_weight * _square(x - mean)
    return LeastSquares(x, 2 * value - prior, 2 * value, tried, stopped)


def solver_for(problem: ImageProblem, solver: str) -> str:
    """Return "dense" or "cg"; "auto" is decided by size."""
    lookup("solver", solver, {"auto": ..., **SOLVERS})
    if solver != "auto":
        return solver
    unknowns, numbers = math.prod(problem.shape), sum(g.numel() for g in problem.observed.values())
    return "dense" if unknowns <= DENSE_PIXELS and unknowns * numbers <= DENSE_NUMBERS else "cg"


def compared(problem: ImageProblem, gradient: Mapping[str, Tensor]) -> Tensor:
    """Return a gradient as one vector (P,), zero where the problem does not compare."""
    parts = [(gradient[name], problem.kept.get(name)) for name in problem.names]
    return torch.cat([(g if kept is None else g * kept).reshape(-1) for g, kept in parts])


def residual_at(problem: ImageProblem, x: Tensor) -> Tensor:
    """Return g(x) - g*, (P,)."""
    return compared(problem, problem.gradient(x)) - compared(problem, problem.observed)


def _along(here: Linearization, direction: Tensor) -> float:
    """Return the curvature ||J^T s||^2 / ||s||^2, at least the smallest positive number."""
    square = _square(direction)
    return max(here.curvature(direction) / square if square else 0.0, torch.finfo(torch.float64).tiny)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double()).item()


def _square(a: Tensor) -> float:
    return _dot(a, a)


def _norm(a: Tensor) -> float:
    return math.sqrt(_square(a))
