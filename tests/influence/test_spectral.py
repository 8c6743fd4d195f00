"""Spectral noise: the optimum in closed form, at equal norm above isotropic noise, drawn as promised."""

import pytest
import torch

from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, eigen_directions, spectral_noise

NORMS = (1e-3, 0.03, 0.3, 1.0, 3.0, 30.0, 1e3)


@pytest.fixture
def directions(problems):
    return eigen_directions(GradientJacobian(*problems.small_lenet()))


def posterior(variances, values, prior_std):
    """Sum of posterior variances by the textbook formula, over directions that carry noise."""
    on = variances > 0
    return (1 / (values[on] / variances[on] + 1 / prior_std**2)).sum().item()


@pytest.mark.parametrize("norm", NORMS)
def test_the_levels_are_optimal(norm, directions):
    """The error's slope in q_i is one number where there is noise and smaller where there is none."""
    tau = 0.7
    noise = spectral_noise(directions, norm=norm, prior_std=tau)
    assert noise.norm == pytest.approx(norm, rel=1e-10)
    q, a = noise.stds.square(), tau**2 * directions.values
    slope = tau**2 * a / (q + a) ** 2
    active = q > 0
    assert noise.num_directions == int(active.sum()) >= 1
    assert torch.allclose(slope[active], slope[active].mean().expand(int(active.sum())), rtol=1e-8)
    assert (slope[~active] <= slope[active].mean() * (1 + 1e-8)).all()
    assert noise.predicted_error.l2**2 == pytest.approx(posterior(q, directions.values, tau), rel=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_no_other_levels_of_equal_norm_do_better(norm, directions, problems):
    tau = 0.7
    noise = spectral_noise(directions, norm=norm, prior_std=tau)
    best = noise.predicted_error.l2**2
    isotropic = directions.bayes_error(norm / directions.jacobian.shape[1] ** 0.5, tau).l2 ** 2
    rowspace = posterior(torch.full_like(noise.stds, norm**2 / directions.dx), directions.values, tau)
    assert best > rowspace > isotropic
    for seed in range(20):
        other = problems.randn(directions.dx, seed=seed).exp() * noise.stds.square()
        other = norm**2 * other / other.sum()
        assert posterior(other, directions.values, tau) <= best * (1 + 1e-9)


def test_small_noise_goes_to_the_weakest_direction_and_large_noise_everywhere(directions):
    few = spectral_noise(directions, norm=1e-4, prior_std=1.0)
    assert few.num_directions == 1
    assert few.stds[-1] > 0
    lam = directions.values[-1].item()
    assert few.unbiased_error.l2 == pytest.approx(1e-4 / lam**0.5, rel=1e-9)
    many = spectral_noise(directions, norm=1e3, prior_std=1.0)
    assert many.num_directions == directions.dx
    assert many.predicted_error.rms == pytest.approx(1.0, rel=1e-3)


def test_the_closed_form_on_two_eigenvalues(problems):
    """Softmax regression on one pixel pair: levels by hand."""
    adapter, batch, *_ = problems.linear_softmax(channels=2, side=1, classes=3)
    directions = eigen_directions(GradientJacobian(adapter, batch))
    large, small = directions.values.sqrt().tolist()
    tau = 1.0
    edge = (small * (large - small)) ** 0.5  # the norm at which the second direction joins
    one = spectral_noise(directions, norm=0.5 * edge, prior_std=tau)
    assert one.stds.tolist() == pytest.approx([0.0, 0.5 * edge])
    both = spectral_noise(directions, norm=2 * edge, prior_std=tau)
    level = (4 * edge**2 + large**2 + small**2) / (large + small)
    expected = [(s * (level - s)) ** 0.5 for s in (large, small)]
    assert both.stds.tolist() == pytest.approx(expected)
    assert both.predicted_error.l2**2 == pytest.approx(2 - (large + small) / level)


def test_null_directions_carry_no_noise(problems):
    directions = eigen_directions(GradientJacobian(*problems.linear_softmax(batch=3, side=2, classes=2)[:2]))
    noise = spectral_noise(directions, norm=0.5, prior_std=1.2)
    assert noise.stds[directions.rank :].abs().max() == 0
    informed = posterior(noise.stds.square(), directions.values, 1.2)
    assert noise.predicted_error.l2**2 == pytest.approx(informed + 1.2**2 * directions.nullity)


def test_draws_have_the_covariance_and_move_the_attacker_as_predicted(directions):
    noise = spectral_noise(directions, norm=0.2, prior_std=0.7)
    names = directions.jacobian.parameter_names
    draws = [noise.draw(seed) for seed in range(300)]
    flat = torch.stack([torch.cat([d[n].flatten() for n in names]) for d in draws])
    squares = flat.square().sum(1)
    assert squares.mean().item() == pytest.approx(0.2**2, abs=4 * squares.std().item() / 300**0.5)
    errors = torch.stack([directions.influence(d).norm() ** 2 for d in draws])
    expected = noise.unbiased_error.l2**2
    assert errors.mean().item() == pytest.approx(expected, abs=4 * errors.std().item() / 300**0.5)
    assert torch.equal(flat[0], torch.cat([noise.draw(0)[n].flatten() for n in names]))
    assert not torch.equal(flat[0], flat[1])


def test_a_release(problems):
    adapter, batch = problems.small_lenet()
    directions = eigen_directions(GradientJacobian(adapter, batch, shared="all"))
    noise = spectral_noise(directions, norm=0.25, prior_std=0.7)
    clean = capture_gradient(adapter, batch, shared="all")
    release = noise.release(clean, seed=3)
    assert release.shared.defenses == ("spectral(norm=0.25)",)
    delta = noise.draw(3)
    for name, value in release.shared.gradient.items():
        assert torch.equal(value, clean.gradient[name] + delta[name])
        assert torch.allclose(release.perturbation[name], delta[name], atol=1e-14)
    with pytest.raises(UnsupportedCombinationError, match="same"):
        noise.release(capture_gradient(adapter, batch, shared="fc"), seed=3)


@pytest.mark.parametrize(("norm", "prior_std"), [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_refusals(norm, prior_std, directions):
    with pytest.raises(ConfigError, match="positive norm and prior_std"):
        spectral_noise(directions, norm=norm, prior_std=prior_std)
