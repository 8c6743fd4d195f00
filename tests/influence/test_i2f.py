"""I2F and its bounds against dense algebra; sweeps; what is refused."""

import dataclasses
import itertools
import math

import pytest
import torch

from lmleak.adapters import adapt
from lmleak.defenses import GaussianNoise
from lmleak.errors import ConfigError, DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import (
    CosineJacobian,
    GradientJacobian,
    InfluenceSolver,
    attacker_jacobian,
    inversion_influence,
)
from lmleak.influence.solver import RELATIVE_DAMPING
from tests.families import FAMILIES, build, make


def dense(adapter, batch, attacker="l2"):
    """Return J (dx, P) of the attacker, and the operator."""
    jacobian = attacker_jacobian(adapter, batch, shared="no-word-embeddings", attacker=attacker)
    if attacker == "l2":
        return jacobian.to_dense(), jacobian
    rows = [
        torch.cat([t.reshape(-1) for t in jacobian.rmatvec(jacobian.unflatten(row)).values()])
        for row in torch.eye(jacobian.dx, dtype=torch.float64)
    ]
    return torch.stack(rows), jacobian


@pytest.mark.parametrize("name", FAMILIES)
def test_chain_of_bounds(name, problems):
    """I_lb <= every CG bound <= undamped I2F = ||J^+T delta||, and every damped I2F lies below it."""
    adapter, batch = make(name, size=1)
    matrix, jacobian = dense(adapter, batch)
    delta = problems.like_theta(jacobian)
    result = inversion_influence(adapter, batch, perturbation=delta, damping=0.0, tol=1e-6)
    exact = torch.linalg.lstsq(matrix.T, problems.flat(delta, jacobian.parameter_names), driver="gelsd",
                               rcond=1e-11).solution.norm().item()  # fmt: skip
    slack = 1 + 1e-9
    assert 0 < result.lower_bound.l2 <= result.cg_bounds[0] * slack
    assert all(a <= b * slack for a, b in itertools.pairwise(result.cg_bounds))
    assert result.cg_bounds[-1] <= exact * slack
    assert result.cg_bound.l2 == result.cg_bounds[-1]
    b = matrix @ problems.flat(delta, jacobian.parameter_names)
    a = matrix @ matrix.T
    assert result.cg_bounds[0] == pytest.approx((b.norm() ** 3 / (b @ a @ b)).item(), rel=1e-9)
    top = torch.linalg.eigvalsh(a)[-1].item()
    assert top <= result.lambda_max <= top * (1 + 2e-3 + 1e-9)
    assert result.lower_bound.l2 == pytest.approx(b.norm().item() / result.lambda_max, rel=1e-9)
    for damping in (1e-3 * top, 1e-6 * top):
        damped = inversion_influence(adapter, batch, perturbation=delta, damping=damping)
        assert damped.influence.l2 <= exact * slack
        assert damped.converged
        identity = torch.eye(len(a), dtype=torch.float64)
        true = torch.linalg.solve(a + damping * identity, b).norm().item()
        for products in (2, 6):  # stopped early: an interval is left
            early = inversion_influence(adapter, batch, perturbation=delta, damping=damping, max_products=products)
            assert early.influence.l2 <= true * slack
            assert true <= early.upper_bound.l2 * slack
        assert damped.influence.l2 <= true * slack <= damped.upper_bound.l2 * slack**2 < 1.011 * true


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "roberta"])
@pytest.mark.parametrize("attacker", ["l2", "cosine"])
def test_damped_influence_is_the_solution_of_the_dense_system(name, attacker, problems):
    adapter, batch = make(name, size=1)
    matrix, jacobian = dense(adapter, batch, attacker)
    delta = problems.like_theta(jacobian)
    a = matrix @ matrix.T
    b = matrix @ problems.flat(delta, jacobian.parameter_names) * jacobian.perturbation_scale
    top = torch.linalg.eigvalsh(a)[-1].item()
    for damping in (top, 1e-2 * top, 1e-4 * top):
        result = inversion_influence(
            adapter, batch, perturbation=delta, damping=damping, attacker=attacker, tol=1e-10, max_products=2000
        )
        expected = torch.linalg.solve(a + damping * torch.eye(len(a), dtype=a.dtype), b)
        assert result.converged
        assert result.residual <= 1e-10
        error = jacobian.flatten(result.error)
        assert (error - expected).norm() <= 1e-6 * expected.norm()
        assert result.influence.l2 == pytest.approx(expected.norm().item(), rel=1e-6)
        assert result.influence.rms == pytest.approx(result.influence.l2 / math.sqrt(jacobian.dx), rel=1e-12)
        assert result.damping == damping
        assert result.dx == jacobian.dx
        assert result.error[~jacobian.free].abs().sum() == 0


