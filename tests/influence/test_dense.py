"""J and A as matrices, the eigenvectors of A, and averages over noise, against closed forms and direct algebra."""

import math

import pytest
import torch

from lmleak.errors import ConfigError, DataError
from lmleak.influence import (
    CosineJacobian,
    GradientJacobian,
    dense_gram,
    dense_rows,
    eigen_directions,
    image_prior,
    inversion_influence,
)  # fmt: skip
from lmleak.influence.jacobian import IMPLEMENTATIONS
from tests.families import make
from tests.influence.vectors import relative


@pytest.fixture
def linear(problems):
    """Directions of a linear softmax problem with dx = 9, and its dense J."""
    adapter, batch, *_ = problems.linear_softmax()
    jacobian = GradientJacobian(adapter, batch)
    return eigen_directions(jacobian), jacobian.to_dense()


class TestMatrices:
    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bert-mlm", "opt", "gpt-neox", "unlisted-electra"])
    def test_text_models_with_padding(self, name):
        adapter, batch = make(name, size=2)
        jacobian = GradientJacobian(adapter, batch)
        expected = jacobian.to_dense()
        assert relative(dense_rows(jacobian), expected) < 1e-12
        assert relative(dense_gram(jacobian, chunk_size=37), expected @ expected.T) < 1e-12

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_images_by_rows_and_by_gram_products(self, implementation, problems):
        adapter, batch = problems.small_lenet()
        jacobian = GradientJacobian(adapter, batch, shared="all", implementation=implementation)
        expected = jacobian.to_dense()
        assert relative(dense_rows(jacobian), expected) < 1e-12
        by_rows = dense_gram(jacobian)
        assert relative(by_rows, expected @ expected.T) < 1e-12
        by_products = dense_gram(jacobian, largest=0)
        assert relative(by_products, by_rows) < 1e-12
        assert torch.equal(by_products, by_products.T)

    def test_float32_resolves_small_eigenvalues(self, problems):
        """Rounding of J moves singular values, not eigenvalues: lambda_min is right where a float32 A drowns it."""
        adapter, *_ = problems.linear_softmax()
        adapter.model.float()
        image = problems.randn(1, 1, 3, 3).float()
        twins = torch.cat([image, image + 1e-2 * problems.randn(1, 1, 3, 3, seed=1).float()])
        single = GradientJacobian(adapter, adapter.batch(twins, [0, 0]))
        coarse = dense_rows(single)
        values = torch.linalg.eigvalsh(dense_gram(single))
        adapter.model.double()
        exact = torch.linalg.eigvalsh(dense_gram(GradientJacobian(adapter, adapter.batch(twins, [0, 0]))))
        assert exact[0] < 1e-7 * exact[-1]
        assert torch.allclose(values, exact, rtol=1e-2, atol=0)
        assert not torch.allclose(torch.linalg.eigvalsh(coarse @ coarse.T).double(), exact, rtol=0.1, atol=0)

    def test_the_cosine_attackers_operator(self, linear, problems):
        directions, matrix = linear
        jacobian = directions.jacobian
        gradient = {n: problems.randn(*s, seed=7) for n, s in jacobian.parameter_shapes.items()}
        flat = problems.flat(gradient, jacobian.parameter_names)
        expected = (matrix - torch.outer(matrix @ flat, flat) / flat.dot(flat)) / flat.norm()
        assert relative(dense_rows(CosineJacobian(jacobian, gradient)), expected) < 1e-12

    def test_a_product_that_is_not_finite_is_refused(self, linear, monkeypatch):
        jacobian = linear[0].jacobian
        products = jacobian._products
        names = jacobian.parameter_names
        monkeypatch.setattr(products, "rmatvec", lambda v, _: {n: jacobian.theta[n] * math.nan for n in names})
        with pytest.raises(DataError, match="NaN or Inf"):
            eigen_directions(jacobian)


class TestDirections:
    def test_they_are_the_singular_vectors_of_j(self, linear, problems):
        directions, matrix = linear
        singular = torch.linalg.svdvals(matrix)
        assert directions.rank == 9
        assert directions.nullity == 0
        assert relative(directions.singular_values, singular) < 1e-10
        assert relative(directions.gram, matrix @ matrix.T) < 1e-12
        names = directions.jacobian.parameter_names
        for index in (0, 4, 8):
            v = problems.flat(directions.gradient_direction(index), names)
            assert v.norm().item() == pytest.approx(1, rel=1e-10)
            image = directions.input_direction(index).flatten()
            assert relative(matrix @ v, directions.singular_values[index] * image) < 1e-10

    def test_the_law_of_directions_is_the_influence_of_that_perturbation(self, problems):
        adapter, batch = problems.small_lenet()
        directions = eigen_directions(GradientJacobian(adapter, batch))
        for index in (0, 20, 63):
            delta = {n: 5 * v for n, v in directions.gradient_direction(index).items()}
            result = inversion_influence(adapter, batch, perturbation=delta, damping=0.0, tol=1e-8, max_products=500)
            assert directions.direction_mse(index, 5.0) == pytest.approx(result.influence.rms**2, rel=1e-6)
            assert relative(directions.influence(delta), result.error) < 1e-6

    def test_influence_is_the_damped_solve(self, linear, problems):
        directions, matrix = linear
        delta = problems.like_theta(directions.jacobian)
        b = matrix @ problems.flat(delta, directions.jacobian.parameter_names)
        for damping in (0.0, 0.3):
            expected = torch.linalg.solve(matrix @ matrix.T + damping * torch.eye(9, dtype=torch.float64), b)
            assert relative(directions.influence(delta, damping=damping).flatten(), expected) < 1e-9

    def test_a_direction_without_a_counterpart_is_refused(self, problems):
        directions = eigen_directions(GradientJacobian(*problems.linear_softmax(batch=3, side=2, classes=2)[:2]))
        assert directions.rank == 5  # (C - 1) (d + 1)
        assert directions.nullity == 7
        assert directions.direction_mse(5, 1.0) == math.inf
        with pytest.raises(ConfigError, match="rank 5 of dx = 12"):
            directions.gradient_direction(5)

    def test_the_null_space_share_of_a_deviation(self, problems):
        adapter, batch, *_ = problems.linear_softmax(batch=3, side=2, classes=2)
        jacobian = GradientJacobian(adapter, batch)
        directions, matrix = eigen_directions(jacobian), jacobian.to_dense()
        x = jacobian.x.flatten()
        determined = matrix @ torch.linalg.pinv(matrix, rtol=1e-9) @ x
        expected = 1 - (determined.norm() / x.norm()).item() ** 2
        assert directions.undetermined_share(jacobian.x) == pytest.approx(expected, rel=1e-8)


