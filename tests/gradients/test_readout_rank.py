"""The numerical row space found in a random range, against a whole singular value decomposition."""

import pytest
import torch

from lmleak.gradients.readout_rank import RANGES, RowSpectrum, row_spectrum

EPS = torch.finfo(torch.float32).eps


def gradient(rank: int, *, weakest: float, noise: float, shape=(900, 600)):
    """Return a matrix of spectrum from 1 to ``weakest`` with noise of spectral norm ``noise``, as large in a row as
    the row is long."""
    generator = torch.Generator().manual_seed(rank)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(randn(shape[0], rank)).Q, torch.linalg.qr(randn(shape[1], rank)).Q
    sigma = torch.logspace(0, torch.tensor(weakest).log10().item(), rank, dtype=torch.float64)
    rows, rounding = left * sigma @ right.T, randn(*shape)
    rounding /= torch.linalg.matrix_norm(rounding, 2)
    return rows / rows.norm(dim=1, keepdim=True) * sigma.square().mean().sqrt() + noise * rounding


def whole(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
    return sigma / sigma[0], directions


def angle(found: RowSpectrum, directions: torch.Tensor) -> float:
    """Return the sine of the largest angle between two row spaces of equal dimension."""
    expected = directions[: found.rank]
    return torch.linalg.matrix_norm(expected - expected @ found.directions.T @ found.directions, 2).item()


@pytest.mark.parametrize("rank", [1, 40, 100, 112, 140])
def test_equals_a_whole_decomposition(rank):
    """Small ranks are found in a random range, 140 is beyond the largest: the answer must not tell which."""
    assert max(RANGES) == 128
    rows = gradient(rank, weakest=1e-3, noise=0.3 * EPS)
    sigma, directions = whole(rows)
    found = row_spectrum(rows, EPS)
    assert found.rank == rank
    torch.testing.assert_close(found.sigma, sigma[:rank], rtol=1e-10, atol=0)
    assert angle(found, directions) < 1e-10
    assert 0.8 * sigma[rank] < found.tail < 1.0001 * sigma[rank]


@pytest.mark.parametrize("rank", [30, 100])
def test_weak_directions_just_above_rounding(rank):
    """A weakest direction 8 times above rounding: mixed far less than rounding itself mixes it (1/8)."""
    rows = gradient(rank, weakest=8 * 0.3 * EPS, noise=0.3 * EPS)
    sigma, directions = whole(rows)
    found = row_spectrum(rows, EPS)
    assert found.rank == rank
    assert angle(found, directions) < 1e-3
    torch.testing.assert_close(found.sigma, sigma[:rank], rtol=1e-4, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_few_tokens_in_float64_have_their_rank(tokens):
    """A whole decomposition's own rounding lies at one to three float64 epsilons, and may hide the end."""
    generator = torch.Generator().manual_seed(tokens)
    left, right = (torch.randn(n, tokens, generator=generator, dtype=torch.float64) for n in (384, 128))
    assert row_spectrum(left @ right.T, torch.finfo(torch.float64).eps).rank == tokens


def test_no_end_above_rounding_is_full_rank():
    rows = gradient(50, weakest=1e-2, noise=1e-4)
    found = row_spectrum(rows, EPS)
    assert (found.rank, found.tail) == (600, EPS)
    assert found.directions.shape == (600, 600)


def test_the_same_matrix_gives_the_same_bits_and_leaves_the_random_state_alone():
    rows = gradient(20, weakest=1e-2, noise=0.3 * EPS)
    state = torch.random.get_rng_state()
    first, second = row_spectrum(rows, EPS), row_spectrum(rows, EPS)
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(state, torch.random.get_rng_state())