def test_cosine_perturbation_is_scaled_by_the_norm_of_the_gradient(problems):
    adapter, batch = make("bert", size=1)
    jacobian = attacker_jacobian(adapter, batch, shared="no-word-embeddings", attacker="cosine")
    assert isinstance(jacobian, CosineJacobian)
    gradient = capture_gradient(adapter, batch).gradient
    norm = problems.flat(gradient, jacobian.parameter_names).norm().item()
    assert jacobian.perturbation_scale == pytest.approx(1 / norm, rel=1e-12)
    along = inversion_influence(adapter, batch, perturbation=gradient, attacker="cosine")
    across = inversion_influence(adapter, batch, perturbation=problems.like_theta(jacobian), attacker="cosine")
    assert along.influence.l2 < 1e-8 * across.influence.l2  # lengthening the gradient hides nothing from it


class TestPerturbations:
    def test_noise_by_level_is_the_defense_of_that_level(self):
        adapter, batch = make("bert", size=2)
        true = capture_gradient(adapter, batch)
        delta = GaussianNoise(std=0.02, seed=5)(true).perturbation_from(true)
        by_delta = inversion_influence(adapter, batch, perturbation=delta, damping=1e-3, tol=1e-8, seed=5)
        by_level = inversion_influence(adapter, batch, noise_std=0.02, damping=1e-3, tol=1e-8, seed=5)
        assert by_delta.influence.l2 == pytest.approx(by_level.influence.l2, rel=1e-6)
        assert torch.allclose(by_delta.error, by_level.error, rtol=1e-5, atol=1e-9)
        other = inversion_influence(adapter, batch, noise_std=0.02, damping=1e-3, seed=6)
        assert other.influence.l2 != pytest.approx(by_level.influence.l2, rel=1e-6)

    @pytest.mark.parametrize("factor", [1e-12, 3.0, 1e12])
    def test_influence_is_linear_in_the_noise_at_equal_damping(self, factor):
        adapter, batch = make("gpt2", size=1)
        one, more = (inversion_influence(adapter, batch, noise_std=s, damping=1e-3) for s in (1e-2, factor * 1e-2))
        assert more.influence.l2 == pytest.approx(factor * one.influence.l2, rel=1e-12)
        assert more.lower_bound.l2 == pytest.approx(factor * one.lower_bound.l2, rel=1e-12)
        assert more.cg_bounds == pytest.approx([factor * b for b in one.cg_bounds], rel=1e-12)

    @pytest.mark.parametrize("damping", [None, 0.0, 1e-2])
    def test_a_zero_perturbation_has_no_influence(self, damping):
        adapter, batch = make("gpt2", size=1)
        names = adapter.select("no-word-embeddings").names
        zero = {n: torch.zeros_like(adapter.parameters()[n]) for n in names}
        for delta in (zero, {}):
            result = inversion_influence(adapter, batch, perturbation=delta, damping=damping)
            assert (result.influence.l2, result.lower_bound.l2, result.cg_bound.l2) == (0, 0, 0)
            assert result.converged
            assert result.error.abs().max() == 0
        silent = inversion_influence(adapter, batch, noise_std=0.0, damping=damping)
        assert (silent.influence.l2, silent.lower_bound.l2, silent.cg_bound.l2) == (0, 0, 0)

    def test_a_part_of_the_parameters_may_be_perturbed(self, problems):
        adapter, batch = make("gpt2", size=1)
        delta = problems.like_theta(GradientJacobian(adapter, batch))
        part = {n: d for n, d in delta.items() if ".h.0." in n}
        padded = {n: part.get(n, torch.zeros_like(d)) for n, d in delta.items()}
        got, expected = (
            inversion_influence(adapter, batch, perturbation=p, damping=1e-3, tol=1e-8) for p in (part, padded)
        )
        assert got.influence.l2 == pytest.approx(expected.influence.l2, rel=1e-9)

    def test_default_damping_is_relative_to_the_largest_eigenvalue(self):
        adapter, batch = make("gpt2", size=1)
        matrix, _ = dense(adapter, batch)
        top = torch.linalg.eigvalsh(matrix @ matrix.T)[-1].item()
        small, large = (inversion_influence(adapter, batch, noise_std=s) for s in (1e-6, 1e3))
        assert small.damping == large.damping == pytest.approx(RELATIVE_DAMPING * top, rel=1e-2)


