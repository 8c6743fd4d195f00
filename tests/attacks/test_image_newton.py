"""Gauss-Newton and L-BFGS against the first-order law x0 + (J J^T)^-1 J delta, which they are to reach."""

import gzip
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lmleak
from lmleak.adapters import LeNet, adapt
from lmleak.attacks import run_attack
from lmleak.attacks.image_base import ImageProblem
from lmleak.attacks.image_newton_steps import (
    PRODUCT,
    SOLVERS,
    levenberg_marquardt,
    residual_at,
    solver_for,
)
from lmleak.defenses import GaussianNoise, Prune
from lmleak.errors import ConfigError, DataError
from lmleak.influence import GradientJacobian
from lmleak.types import Aggregation, Normalization

SIZE = 8


class Softmax(nn.Module):
    """Linear softmax on images: the gradient by W is (p - y) x^T."""

    image_shape = (1, SIZE, SIZE)

    def __init__(self, classes=10):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fc = nn.Linear(SIZE * SIZE, classes)
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, pixels):
        return self.fc(pixels.flatten(1))


MODELS = {"softmax": Softmax, "lenet": lambda: LeNet(size=SIZE)}


def case(name="lenet", *, size=1, dtype=torch.float64):
    adapter = adapt(MODELS[name]().to(dtype))
    pixels = torch.randn(size, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).to(dtype)
    batch = adapter.batch(pixels, [3, 7, 1][:size])
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared="all")


def problem_of(adapter, shared):
    observation = shared.observation(lengths=False, labels=True)
    return ImageProblem(adapter, observation, observation.labels)


def perturbed(shared, scale, seed=0):
    """Return the noisy gradient and its noise."""
    noisy = GaussianNoise(std=scale, seed=seed)(shared)
    return noisy, {n: noisy.gradient[n] - g for n, g in shared.gradient.items()}


def predicted_error(jacobian, delta, damping=0.0):
    """Return (J J^T + damping I)^-1 J delta of a dense J, (dx,)."""
    flat = torch.cat([delta[n].reshape(-1) for n in jacobian.parameter_names])
    dense = jacobian.to_dense()
    return torch.linalg.solve(dense @ dense.T + damping * torch.eye(len(dense)).to(dense), dense @ flat)


@pytest.fixture(scope="module", params=MODELS)
def local(request):
    """A model at the truth, with J there."""
    adapter, batch, shared = case(request.param)
    return adapter, batch, shared, GradientJacobian(adapter, batch, shared="all", implementation="dense")


