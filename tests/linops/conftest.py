"""Small positive semidefinite problems with a known spectrum; condition numbers are chosen, never left to chance."""

import pytest
import torch

from lmleak.linops import MatrixOperator


def matrix_with_spectrum(eigenvalues, seed=0, dtype=torch.float64):
    """Q diag(eigenvalues) Q^T with a random orthogonal Q."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(gaussian)
    matrix = (q * eigenvalues) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def vector(size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def global_random_state_untouched():
    """Every test of this folder also checks that the library draws from explicit generators only."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(name="matrix_with_spectrum")
def _matrix_with_spectrum():
    return matrix_with_spectrum


@pytest.fixture(name="vector")
def _vector():
    return vector


@pytest.fixture
def operator_with_spectrum():
    def build(eigenvalues, seed=0, dtype=torch.float64):
        return MatrixOperator(matrix_with_spectrum(eigenvalues, seed, dtype), positive_semidefinite=True)

    return build