class TestSweep:
    def test_it_equals_separate_calls_and_costs_one_solve(self, problems):
        adapter, batch = make("llama", size=1)
        jacobian = GradientJacobian(adapter, batch)
        levels, dampings = [1e-4, 1.0], [1.0, 1e-2]
        solver = InfluenceSolver(jacobian, adapter.prior(), tol=1e-6, max_products=1000)
        swept = solver.sweep(levels, dampings)
        assert [[r.damping for r in row] for row in swept] == [dampings] * 2
        costs = []
        for level, row in zip(levels, swept, strict=True):
            for damping, got in zip(dampings, row, strict=True):
                alone = inversion_influence(
                    adapter, batch, noise_std=level, damping=damping, tol=1e-6, max_products=1000
                )
                costs.append(alone.products)
                assert got.influence.l2 == pytest.approx(alone.influence.l2, rel=1e-5)
                assert got.lower_bound.l2 == pytest.approx(alone.lower_bound.l2, rel=1e-9)
                assert torch.allclose(got.error, alone.error, rtol=1e-3, atol=1e-5 * alone.error.abs().max().item())
        assert solver.operator.products <= 1.2 * max(costs)
        assert swept[0][0].products == solver.operator.products

    def test_one_run_brackets_the_eigenvalue_and_solves_for_the_noise(self):
        adapter, batch = make("gpt2", size=1)
        solver = InfluenceSolver(GradientJacobian(adapter, batch), adapter.prior(), seed=4)
        response = solver.respond(solver.noise())
        assert solver.operator.products == response.krylov.dimension == response.products
        assert 0 < solver.lambda_max.iterations < response.krylov.dimension
        held = solver.respond(dict(solver.noise()))  # the same noise, of which the solver cannot know that it is
        assert solver.operator.products == 2 * response.products
        assert held.products == response.products + solver.lambda_max.iterations
        assert torch.equal(held.krylov.basis, response.krylov.basis)
        other = solver.respond(InfluenceSolver(solver.jacobian, adapter.prior(), seed=5).noise())
        assert not torch.equal(other.krylov.basis[0], response.krylov.basis[0])

    def test_the_order_of_calls_changes_no_number(self):
        adapter, batch = make("gpt2", size=1)
        jacobian = GradientJacobian(adapter, batch)
        one, other = (InfluenceSolver(jacobian, adapter.prior()) for _ in range(2))
        top = one.lambda_max.value
        loose = one.respond(one.noise(), [1e-2 * top])
        before = loose.influence(1e-2 * top)
        one.respond(one.noise(), [1e-6 * top])  # continues the run that both read
        other.respond(other.noise(), [1e-6 * top])
        after = other.respond(other.noise(), [1e-2 * top])
        for again in (loose.influence(1e-2 * top), after.influence(1e-2 * top)):
            assert torch.equal(again.error, before.error)
            assert dataclasses.replace(again, error=before.error) == before

    def test_more_perturbations_share_the_eigenvalue(self, problems):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch)
        solver = InfluenceSolver(jacobian, adapter.prior())
        first = solver.solve(problems.like_theta(jacobian, seed=1), damping=1e-2)
        second = solver.solve(problems.like_theta(jacobian, seed=2), damping=1e-2)
        assert second.lambda_max == first.lambda_max
        shared = solver.lambda_max.iterations
        assert first.products + second.products == solver.operator.products + shared

    def test_one_response_answers_any_damping_above_its_own(self, problems):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch)
        solver = InfluenceSolver(jacobian, adapter.prior(), tol=1e-6)
        delta = problems.like_theta(jacobian)
        response = solver.respond(delta, [1e-3])
        spent = solver.operator.products
        for damping in (1e-3, 1e-2, 10.0):
            result = response.influence(damping, scale=2.0)
            assert result.converged
            alone = inversion_influence(adapter, batch, perturbation=delta, damping=damping, tol=1e-6)
            assert result.influence.l2 == pytest.approx(2 * alone.influence.l2, rel=1e-5)
        assert solver.operator.products == spent

    @pytest.mark.parametrize("levels", [[-1e-3], [float("nan")], [float("inf")], [1e-3, -1.0]])
    def test_levels_that_cannot_be_are_refused(self, levels):
        adapter, batch = make("bert", size=1)
        solver = InfluenceSolver(GradientJacobian(adapter, batch), adapter.prior())
        with pytest.raises(ConfigError, match="finite number >= 0"):
            solver.sweep(levels)


