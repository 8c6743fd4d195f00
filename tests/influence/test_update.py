"""J of FedAvg updates: against functional differentiation, finite differences of the captured update, and one step."""

import pytest
import torch

from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, InfluenceSolver, UpdateJacobian, dense_rows, eigen_directions
from lmleak.types import Aggregation
from tests.families import make
from tests.influence.vectors import relative

AGGREGATIONS = {
    "two steps": Aggregation(steps_per_epoch=2, learning_rate=0.3),
    "two epochs": Aggregation(epochs=2, steps_per_epoch=2, learning_rate=0.2),
    "two clients": Aggregation(clients=2, epochs=3, learning_rate=0.2),
    "one step of two clients": Aggregation(clients=2),
}
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS.keys())


def functional_update(adapter, batch, aggregation):
    """Return x -> F(x) flat, written with torch.func: steps of SGD on the parameters as plain values."""
    theta0 = adapter.parameters()

    def update(x):
        total = 0
        for steps in aggregation.schedule(batch.size):
            theta = dict(theta0)
            for rows in steps:
                gradient = torch.func.grad(lambda t, r=rows: adapter.loss(x[r], batch.targets[r], {}, t))(theta)
                total = total + torch.cat([gradient[n].flatten() for n in theta0])
                theta = {n: p - (aggregation.learning_rate or 0.0) * gradient[n] for n, p in theta.items()}
        return total / (aggregation.clients * aggregation.steps)

    return update


@aggregations
def test_against_functional_differentiation(aggregation, problems):
    adapter, batch, *_ = problems.linear_softmax(batch=4)
    jacobian = UpdateJacobian(adapter, batch, aggregation)
    update = functional_update(adapter, batch, aggregation)
    dense = torch.func.jacrev(update)(jacobian.x).flatten(1).T  # (dx, P)
    assert jacobian.shape == dense.shape == (36, 50)
    assert relative(dense_rows(jacobian), dense) < 1e-12
    assert relative(jacobian.gram_operator().to_dense(), dense @ dense.T) < 1e-12
    delta = problems.like_theta(jacobian)
    flat = problems.flat(delta, jacobian.parameter_names)
    assert relative(jacobian.flatten(jacobian.matvec(delta)), dense @ flat) < 1e-12


@aggregations
def test_against_differences_of_the_captured_update(aggregation, problems):
    adapter, batch = problems.small_lenet()
    batch = adapter.batch(problems.randn(4, 1, 8, 8, seed=2), [0, 1, 2, 0])
    jacobian = UpdateJacobian(adapter, batch, aggregation)
    v, step = problems.randn(4, 1, 8, 8, seed=5), 1e-4

    def captured(x):
        gradient = capture_gradient(adapter, adapter.batch(x, batch.targets), shared="all", aggregation=aggregation)
        return problems.flat(gradient.gradient, jacobian.parameter_names)

    difference = (captured(jacobian.x + step * v) - captured(jacobian.x - step * v)) / (2 * step)
    assert relative(problems.flat(jacobian.rmatvec(v), jacobian.parameter_names), difference) < 1e-5


def test_one_step_is_the_gradient(problems):
    adapter, batch = problems.small_lenet()
    update = UpdateJacobian(adapter, batch, Aggregation(learning_rate=0.1))
    gradient = GradientJacobian(adapter, batch, shared="all")
    assert update.parameter_names == gradient.parameter_names
    assert relative(dense_rows(update), dense_rows(gradient)) < 1e-12


def test_a_small_rate_tends_to_the_mean_gradient(problems):
    adapter, batch, *_ = problems.linear_softmax(batch=4)
    gradient = dense_rows(GradientJacobian(adapter, batch, shared="all"))
    gaps = []
    for rate in (1e-2, 1e-3):
        update = UpdateJacobian(adapter, batch, Aggregation(steps_per_epoch=4, learning_rate=rate))
        gaps.append(relative(dense_rows(update), gradient))
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.1)


def test_selected_parameters_and_text(problems):
    """Every parameter moves, some are released; padding stays out."""
    aggregation = Aggregation(epochs=2, learning_rate=0.1)
    adapter, batch = make("bert", size=2)
    whole = UpdateJacobian(adapter, batch, aggregation, shared="no-word-embeddings")
    part = UpdateJacobian(adapter, batch, aggregation, shared="block:1")
    v = problems.randn(*whole.x.shape, seed=1)
    expected = whole.rmatvec(v)
    for name, value in part.rmatvec(v).items():
        assert relative(value, expected[name]) < 1e-10 or expected[name].norm() < 1e-12
    delta = problems.like_theta(whole)
    left = (whole.matvec(delta) * v).sum().item()
    names = whole.parameter_names
    assert left == pytest.approx((problems.flat(expected, names) @ problems.flat(delta, names)).item(), rel=1e-8)


def test_the_influence_of_noise_on_an_update(problems):
    """The solver runs on it as on any J."""
    adapter, batch, *_ = problems.linear_softmax(batch=2)
    jacobian = UpdateJacobian(adapter, batch, Aggregation(epochs=2, learning_rate=0.2))
    directions = eigen_directions(jacobian)
    solver = InfluenceSolver(jacobian, adapter.prior(), tol=1e-9, max_products=300)
    result = solver.sweep([1e-2], [0.0])[0][0]
    expected = directions.influence({n: 1e-2 * z for n, z in solver.noise().items()})
    assert result.converged
    assert relative(result.error, expected) < 1e-6