class TestAverages:
    def test_traces(self, linear):
        directions, matrix = linear
        a, eye = matrix @ matrix.T, torch.eye(9, dtype=torch.float64)
        sigma, tau, damping = 0.03, 1.3, 0.02
        expected = sigma**2 * torch.linalg.inv(a).trace().item()
        assert directions.expected_error(sigma).l2 ** 2 == pytest.approx(expected, rel=1e-9)
        assert directions.expected_error(sigma).rms ** 2 == pytest.approx(expected / 9, rel=1e-9)
        damped = torch.linalg.inv(a + damping * eye)
        assert directions.damped_inverse_trace(damping) == pytest.approx(damped.trace().item(), rel=1e-9)
        response = sigma**2 * (damped @ a @ damped).trace().item()
        assert directions.damped_error(sigma, damping).l2 ** 2 == pytest.approx(response, rel=1e-9)
        bayes = torch.linalg.inv(a / sigma**2 + eye / tau**2).trace().item()
        assert directions.bayes_error(sigma, tau).l2 ** 2 == pytest.approx(bayes, rel=1e-9)
        rank = (a @ torch.linalg.inv(a + (sigma / tau) ** 2 * eye)).trace().item()
        assert directions.effective_rank(sigma, tau) == pytest.approx(rank, rel=1e-9)
        mean = (1 / torch.linalg.svdvals(matrix)).mean().item()
        assert directions.mean_inverse_singular_value() == pytest.approx(mean, rel=1e-9)

    def test_the_mean_of_squared_influence_over_drawn_noise(self, linear, problems):
        directions, matrix = linear
        noise = 0.1 * problems.randn(4000, matrix.shape[1], seed=3)
        squares = (noise @ torch.linalg.pinv(matrix)).square().sum(1)
        tolerance = 4 * squares.std().item() / len(noise) ** 0.5
        assert directions.expected_error(0.1).l2 ** 2 == pytest.approx(squares.mean().item(), abs=tolerance)

    def test_a_full_covariance_prior(self, linear, problems):
        directions, matrix = linear
        factor = problems.randn(9, 9, seed=4)
        covariance = factor @ factor.T
        expected = torch.linalg.inv(matrix @ matrix.T / 0.2**2 + torch.linalg.inv(covariance)).trace().item()
        assert directions.bayes_error_under(0.2, covariance).l2 ** 2 == pytest.approx(expected, rel=1e-8)
        isotropic = directions.bayes_error_under(0.2, 1.69 * torch.eye(9)).l2
        assert isotropic == pytest.approx(directions.bayes_error(0.2, 1.3).l2, rel=1e-6)
        singular = torch.zeros(9, 9, dtype=torch.float64)
        singular[:2, :2] = torch.eye(2)  # only two pixels are unknown
        kept = matrix[:2] @ matrix[:2].T / 0.2**2 + torch.eye(2, dtype=torch.float64)
        got = directions.bayes_error_under(0.2, singular).l2 ** 2
        assert got == pytest.approx(torch.linalg.inv(kept).trace().item(), rel=1e-9)

    def test_saturation_and_singular_a(self, problems):
        directions = eigen_directions(GradientJacobian(*problems.linear_softmax(batch=3, side=2, classes=2)[:2]))
        assert directions.expected_error(0.1).l2 == math.inf
        assert directions.bayes_error(1e9, 1.3).rms == pytest.approx(1.3, rel=1e-6)
        assert directions.bayes_error(0.0, 1.3).l2 ** 2 == pytest.approx(1.3**2 * 7, rel=1e-12)
        with pytest.raises(ConfigError, match="7 of 12 directions"):
            directions.std_for_error(0.1)

    def test_noise_calibrated_to_a_target_error(self, linear):
        directions, _ = linear
        free = directions.std_for_error(0.5)
        assert directions.expected_error(free).rms == pytest.approx(0.5, rel=1e-12)
        known = directions.std_for_error(0.5, prior_std=1.0)
        assert directions.bayes_error(known, 1.0).rms == pytest.approx(0.5, rel=1e-9)
        assert known > free
        for target in (0.0, 1.0, 2.0):
            with pytest.raises(ConfigError, match="target between"):
                directions.std_for_error(target, prior_std=1.0)

    def test_a_prior_from_public_images(self, problems):
        images = problems.randn(50, 1, 3, 3)
        mean, covariance = image_prior(images)
        assert torch.allclose(mean, images.flatten(1).mean(0))
        assert torch.allclose(covariance, images.flatten(1).T.cov())
        with pytest.raises(DataError, match="at least 2"):
            image_prior(images[:1])