class TestShortRuns:
    @pytest.mark.parametrize("max_products", [1, 2, 5])
    def test_a_run_cut_short_is_flagged_and_still_a_lower_bound(self, max_products, problems):
        adapter, batch = make("llama", size=1)
        matrix, jacobian = dense(adapter, batch)
        delta = problems.like_theta(jacobian)
        result = inversion_influence(adapter, batch, perturbation=delta, damping=1e-4, max_products=max_products)
        assert not result.converged
        assert result.residual > 1e-3
        b, a = matrix @ problems.flat(delta, jacobian.parameter_names), matrix @ matrix.T
        exact = torch.linalg.solve(a + 1e-4 * torch.eye(len(a), dtype=a.dtype), b).norm().item()
        assert 0 < result.influence.l2 < exact
        assert 0 < result.lower_bound.l2 < exact
        assert result.cg_bound.l2 <= torch.linalg.lstsq(matrix.T, problems.flat(
            delta, jacobian.parameter_names), driver="gelsd", rcond=1e-11).solution.norm().item()  # fmt: skip
        assert result.lambda_max >= torch.linalg.eigvalsh(a)[-1].item()
        assert len(result.cg_bounds) <= max_products
        assert result.products <= 2 * max_products

    def test_the_eigenvalue_bracket_says_how_wide_it_is(self):
        adapter, batch = make("llama", size=1)
        short = inversion_influence(adapter, batch, noise_std=1e-2, max_products=2)
        long = inversion_influence(adapter, batch, noise_std=1e-2)
        assert short.lambda_max_residual > 2e-3 >= long.lambda_max_residual >= 0
        assert short.failure_probability == long.failure_probability == 1e-3
        assert short.lower_bound.l2 < long.lower_bound.l2


