import pytest
import torch

from lmleak.errors import ConfigError, ConvergenceError
from lmleak.linops import (
    FunctionOperator,
    LinearOperator,
    MatrixOperator,
    ShiftedOperator,
    conjugate_gradient,
    exact_spectrum,
    lanczos,
    multishift_cg,
    spectral_probes,
    top_eigenvalue,
)


def rectangular(m=5, n=3, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_operators():
    """Every operator with the matrix that it stands for."""
    j = rectangular()
    gram = j @ j.T
    J = MatrixOperator(j)
    return {
        "matrix": (J, j),
        "transposed": (J.T, j.T),
        "twice transposed": (J.T.T, j),
        "gram, left": (J @ J.T, gram),
        "gram, right": (J.T @ J, j.T @ j),
        "chain": (J @ MatrixOperator(rectangular(3, 4, 1)), j @ rectangular(3, 4, 1)),
        "function": (FunctionOperator(lambda v: gram @ v, 5, torch.float64), gram),
        "shifted": ((J @ J.T).shifted(0.3), gram + 0.3 * torch.eye(5, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", make_operators())
def test_products_match_the_dense_matrix(name):
    operator, dense = make_operators()[name]
    m, n = dense.shape
    right, left = rectangular(n, 4, 2), rectangular(m, 4, 3)
    assert operator.shape == (m, n)
    torch.testing.assert_close(operator.to_dense(), dense, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator.T.to_dense(), dense.T, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator @ right, dense @ right, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator @ right[:, 0], dense @ right[:, 0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator.T @ left, dense.T @ left, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator.rmatvec(left[:, 0]), dense.T @ left[:, 0], atol=1e-13, rtol=1e-13)
    assert (operator @ right[:, :0]).shape == (m, 0)


@pytest.mark.parametrize("name", make_operators())
def test_adjoint_identity_and_same_answer_twice(name):
    operator, dense = make_operators()[name]
    v, u = rectangular(dense.shape[1], 1, 4)[:, 0], rectangular(dense.shape[0], 1, 5)[:, 0]
    assert torch.dot(operator.matvec(v), u).item() == pytest.approx(
        torch.dot(v, operator.rmatvec(u)).item(), rel=1e-12
    )
    assert torch.equal(operator.matvec(v), operator.matvec(v))


def test_only_gram_products_get_the_tag():
    J, K = MatrixOperator(rectangular()), MatrixOperator(rectangular(seed=1))
    assert (J @ J.T).positive_semidefinite
    assert (J.T @ J).positive_semidefinite
    assert not (J @ K.T).positive_semidefinite
    assert not J.positive_semidefinite
    assert (J @ J.T).shifted(0.1).positive_semidefinite
    assert not (J @ J.T).shifted(-0.1).positive_semidefinite
    assert not (J @ K.T).shifted(10.0).positive_semidefinite


def test_function_operator_counts_products():
    operator = FunctionOperator(lambda v: 2 * v, 4, torch.float64)
    operator @ torch.ones(4, 3, dtype=torch.float64)
    operator.rmatvec(torch.ones(4, dtype=torch.float64))
    assert operator.products == 4


def test_blocks_are_multiplied_at_once_and_counted():
    widths = []

    def matmat(columns):
        widths.append(columns.shape[1])
        return gram @ columns

    gram = rectangular(5, 5) @ rectangular(5, 5).T
    operator = FunctionOperator(lambda v: gram @ v, 5, torch.float64, matmat=matmat, block_size=3)
    columns = rectangular(5, 7, 1)
    torch.testing.assert_close(operator.matmat(columns), gram @ columns, atol=1e-13, rtol=1e-13)
    assert widths == [3, 3]  # a column that is left over goes alone
    assert operator.products == 7
    torch.testing.assert_close(operator.to_dense(), gram, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(operator @ columns[:, :1], gram @ columns[:, :1], atol=1e-13, rtol=1e-13)
    assert widths == [3, 3, 3, 2]
    assert FunctionOperator(lambda v: v, 5, torch.float64, block_size=3).block_size == 1  # without a matmat


def test_products_are_detached_and_the_input_is_left_alone():
    v = torch.ones(3, dtype=torch.float64, requires_grad=True)
    out = FunctionOperator(lambda x: 3 * x, 3, torch.float64).matvec(v)
    assert not out.requires_grad
    assert v.requires_grad
    assert v.grad is None


def test_shapes_dtypes_and_sizes_are_refused_with_the_expected_shape():
    operator = MatrixOperator(rectangular())
    with pytest.raises(ConfigError, match=r"shape \(3,\), torch.float64.*got a tensor of shape \(4,\)"):
        operator.matvec(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"torch.float32"):
        operator.matvec(torch.ones(3))
    with pytest.raises(ConfigError, match="the product A v is"):
        FunctionOperator(lambda v: v[:2], 3, torch.float64).matvec(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"matmat takes a matrix of shape \(3, 2\).*got a tensor of shape \(4, 2\)"):
        operator.matmat(torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"matmat takes a matrix.*got list"):
        operator.matmat([[1.0], [2.0], [3.0]])
    wrong = FunctionOperator(lambda v: v, 3, torch.float64, matmat=lambda columns: columns[:2], block_size=2)
    with pytest.raises(ConfigError, match="the product A V is a matrix"):
        wrong.matmat(torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(ConfigError, match="sides up to 4 are formed"):
        operator.to_dense(max_size=4)
    with pytest.raises(ConfigError, match="inner sides"):
        operator @ operator
    with pytest.raises(ConfigError, match="got list"):
        operator @ [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match="not square"):
        ShiftedOperator(operator, 0.1)
    with pytest.raises(ConfigError, match="square"):
        MatrixOperator(rectangular(), positive_semidefinite=True)
    with pytest.raises(ConfigError, match="differs from its transpose"):
        MatrixOperator(rectangular(3, 3), positive_semidefinite=True)
    with pytest.raises(ConfigError, match="2-D"):
        MatrixOperator(torch.ones(3))


SOLVERS = {
    "lanczos": lambda A: lanczos(A, torch.ones(3, dtype=A.dtype), max_products=2),
    "conjugate_gradient": lambda A: conjugate_gradient(A, torch.ones(3, dtype=A.dtype)),
    "multishift_cg": lambda A: multishift_cg(A, torch.ones(3, dtype=A.dtype), [0.1]),
    "top_eigenvalue": lambda A: top_eigenvalue(A, generator=torch.Generator().manual_seed(0)),
    "spectral_probes": lambda A: spectral_probes(A, generator=torch.Generator().manual_seed(0)),
    "exact_spectrum": exact_spectrum,
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_refuse_an_operator_without_the_tag(solver):
    untagged = MatrixOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="positive_semidefinite=True"):
        SOLVERS[solver](untagged)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_refuse_half_precision(solver):
    half = MatrixOperator(torch.eye(3, dtype=torch.bfloat16), positive_semidefinite=True)
    with pytest.raises(ConfigError, match="float32 or float64"):
        SOLVERS[solver](half)


def test_solvers_refuse_a_plain_matrix():
    with pytest.raises(ConfigError, match="MatrixOperator"):
        conjugate_gradient(torch.eye(3), torch.ones(3))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_named(solver, bad):
    operator = FunctionOperator(lambda v: v * bad, 3, torch.float64, positive_semidefinite=True)
    with pytest.raises(ConvergenceError, match="NaN or Inf"):
        SOLVERS[solver](operator)


@pytest.mark.parametrize("solver", SOLVERS)
def test_negative_curvature_is_named(solver):
    matrix = torch.diag(torch.tensor([-2.0, 1.0, 0.5], dtype=torch.float64))
    operator = FunctionOperator(lambda v: matrix @ v, 3, torch.float64, positive_semidefinite=True)
    with pytest.raises(ConvergenceError, match="not positive semidefinite"):
        SOLVERS[solver](operator)


def test_a_new_operator_needs_two_methods():
    class Doubling(LinearOperator):
        def _matvec(self, vector):
            return 2 * vector

        def _rmatvec(self, vector):
            return 2 * vector

    operator = Doubling((3, 3), torch.float64, "cpu", positive_semidefinite=True)
    assert conjugate_gradient(operator, torch.ones(3, dtype=torch.float64)).norm == pytest.approx(3**0.5 / 2)
