import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from lmleak.defenses import Chain, Clip, GaussianNoise, LaplaceNoise, Quantize, derived_seed, random_stream, unit_noise
from lmleak.defenses.noise import PIECE
from lmleak.errors import ConfigError
from tests.launching import environment, python

NOISES = [GaussianNoise, LaplaceNoise]
MANY = 400_000


def sample(distribution, seed=0):
    return unit_noise("a.weight", (MANY,), torch.float64, seed, distribution)


@pytest.mark.parametrize(("distribution", "fourth_moment"), [("gaussian", 3.0), ("laplace", 6.0)])
def test_unit_noise_has_the_moments_of_its_distribution(distribution, fourth_moment):
    z = sample(distribution)
    eighth_moment = {"gaussian": 105.0, "laplace": 40320 / 16}[distribution]
    assert abs(z.mean()) < 4 / MANY**0.5
    assert abs(z.square().mean() - 1) < 4 * ((fourth_moment - 1) / MANY) ** 0.5
    assert abs(z.pow(3).mean()) < 4 * ({"gaussian": 15, "laplace": 90}[distribution] / MANY) ** 0.5
    assert abs(z.pow(4).mean() - fourth_moment) < 4 * ((eighth_moment - fourth_moment**2) / MANY) ** 0.5


@pytest.mark.parametrize(
    ("distribution", "law"), [("gaussian", stats.norm()), ("laplace", stats.laplace(scale=2**-0.5))]
)
def test_unit_noise_follows_its_law(distribution, law):
    assert stats.kstest(sample(distribution).numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("kind", NOISES)
def test_standard_deviation_of_the_perturbation(kind, make_shared):
    gradient = {"a": torch.full((300, 200), 5.0).double(), "b": torch.zeros(40_000).double()}
    delta = kind(std=0.25, seed=1).release(make_shared(gradient=gradient)).perturbation
    together = torch.cat([tensor.flatten() for tensor in delta.values()])
    assert together.std().item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_exactly_std_times_unit_noise(kind, make_shared):
    shared = make_shared()
    noisy = kind(std=0.07, seed=5)(shared)
    for name, true in shared.gradient.items():
        z = unit_noise(name, true.shape, true.dtype, 5, kind.distribution)
        assert torch.equal(noisy.gradient[name], true + 0.07 * z)


@pytest.mark.parametrize("kind", NOISES)
def test_perturbation_is_linear_in_std(kind, make_shared):
    shared = make_shared(zero=True)  # no rounding against a gradient: linearity is exact for powers of two
    one, eight = (kind(std=std, seed=5).release(shared).perturbation for std in (1.0, 8.0))
    assert all(torch.equal(8 * one[name], eight[name]) for name in one)
    shared = make_shared()
    small, large = (kind(std=std, seed=5).release(shared).perturbation for std in (0.01, 0.03))
    for name in small:
        torch.testing.assert_close(3 * small[name], large[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", NOISES)
def test_unit_rms_counts_in_multiples_of_the_gradients_size(kind, make_shared):
    shared = make_shared()
    relative, absolute = kind(std=0.5, unit="rms", seed=5), kind(std=0.5 * shared.rms, seed=5)
    assert relative.absolute_std(shared.gradient) == pytest.approx(0.5 * shared.rms, rel=1e-14)
    for name, tensor in relative(shared).gradient.items():
        torch.testing.assert_close(tensor, absolute(shared).gradient[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_of_a_parameter_does_not_depend_on_the_others(kind, make_shared):
    shared = make_shared()
    alone = make_shared(gradient={"head.weight": shared.gradient["head.weight"]})
    defense = kind(std=1.0, seed=5)
    assert torch.equal(defense(shared).gradient["head.weight"], defense(alone).gradient["head.weight"])


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_noise_is_the_same_for_every_dtype_up_to_rounding(distribution):
    exact = unit_noise("a", (1000,), torch.float64, 3, distribution)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(unit_noise("a", (1000,), dtype, 3, distribution), exact.to(dtype))


def test_noise_of_different_names_seeds_and_kinds_is_uncorrelated():
    def draw(name, seed, distribution):
        return unit_noise(name, (MANY,), torch.float64, seed, distribution)

    base = draw("a", 0, "gaussian")
    for other in (draw("b", 0, "gaussian"), draw("a", 1, "gaussian"), draw("a", 0, "laplace")):
        assert abs((base * other).mean()) < 5 / MANY**0.5


def test_noise_is_the_same_in_another_process():
    program = (
        "import torch; from lmleak.defenses import unit_noise; "
        "print([unit_noise('a.b', (5,), torch.float64, 12, d).tolist() for d in ('gaussian', 'laplace')])"
    )
    other = python("-c", program, env=environment(PYTHONHASHSEED="77"))
    here = [unit_noise("a.b", (5,), torch.float64, 12, d).tolist() for d in ("gaussian", "laplace")]
    assert other.stdout.strip() == str(here)


def test_zero_std_changes_nothing(make_shared):
    shared = make_shared()
    noisy = GaussianNoise(std=0)(shared)
    assert all(torch.equal(noisy.gradient[name], tensor) for name, tensor in shared.gradient.items())


def test_unknown_distribution_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'laplace'"):
        unit_noise("a", (2,), torch.float64, 0, "laplacian")


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("std", [-1e-9, float("nan"), float("inf"), "0.1", None, True, 10**400])
def test_standard_deviation_that_cannot_be_is_refused(kind, std):
    with pytest.raises(ConfigError, match="std must be a finite number >= 0"):
        kind(std=std)


def test_unit_and_seed_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="unit must be absolute or rms, got 'relative'"):
        GaussianNoise(std=1, unit="relative")
    with pytest.raises(ConfigError, match="seed must be an integer"):
        GaussianNoise(std=1, seed=0.5)


def test_chain_gives_independent_noise_and_the_total_perturbation(make_shared):
    shared = make_shared(gradient={"a": torch.zeros(MANY).double()})
    chain = Chain((GaussianNoise(std=3.0), Clip(1e9), GaussianNoise(std=4.0, seed=1))).with_seed(9)
    delta = chain.release(shared).perturbation["a"]
    assert delta.std().item() == pytest.approx(5.0, rel=0.01)  # 7 if both parts drew the same noise
    assert [part.seed for part in chain.parts if part.random] == [derived_seed(9, 0), derived_seed(9, 2)]


def test_chain_equals_its_parts_in_order(make_shared):
    shared = make_shared()
    clip, noise = Clip(0.5), GaussianNoise(std=0.1, unit="rms", seed=2)
    first, second = Chain((clip, noise))(shared), noise(clip(shared))
    assert first.defenses == second.defenses
    assert all(torch.equal(first.gradient[name], second.gradient[name]) for name in second.gradient)
    applied = Chain((clip, noise)).apply(shared.gradient)
    assert all(torch.equal(applied[name], second.gradient[name]) for name in second.gradient)
    other_order = Chain((noise, clip))(shared)
    assert any(not torch.equal(other_order.gradient[name], t) for name, t in second.gradient.items())


def test_chain_flattens_and_refuses_what_makes_no_sense():
    inner = Chain((Clip(1.0), GaussianNoise(std=1.0)))
    assert Chain((inner, Quantize())).parts == (*inner.parts, Quantize())
    with pytest.raises(ConfigError, match="same seed"):
        Chain((GaussianNoise(std=1.0), GaussianNoise(std=2.0)))
    with pytest.raises(ConfigError, match="at least one"):
        Chain(())
    with pytest.raises(ConfigError, match="made of defenses"):
        Chain(("clip(max_norm=1)",))
    assert "Zhu" in inner.paper
    assert "Abadi" in inner.paper


def one_draw(name, shape, seed, distribution):
    """The definition, all numbers at once: what published noise is."""
    generator = random_stream(seed, name, distribution)
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    w = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1 + 2**-53
    return -w.sign() * torch.log1p(-w.abs()) / 2**0.5


def assert_same(noise, expected):
    """Up to the last digits of log, cos and sin, of which torch has two implementations."""
    torch.testing.assert_close(noise, expected, rtol=8 * torch.finfo(noise.dtype).eps, atol=1e-15)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_noise_in_pieces_is_that_of_one_draw(distribution, monkeypatch):
    """Around every length at which torch draws another way; float32 is the same rounded."""
    monkeypatch.setattr("lmleak.defenses.noise.PIECE", 32)
    for shape in [(), (0,), (1,), (15,), (16,), (31,), (32,), (33,), (63,), (64,), (65,), (7, 11), (4, 5, 8), (1000,)]:
        expected = one_draw("a.weight", shape, 3, distribution)
        assert_same(unit_noise("a.weight", shape, torch.float64, 3, distribution), expected)
        assert_same(unit_noise("a.weight", shape, torch.float32, 3, distribution), expected.float())


def test_large_noise_is_that_of_one_draw_and_holds_little_more_than_itself():
    shape, largest = (3 * PIECE // 1024 + 7, 1031), 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
                largest = max(largest, output.numel())
            return output

    with Largest():
        noise = unit_noise("table", shape, torch.float32, 0)
    assert_same(noise, one_draw("table", shape, 0, "gaussian").float())
    assert PIECE <= largest < 2 * PIECE < noise.numel()