class TestRefusals:
    def test_one_of_noise_and_perturbation(self):
        adapter, batch = make("bert", size=1)
        for arguments in ({}, {"noise_std": 1e-3, "perturbation": {}}):
            with pytest.raises(ConfigError, match="exactly one of noise_std= and perturbation="):
                inversion_influence(adapter, batch, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"noise_std": -1.0}, "finite number >= 0"),
            ({"noise_std": 1.0, "damping": -1.0}, "dampings"),
            ({"noise_std": 1.0, "damping": float("nan")}, "dampings"),
            ({"noise_std": 1.0, "tol": 0.0}, "tol is a relative residual"),
            ({"noise_std": 1.0, "max_products": 0}, "max_products"),
            ({"noise_std": 1.0, "attacker": "cosin"}, "Did you mean 'cosine'"),
            ({"noise_std": 1.0, "shared": "heads"}, "Did you mean 'head'"),
            ({"noise_std": 1.0, "implementation": "autodif"}, "Did you mean 'autodiff'"),
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, arguments, message):
        adapter, batch = make("bert", size=1)
        with pytest.raises(ConfigError, match=message):
            inversion_influence(adapter, batch, **arguments)

    def test_perturbations_of_something_else_are_refused(self):
        adapter, batch = make("bert", size=1)
        with pytest.raises(DataError, match="not among the shared parameters"):
            inversion_influence(adapter, batch, perturbation={"transformer.wte.weight": torch.zeros(60, 16)})
        with pytest.raises(DataError, match="expected"):
            inversion_influence(adapter, batch, perturbation={"classifier.bias": torch.zeros(4)})
        with pytest.raises(DataError, match="NaN or Inf"):
            inversion_influence(adapter, batch, perturbation={"classifier.bias": torch.full((3,), torch.nan)})


def test_a_gradient_that_does_not_move_with_x_has_no_influence(problems):
    """W = 0: the bias gradient p - e_y is the same for every x, and A = 0."""
    adapter, batch, *_ = problems.linear_softmax(scale=0.0)
    with pytest.raises(DataError, match="I2F does not exist"):
        inversion_influence(adapter, batch, noise_std=1e-2, shared="bias")


class TestPredictedError:
    """The MAP attacker: (A + d I)^-1 (J delta - d (x - mu)), d = sigma^2 / tau^2."""

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_it_solves_the_dense_system(self, name, problems):
        adapter, batch = make(name, size=1)
        matrix, jacobian = dense(adapter, batch)
        a, delta = matrix @ matrix.T, problems.like_theta(jacobian)
        b = matrix @ problems.flat(delta, jacobian.parameter_names)
        prior, x = adapter.prior(), jacobian.flatten(jacobian.x)
        deviation = x - jacobian.flatten(prior.mean.expand_as(jacobian.x))
        solver = InfluenceSolver(jacobian, prior, tol=1e-8, max_products=2000)
        top = torch.linalg.eigvalsh(a)[-1].item()
        for share in (10.0, 1e-1, 1e-3):
            sigma = math.sqrt(share * top) * prior.std
            got = solver.respond(delta, [share * top]).predicted_error(sigma, scale=sigma)
            expected = torch.linalg.solve(
                a + share * top * torch.eye(len(a), dtype=a.dtype), sigma * b - share * top * deviation
            )
            assert got.converged
            assert got.damping == pytest.approx(share * top, rel=1e-12)
            assert got.error.l2 == pytest.approx(expected.norm().item(), rel=1e-2)

    def test_a_gradient_linear_in_x_gives_the_exact_attacker(self, problems):
        """W = 0: g = (r x^T, r) with constant r, A = ||r||^2 I, and the MAP estimate has no higher order."""
        adapter, batch, *_ = problems.linear_softmax(scale=0.0)
        jacobian = GradientJacobian(adapter, batch)
        delta, x = problems.like_theta(jacobian), batch.inputs["pixel_values"].flatten()
        p = torch.full((5,), 0.2, dtype=torch.float64)
        r = p - torch.eye(5, dtype=torch.float64)[0]
        for sigma in (1e-3, 1.0, 100.0):
            damping = sigma**2  # tau = 1
            released = torch.outer(r, x) + sigma * delta["1.weight"]
            estimate = r @ released / (r.dot(r) + damping)  # argmin ||r x^T - released||^2 + damping ||x||^2
            solver = InfluenceSolver(jacobian, adapter.prior())
            got = solver.respond(delta).predicted_error(sigma, scale=sigma)
            assert got.error.l2 == pytest.approx((estimate - x).norm().item(), rel=1e-6)
            assert got.converged

    def test_it_saturates_where_influence_does_not(self):
        adapter, batch = make("gpt2", size=1)
        jacobian = GradientJacobian(adapter, batch)
        solver = InfluenceSolver(jacobian, adapter.prior())
        response = solver.respond(solver.noise())
        far = response.predicted_error(1e6, scale=1e6)
        assert far.converged
        assert far.error.l2 == pytest.approx(solver.deviation.norm().item(), rel=1e-3)
        assert response.influence(solver.default_damping, scale=1e6).influence.l2 > 10 * far.error.l2

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_undetermined_share(self, name):
        """||d (A + d I)^-1 (x - mu)||^2 / ||x - mu||^2, against the dense resolvent."""
        adapter, batch = make(name, size=1)
        matrix, jacobian = dense(adapter, batch)
        solver = InfluenceSolver(jacobian, adapter.prior())
        values, vectors = torch.linalg.eigh(matrix @ matrix.T)
        coefficients = vectors.T @ solver.deviation

        def expected(damping):
            return (
                (damping / (values.clamp(min=0) + damping) * coefficients).norm() / coefficients.norm()
            ).item() ** 2

        for share in (1e3, 1.0, 1e-2, 1e-4, RELATIVE_DAMPING):
            damping = share * values[-1].item()
            assert solver.undetermined_share(damping) == pytest.approx(expected(damping), rel=2e-2)
        for share in (1e-7, 1e-10):  # Gauss quadrature: below what the run resolves it is still a lower bound
            damping = share * values[-1].item()
            assert solver.undetermined_share(damping) <= expected(damping) * (1 + 1e-6)


