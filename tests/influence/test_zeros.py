"""Tracing a linear map at zero: the same derivative, in the memory of one tensor."""

import pytest
import torch

from lmleak.errors import UnsupportedModelError
from lmleak.influence.zeros import SharedZeros
from tests.influence.conftest import randn


def transposed(shared):
    """Return (transpose of a nonlinear map's derivative at c = 0, c)."""
    x, weight = randn(5, 4).requires_grad_(), randn(4, 4, seed=1)
    y = torch.softmax(torch.tanh(x @ weight) @ x.mT, -1) @ x
    c = shared.zeros(y.shape).requires_grad_() if shared else torch.zeros(y.shape, dtype=y.dtype, requires_grad=True)
    with shared or torch.enable_grad():
        (product,) = torch.autograd.grad(y, x, c, create_graph=True)
    return product, c


def test_the_derivative_by_the_probe_is_exact():
    v = randn(5, 4, seed=2)
    got, expected = (torch.autograd.grad(*transposed(shared), v)[0] for shared in (SharedZeros(v), None))
    assert expected.norm() > 0.1
    assert torch.allclose(got, expected, rtol=1e-14, atol=0)


def test_zeros_share_memory_and_other_values_do_not():
    shared = SharedZeros(randn(1))
    zeros = shared.zeros((3, 4))
    with shared:
        product, tangent, lifted = zeros @ randn(4, 2), torch.tanh(zeros), zeros + 1
    assert product.shape == (3, 2)
    assert product.untyped_storage().data_ptr() == tangent.untyped_storage().data_ptr() == zeros.data_ptr()
    assert lifted.untyped_storage().data_ptr() != zeros.data_ptr()
    assert torch.equal(lifted, torch.ones(3, 4, dtype=torch.float64))
    shared.check()


def test_a_number_written_among_the_zeros_is_found():
    shared = SharedZeros(randn(1))
    shared.zeros((3,)).add_(1)
    with pytest.raises(UnsupportedModelError, match="autodiff"):
        shared.check()
