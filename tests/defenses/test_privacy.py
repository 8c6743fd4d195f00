"""The epsilon of a run against closed forms and published values."""

import math
import sys

import pytest
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from lmleak.defenses.privacy import epsilon
from lmleak.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _opacus():
    pytest.importorskip("opacus")


def exact_gaussian(z, delta):
    """Balle and Wang 2018, theorem 8: delta(eps) of the Gaussian mechanism with sensitivity 1."""
    gap = lambda eps: norm.cdf(0.5 / z - eps * z) - math.exp(eps) * norm.cdf(-0.5 / z - eps * z) - delta
    return brentq(gap, 1e-9, 200)


def integer_orders(z, q, steps, delta):
    """The sampled Gaussian mechanism's Renyi divergence in closed form at integer orders, converted."""
    best = math.inf
    for a in range(2, 200):
        terms = [
            gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1) + (a - k) * math.log1p(-q) + k * math.log(q)
            + k * (k - 1) / (2 * z * z) for k in range(a + 1)
        ]  # fmt: skip
        divergence = steps * logsumexp(terms) / (a - 1)
        best = min(best, divergence + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1))
    return best


@pytest.mark.parametrize("z", [0.5, 1.0, 4.0])
def test_one_release_against_the_exact_gaussian_mechanism(z):
    exact = exact_gaussian(z, 1e-5)
    assert exact <= epsilon(z, 1.0, 1, 1e-5) < 1.12 * exact


@pytest.mark.parametrize(("z", "q", "steps"), [(1.0, 0.01, 1000), (1.1, 0.01, 10000), (4.0, 0.05, 200)])
def test_a_run_against_the_closed_form_at_integer_orders(z, q, steps):
    ours, oracle = epsilon(z, q, steps, 1e-5), integer_orders(z, q, steps, 1e-5)
    assert 0.97 * oracle < ours <= oracle * (1 + 1e-9)  # more orders, so never above


@pytest.mark.parametrize(("z", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_published_mnist_runs(z, epochs, published):
    """TensorFlow Privacy's tutorial (256 of 60,000, delta 1e-5), accounted with the looser conversion of 2017."""
    ours = epsilon(z, 256 / 60000, round(epochs * 60000 / 256), 1e-5)
    assert 0.75 * published < ours <= published


def test_monotone():
    base = epsilon(1.0, 0.01, 100, 1e-5)
    assert epsilon(1.1, 0.01, 100, 1e-5) < base < epsilon(1.0, 0.02, 100, 1e-5)
    assert base < epsilon(1.0, 0.01, 101, 1e-5)
    assert epsilon(1.0, 0.01, 100, 1e-4) < base
    assert epsilon(0.0, 0.01, 100, 1e-5) == math.inf
    assert epsilon(1e-3, 0.01, 100, 1e-5) > 1e6  # nearly no noise: nothing hidden behind an overflow


@pytest.mark.parametrize("wrong", [
    (-1, 0.1, 1, 1e-5), (1, 0, 1, 1e-5), (1, 1.5, 1, 1e-5), (1, 0.1, 0, 1e-5), (1, 0.1, 1, 1),
    (math.nan, 0.1, 1, 1e-5),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="epsilon needs"):
        epsilon(*wrong)


def test_without_opacus_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ConfigError, match=r"lmleak\[dp\]"):
        epsilon(1.0, 0.1, 1, 1e-5)