def test_vision_and_text_share_every_number(problems):
    adapter, batch = problems.small_lenet()
    matrix, jacobian = dense(adapter, batch)
    delta = problems.like_theta(jacobian)
    result = inversion_influence(adapter, batch, perturbation=delta, damping=0.0, tol=1e-8, max_products=500)
    exact = torch.linalg.lstsq(matrix.T, problems.flat(delta, jacobian.parameter_names), driver="gelsd").solution
    assert result.converged
    assert result.influence.l2 == pytest.approx(exact.norm().item(), rel=1e-6)


class TestDeterminism:
    def test_the_same_seed_gives_the_same_numbers(self):
        adapter, batch = make("bert", size=2)
        first, second = (inversion_influence(adapter, batch, noise_std=1e-2, seed=3) for _ in range(2))
        assert first.influence == second.influence
        assert first.lower_bound == second.lower_bound
        assert first.cg_bounds == second.cg_bounds
        assert torch.equal(first.error, second.error)

    def test_float32_agrees_with_float64(self):
        numbers = []
        for dtype in (torch.float32, torch.float64):
            _, model = build("bert", dtype=torch.float32)
            adapter = adapt(model.to(dtype), task="sequence-classification")
            batch = adapter.batch([[7, 12, 33, 41]], [1])
            numbers.append(inversion_influence(adapter, batch, noise_std=1e-2, damping=1e-2, tol=1e-5))
        single, double = numbers
        assert single.error.dtype == torch.float32
        assert single.influence.l2 == pytest.approx(double.influence.l2, rel=1e-4)
        assert single.lower_bound.l2 == pytest.approx(double.lower_bound.l2, rel=1e-3)


@pytest.mark.parametrize("case", ["dead", "underflow"])
def test_a_jacobian_of_zeros_has_no_influence(case):
    """An I2F of 0 would say that noise protects nothing; here nothing leaks, or nothing is resolved."""
    act = torch.nn.ReLU() if case == "dead" else torch.nn.Tanh()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 5), act, torch.nn.Linear(5, 3))
    with torch.no_grad():
        if case == "dead":
            model[1].bias.fill_(-1e3)
        else:
            for p in model.parameters():
                p.mul_(1e-25)
    adapter = adapt(model)
    batch = adapter.batch(torch.linspace(-1, 1, 6).view(1, 1, 2, 3), torch.tensor([1]))
    with pytest.raises(DataError, match="float64"):
        inversion_influence(adapter, batch, noise_std=1e-3, damping=1e-2)
