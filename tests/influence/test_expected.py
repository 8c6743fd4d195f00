"""Averages over noise: dense traces, Monte Carlo, limits, rank.

The operator is the dense one where it is not itself under test: it is exact and its products cost nothing here.
"""

import itertools
import math

import pytest
import torch

from lmleak.errors import ConfigError
from lmleak.influence import GradientJacobian, InfluenceSolver, expected_influence, sample_spectrum
from tests.families import SEQUENCES, make


def eigenvalues(jacobian):
    matrix = jacobian.to_dense()
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_exact_spectrum_gives_the_dense_traces(name):
    adapter, batch = make(name, size=2)
    jacobian = GradientJacobian(adapter, batch, implementation="dense")
    values, dx, tau = eigenvalues(jacobian), jacobian.dx, adapter.prior().std
    spectrum = sample_spectrum(jacobian, exact_below=dx)
    assert spectrum.products == dx
    levels, damping = [1e-3, 1e-1, 10.0], 1e-3 * values[-1].item()
    for level, got in zip(levels, expected_influence(spectrum, levels, tau, damping=damping), strict=True):
        d = (level / tau) ** 2
        expected = {
            "response": level * (values / (values + damping) ** 2).sum().sqrt().item(),
            "bayes": level * (1 / (values + d)).sum().sqrt().item(),
        }
        for field, l2 in expected.items():
            assert getattr(got, field).l2 == pytest.approx(l2, rel=1e-8)
            assert getattr(got, field).rms == pytest.approx(l2 / math.sqrt(dx), rel=1e-8)
        assert got.effective_rank == pytest.approx((values / (values + d)).sum().item(), rel=1e-8)
        assert got.information == pytest.approx(0.5 * torch.log1p(values / d).sum().item(), rel=1e-8)
        assert (got.response_std_error, got.bayes_std_error) == (0.0, 0.0)
        assert got.response_converged
        assert got.bayes_converged
        assert (got.noise_std, got.damping, got.products) == (level, damping, dx)


def test_response_is_the_mean_of_i2f_over_noise(problems):
    """200 draws of the noise through the solver itself, within four standard errors."""
    adapter, batch, *_ = problems.linear_softmax()
    jacobian = GradientJacobian(adapter, batch)
    sigma, damping = 0.3, 0.1
    (got,) = expected_influence(sample_spectrum(jacobian, exact_below=9), [sigma], 1.0, damping=damping)
    squares = []
    for seed in range(200):
        solver = InfluenceSolver(jacobian, adapter.prior(), tol=1e-6, seed=seed)
        squares.append(solver.respond(solver.noise(), [damping]).influence(damping, scale=sigma).influence.l2 ** 2)
    squares = torch.tensor(squares)
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - got.response.l2**2) < 4 * error
    assert error < 0.1 * squares.mean()


def test_bayes_is_the_error_of_the_posterior_mean(problems):
    """x ~ N(mu, tau^2 I) seen through J with noise: 4000 draws of the linear problem, within four standard errors."""
    adapter, batch = make("bert", size=1)
    jacobian = GradientJacobian(adapter, batch, implementation="dense")
    matrix, tau = jacobian.to_dense(), 0.7
    values = eigenvalues(jacobian)
    sigma = tau * math.sqrt(1e-2 * values[-1].item())
    (got,) = expected_influence(sample_spectrum(jacobian, exact_below=1000), [sigma], tau, damping=1e-3)
    d = (sigma / tau) ** 2
    x, noise = tau * problems.randn(4000, jacobian.dx), sigma * problems.randn(4000, matrix.shape[1], seed=1)
    released = x @ matrix + noise
    estimate = torch.linalg.solve(
        matrix @ matrix.T + d * torch.eye(jacobian.dx, dtype=matrix.dtype), matrix @ released.T
    ).T
    squares = (estimate - x).square().sum(1)
    assert abs(squares.mean() - got.bayes.l2**2) < 4 * squares.std() / math.sqrt(4000)


class TestLimits:
    def test_never_above_the_prior_and_equal_to_it_for_huge_noise(self):
        adapter, batch = make("bert", size=2)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        tau = adapter.prior().std
        levels = [10.0**k for k in range(-6, 7)]
        averages = expected_influence(sample_spectrum(jacobian, exact_below=1000), levels, tau, damping=1e-3)
        rms = [average.bayes.rms for average in averages]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(rms))
        assert all(r <= tau * (1 + 1e-12) for r in rms)
        assert rms[-1] == pytest.approx(tau, rel=1e-6)
        assert averages[-1].effective_rank == pytest.approx(0.0, abs=1e-4)
        assert averages[-1].information == pytest.approx(0.0, abs=1e-4)

    def test_cramer_rao_for_small_noise_on_a_full_rank_problem(self, problems):
        adapter, batch, *_ = problems.linear_softmax()
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        values = eigenvalues(jacobian)
        assert values[0] > 1e-3 * values[-1]
        sigma = 1e-6
        (got,) = expected_influence(sample_spectrum(jacobian, exact_below=9), [sigma], 1.0, damping=0.0)
        bound = sigma * (1 / values).mean().sqrt().item()
        assert got.bayes.rms == pytest.approx(bound, rel=1e-6)
        assert got.response.rms == pytest.approx(bound, rel=1e-6)
        assert got.effective_rank == pytest.approx(9.0, rel=1e-6)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
    def test_effective_rank_tends_to_the_rank(self, name):
        adapter, batch = make(name)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        values = eigenvalues(jacobian)
        rank = int((values > 1e-12 * values[-1]).sum())
        level = adapter.prior().std * math.sqrt(1e-12 * values[-1].item())
        (got,) = expected_influence(
            sample_spectrum(jacobian, exact_below=1000), [level], adapter.prior().std, damping=1e-3
        )
        assert got.effective_rank == pytest.approx(rank, abs=0.5)