def test_jacobian_of_softmax_in_closed_form():
    adapter, batch, _ = case("softmax")
    x, label = batch.inputs["pixel_values"].reshape(-1), batch.targets
    weight, bias = (p.detach() for p in adapter.parameters().values())
    p = torch.softmax(weight @ x + bias, 0)
    error = p - nn.functional.one_hot(label[0], len(p))
    moved = (torch.diag(p) - torch.outer(p, p)) @ weight  # d(p - y) / dx
    by_weight = moved.T[:, :, None] * x + error[:, None] * torch.eye(len(x)).to(x)[:, None, :]
    closed = torch.cat([by_weight.flatten(1), moved.T], dim=1)
    jacobian = GradientJacobian(adapter, batch, shared="all", implementation="dense").to_dense()
    assert torch.allclose(jacobian, closed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_linearisation_is_the_jacobian(local, solver):
    adapter, batch, shared, jacobian = local
    noisy, delta = perturbed(shared, 1e-2)
    x = batch.inputs["pixel_values"]
    here = SOLVERS[solver](problem_of(adapter, noisy), x)
    dense = jacobian.to_dense()
    flat = torch.cat([d.reshape(-1) for d in delta.values()])
    assert torch.allclose(here.residual, -flat, rtol=1e-9, atol=1e-12)
    assert torch.allclose(here.slope.reshape(-1), -dense @ flat, rtol=1e-9, atol=1e-12)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    assert torch.allclose(here.transposed(v), dense.T @ v.reshape(-1), rtol=1e-9, atol=1e-12)
    assert here.curvature(v) == pytest.approx((dense.T @ v.reshape(-1)).square().sum().item(), rel=1e-9)
    step = here.solve(v, 0.1).reshape(-1)
    exact = torch.linalg.solve(dense @ dense.T + 0.1 * torch.eye(len(dense)).to(dense), v.reshape(-1))
    assert (step - exact).norm() <= (1e-9 if solver == "dense" else 1e-2) * exact.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_error_is_the_influence_to_second_order(local, solver):
    adapter, batch, shared, jacobian = local
    x0 = batch.inputs["pixel_values"]
    errors, ratios, remainders = (1.0, 0.1, 0.01), [], []  # where ||x0|| is 8
    direction = perturbed(shared, 1.0)[1]
    influence = predicted_error(jacobian, direction).norm()
    for size in errors:
        delta = {n: d * size / influence for n, d in direction.items()}
        noisy = shared.released({n: g + delta[n] for n, g in shared.gradient.items()}, "noise")
        found = levenberg_marquardt(problem_of(adapter, noisy), x0, solver=solver, damping=1e-9)
        assert found.stopped.startswith("converged"), found
        error, law = (found.images - x0).reshape(-1), predicted_error(jacobian, delta)
        ratios.append((error.norm() / law.norm()).item())
        remainders.append((error - law).norm().item())
    assert ratios == pytest.approx([1, 1, 1], abs=0.01)
    slopes = [math.log10(larger / smaller) for larger, smaller in pairwise(remainders)]
    assert slopes == pytest.approx([2, 2], abs=0.1), remainders


@pytest.mark.parametrize(("attack", "options"), [
    ("gauss-newton", {}),
    ("gauss-newton", {"solver": "cg"}),
    ("lbfgs", {"iterations": 3000, "loss_tolerance": 0.0}),
])  # fmt: skip
def test_from_a_random_start_the_error_is_the_influence(attack, options):
    adapter, batch, shared = case("lenet")
    std = 1e-5
    noisy, _ = perturbed(shared, std, seed=4)
    influence = lmleak.inversion_influence(adapter, batch, noise_std=std, damping=0.0, shared="all", seed=4)
    recovered = run_attack(attack, adapter, noisy, seed=1, **options)
    error = recovered.images - batch.inputs["pixel_values"]
    assert 0.99 < error.norm().item() / influence.influence.l2 < 1.01, recovered.stopped


def test_map_error_is_the_damped_influence_and_saturates():
    adapter, batch, shared = case("lenet")
    x0 = batch.inputs["pixel_values"]
    jacobian = GradientJacobian(adapter, batch, shared="all", implementation="dense")
    mean, tau = adapter.prior().mean, adapter.prior().std
    errors = {}
    for sigma in (1e-4, 10.0):
        noisy, delta = perturbed(shared, sigma)
        weight = sigma**2 / tau**2
        found = levenberg_marquardt(problem_of(adapter, noisy), x0, prior_weight=weight, iterations=200)
        error = (found.images - x0).reshape(-1)
        errors[sigma] = error.square().mean().sqrt().item()
        if sigma < 1:  # (A + w I) d = J delta - w (x0 - mean)
            drawn = predicted_error(jacobian, delta, weight)
            dense = jacobian.to_dense()
            damped = dense @ dense.T + weight * torch.eye(len(dense)).to(dense)
            law = drawn - weight * torch.linalg.solve(damped, (x0 - mean).reshape(-1))
            assert (error - law).norm() <= 0.05 * law.norm()
        else:
            undamped = predicted_error(jacobian, delta).square().mean().sqrt().item()
            assert undamped > 20 * errors[sigma]
    assert errors[1e-4] < 0.1
    assert errors[10.0] < 1.5 * tau  # the mean of the prior errs by tau


@pytest.mark.parametrize(("attack", "options"), [
    ("gauss-newton", {"iterations": 50}),
    ("gauss-newton", {"iterations": 50, "solver": "cg"}),
    ("gauss-newton", {"iterations": 50, "start": "mean"}),
    ("gauss-newton", {"iterations": 50, "labels": "inferred"}),
    ("lbfgs", {"loss_tolerance": 1e-22}),
    ("lbfgs", {"objective": "cosine", "loss_tolerance": 0.0}),
])  # fmt: skip
def test_a_clean_gradient_gives_the_image_away(attack, options):
    adapter, batch, shared = case("lenet")
    recovered = run_attack(attack, adapter, shared, seed=1, **options)
    error = (recovered.images - batch.inputs["pixel_values"]).abs().max().item()
    assert error < (1e-6 if attack == "gauss-newton" else 1e-3), (error, recovered.stopped)
    assert recovered.labels.tolist() == [3]
    *others, note = recovered.notes
    assert "the gradient was matched" in note
    assert len(others) == ("labels" in options)  # how they were inferred
    if attack == "gauss-newton":
        assert recovered.stopped.startswith("converged")
        assert recovered.cost.iterations < 50


def test_float32_reaches_its_own_rounding():
    adapter, batch, shared = case("lenet", dtype=torch.float32)
    recovered = run_attack("gauss-newton", adapter, shared, seed=1)
    assert recovered.stopped.startswith("converged")
    assert recovered.objective < 1e-11
    assert (recovered.images - batch.inputs["pixel_values"]).abs().max() < 1e-3


def test_batches_are_recovered_jointly_up_to_their_order():
    adapter, batch, shared = case("lenet", size=2)
    recovered = run_attack("gauss-newton", adapter, shared, seed=1, restarts=4).images
    truth = batch.inputs["pixel_values"]
    assert (recovered - truth).abs().max() < 1e-6  # labels differ, so the order is known


def test_local_steps_are_simulated():
    adapter, batch, _ = case("lenet", size=2)
    aggregation = Aggregation(epochs=2, steps_per_epoch=1, learning_rate=0.1)
    shared = lmleak.capture_gradient(adapter, batch, shared="all", aggregation=aggregation)
    recovered = run_attack("gauss-newton", adapter, shared, seed=1, restarts=4)
    assert (recovered.images - batch.inputs["pixel_values"]).abs().max() < 1e-6


def test_pruned_coordinates_are_not_compared():
    adapter, batch, shared = case("lenet")
    pruned = Prune(ratio=0.5)(shared)
    aware = run_attack("gauss-newton", adapter, pruned, seed=1)
    assert (aware.images - batch.inputs["pixel_values"]).abs().max() < 1e-6
    naive = run_attack("gauss-newton", adapter, pruned, seed=1, mask_zeros=False)
    assert (naive.images - batch.inputs["pixel_values"]).abs().max() > 1e-3


def test_costs_are_counted_in_gradients():
    adapter, _, shared = case("lenet")
    problem = problem_of(adapter, shared)
    start = problem.start(torch.Generator().manual_seed(1))
    levenberg_marquardt(problem, start, iterations=1)
    dx = start.numel()
    # One linearisation (a double backward, the graph of J^T, dx rows), and the objective after the step.
    assert problem.evaluations == 3 + PRODUCT * (1 + dx) + 1
    residual_at(problem, start)
    assert problem.evaluations == 3 + PRODUCT * (1 + dx) + 2
    lbfgs = run_attack("lbfgs", adapter, shared, seed=1, iterations=5)
    assert lbfgs.cost.iterations == 5
    assert lbfgs.stopped == "iteration limit"
    assert lbfgs.cost.gradient_evaluations % 3 == 0
    assert lbfgs.cost.gradient_evaluations >= 15


def test_restarts_end_with_a_match_and_the_best_is_returned():
    adapter, _, shared = case("lenet")
    one, many = (run_attack("gauss-newton", adapter, shared, seed=1, restarts=r) for r in (1, 3))
    assert torch.equal(one.images, many.images)
    assert one.cost.iterations == many.cost.iterations
    short = [run_attack("lbfgs", adapter, shared, seed=1, restarts=r, iterations=2) for r in (1, 4)]
    assert short[1].objective <= short[0].objective
    assert short[1].cost.iterations == 8


def test_objective_never_rises_with_more_iterations():
    adapter, _, shared = case("lenet")
    noisy, _ = perturbed(shared, 0.3)
    problem = problem_of(adapter, noisy)
    start = problem.start(torch.Generator().manual_seed(2))
    values = [levenberg_marquardt(problem, start, iterations=n).objective for n in (1, 3, 6, 12)]
    assert values == sorted(values, reverse=True)
    assert values[0] <= residual_at(problem, start).square().sum().item()


def test_the_truth_at_a_clean_gradient_is_a_solution():
    adapter, batch, shared = case("lenet")
    x0 = batch.inputs["pixel_values"]
    found = levenberg_marquardt(problem_of(adapter, shared), x0)
    assert found.iterations == 0
    assert found.stopped == "converged: the gradient is matched to rounding"
    assert torch.equal(found.images, x0)


def test_the_solver_follows_the_size():
    for size, expected in ((SIZE, "dense"), (28, "cg")):
        adapter = adapt(LeNet(size=size))
        batch = adapter.batch(torch.zeros(1, 1, size, size), [0])
        problem = problem_of(adapter, lmleak.capture_gradient(adapter, batch, shared="all"))
        assert solver_for(problem, "auto") == expected
        assert solver_for(problem, "dense") == "dense"


@pytest.mark.slow
def test_a_digit_is_recovered_from_a_random_start(real_data):
    with gzip.open(real_data / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16 : 16 + 784]), dtype=torch.uint8).reshape(1, 1, 28, 28) / 255
    normalization = Normalization((0.1307,), (0.3081,))
    adapter = adapt(LeNet(), normalization=normalization)
    shared = lmleak.capture_gradient(adapter, adapter.batch(normalization.normalize(pixels), [7]), shared="all")
    recovered = run_attack("gauss-newton", adapter, shared)
    error = (normalization.pixels(recovered.images) - pixels).square().mean().item()
    assert -10 * math.log10(error) > 90, recovered.stopped
    assert recovered.cost.iterations < 50


def test_refusals_say_what_to_write():
    adapter, batch, shared = case("lenet")
    for attack, options, message in [
        ("gauss-newton", {"damping": 0.0}, "damping must be above 0"),
        ("gauss-newton", {"prior_weight": -1.0}, "prior_weight must be a number from 0"),
        ("gauss-newton", {"solver": "dens"}, "Did you mean 'dense'"),
        ("gauss-newton", {"start": "means"}, "Did you mean 'mean'"),
        ("lbfgs", {"objective": "cosin"}, "Did you mean 'cosine'"),
        ("lbfgs", {"iterations": 0}, "iterations must be an integer of at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_attack(attack, adapter, shared, **options)
    with pytest.raises(DataError, match="start has shape"):
        levenberg_marquardt(problem_of(adapter, shared), batch.inputs["pixel_values"][0])
    with pytest.raises(DataError, match="not finite"):
        levenberg_marquardt(problem_of(adapter, shared), batch.inputs["pixel_values"] * math.inf)