class TestNullSpace:
    """Directions of x that no gradient sees."""

    def null(self, name, size=3, **keywords):
        adapter, batch = make(name, size=size, **keywords)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        values, vectors = torch.linalg.eigh(jacobian.gram_operator().to_dense())
        return jacobian, vectors[:, values < 1e-13 * values[-1]]

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("name", ["llama", "llama-tied", "unlisted-gemma"])
    def test_the_last_position_of_a_causal_model(self, name, side):
        """Exactly D directions per sequence: the last token is predicted, its embedding is never read."""
        jacobian, null = self.null(name, padding_side=side)
        assert null.shape[1] == 3 * 16
        real = jacobian.free[..., 0]
        length = real.shape[1]
        for row, sequence in enumerate(SEQUENCES):
            last = length - 1 if side == "left" else len(sequence) - 1
            v = torch.zeros_like(jacobian.x)
            v[row, last] = 1.0 + torch.arange(16)
            assert jacobian.gram(v).abs().max() == 0

    @pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox"])
    def test_layer_norms_before_every_layer_remove_one_more_per_token(self, name):
        """GPT-2, OPT, GPT-NeoX: every reader subtracts the mean over D, so a constant per token is never seen."""
        _, null = self.null(name)
        tokens = sum(map(len, SEQUENCES))
        assert null.shape[1] == 3 * 16 + (tokens - 3)

    @pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "bert-mlm"])
    def test_the_embedding_layer_norm_removes_one_per_token(self, name):
        jacobian, null = self.null(name, size=2)
        tokens = sum(map(len, SEQUENCES[:2]))
        assert null.shape[1] == tokens
        constant = torch.ones_like(jacobian.x) * jacobian.free
        assert jacobian.gram(constant).norm() < 1e-10 * constant.norm()


class TestEstimate:
    def test_stochastic_estimates_lie_within_their_standard_errors(self):
        """Three seeds: |estimate - exact| <= 4 standard errors for each quantity, at every level."""
        adapter, batch = make("llama", size=1)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        top = eigenvalues(jacobian)[-1].item()
        tau = adapter.prior().std
        levels = [tau * math.sqrt(share * top) for share in (1e-1, 1e-3)]
        exact = expected_influence(sample_spectrum(jacobian, exact_below=1000), levels, tau, damping=1e-2 * top)
        for seed in range(3):
            spectrum = sample_spectrum(jacobian, num_probes=16, steps=40, seed=seed)
            for got, truth in zip(expected_influence(spectrum, levels, tau, damping=1e-2 * top), exact, strict=True):
                assert got.bayes_converged
                assert got.response_converged
                assert 0 < got.bayes_std_error < 0.1 * got.bayes.rms
                assert abs(got.bayes.rms - truth.bayes.rms) <= 4 * got.bayes_std_error
                assert abs(got.response.rms - truth.response.rms) <= 4 * got.response_std_error
                assert got.effective_rank == pytest.approx(truth.effective_rank, rel=0.2)
                assert got.information == pytest.approx(truth.information, rel=0.2)

    def test_a_short_run_says_so(self):
        adapter, batch = make("llama", size=2)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        spectrum = sample_spectrum(jacobian, num_probes=2, steps=3)
        assert spectrum.products == 6
        (got,) = expected_influence(spectrum, [1e-6], adapter.prior().std, damping=1e-9)
        assert not got.bayes_converged
        assert not got.response_converged
        assert got.products == 6

    def test_the_seed_decides_and_nothing_else(self):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch, implementation="dense")
        one, again, other = (
            expected_influence(sample_spectrum(jacobian, steps=5, seed=s), [0.1], 1.0, damping=1e-2)[0]
            for s in (1, 1, 2)
        )
        assert one == again
        assert one != other


@pytest.mark.parametrize(("levels", "tau"), [([0.0], 1.0), ([-1.0], 1.0), ([math.nan], 1.0), ([0.1], 0.0)])
def test_levels_that_cannot_be_are_refused(levels, tau):
    adapter, batch = make("bert", size=1)
    spectrum = sample_spectrum(GradientJacobian(adapter, batch, implementation="dense"), num_probes=2, steps=2)
    with pytest.raises(ConfigError, match="positive noise levels and prior"):
        expected_influence(spectrum, levels, tau, damping=1e-3)
