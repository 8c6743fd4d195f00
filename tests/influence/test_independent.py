"""I2F against code that shares nothing with the operator: eigsh in parameter space, and real attackers.

The attackers are Gauss-Newton iterations written here, on a dense Jacobian of plain autograd, started at the truth.
"""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from lmleak.adapters import LeNet, adapt
from lmleak.influence import GradientJacobian, InfluenceSolver, attacker_jacobian, inversion_influence
from tests.families import LABELS, SEQUENCES, build


def parameter_space_lambda_max(loss, x, parameters):
    """Largest eigenvalue of v -> J^T J v by a double backward per product, as the published code computes it."""
    x = x.detach().requires_grad_()
    gradient = torch.autograd.grad(loss(x), parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]

    def product(vector):
        v = torch.from_numpy(np.asarray(vector).ravel()).to(x).split(sizes)
        inner = sum((g.flatten() * part).sum() for g, part in zip(gradient, v, strict=True))
        (j_v,) = torch.autograd.grad(inner, x, retain_graph=True)  # J v, shaped like x
        (input_gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        back = torch.autograd.grad((input_gradient * j_v).sum(), parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if t is None else t for t, p in zip(back, parameters, strict=True)]
        return torch.cat([t.flatten() for t in parts]).double().numpy()

    size = sum(sizes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    return float(eigsh(operator, k=1, which="LM", return_eigenvectors=False, v0=start, tol=1e-6)[0])


def j_delta(loss, x, parameters, delta):
    """||J delta|| by one double backward."""
    x = x.detach().requires_grad_()
    gradient = torch.autograd.grad(loss(x), parameters, create_graph=True)
    inner = sum((g * d).sum() for g, d in zip(gradient, delta, strict=True))
    (product,) = torch.autograd.grad(inner, x)
    return product.norm().item()


class TestLowerBoundOfThePaper:
    """I_lb = ||J delta|| / lambda_max(J^T J), eq. 5, to 1e-3."""

    def check(self, adapter, batch, model, loss, x, named):
        result = inversion_influence(adapter, batch, noise_std=1e-2, seed=1, max_products=100)
        solver = InfluenceSolver(GradientJacobian(adapter, batch), adapter.prior(), seed=1)
        noise = [1e-2 * solver.noise()[name] for name, _ in named]
        parameters = [p for _, p in named]
        assert set(solver.noise()) == {name for name, _ in named}
        top = parameter_space_lambda_max(loss, x, parameters)
        assert result.lambda_max == pytest.approx(top, rel=2e-3)
        assert solver.lambda_max.value == pytest.approx(top, rel=1e-3)
        assert result.lower_bound.l2 == pytest.approx(j_delta(loss, x, parameters, noise) / top, rel=2e-3)
        narrow = InfluenceSolver(GradientJacobian(adapter, batch), adapter.prior(), seed=1, tol=1e-4)
        bound = narrow.respond(narrow.noise()).influence(0.0, scale=1e-2).lower_bound.l2
        assert bound == pytest.approx(j_delta(loss, x, parameters, noise) / top, rel=1e-3)

    def test_lenet_on_28x28(self):
        model = LeNet(seed=3)
        adapter = adapt(model)
        pixels = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(4))
        batch = adapter.batch(pixels, [7])
        loss = lambda x: torch.nn.functional.cross_entropy(model(x), torch.tensor([7]))
        self.check(adapter, batch, model, loss, pixels, list(model.named_parameters()))

    @pytest.mark.parametrize("name", ["bert", "gpt2"])
    def test_language_models(self, name):
        task, model = build(name, dtype=torch.float32)
        adapter = adapt(model, task=task)
        batch = adapter.batch(SEQUENCES[:1], LABELS[:1] if name == "bert" else None)
        _, plain = build(name, dtype=torch.float32)  # the same weights, in a model the adapter never saw
        plain.set_attn_implementation("eager")
        x = plain.get_input_embeddings()(torch.tensor(SEQUENCES[:1])).detach()
        labels = torch.tensor(LABELS[:1]) if name == "bert" else torch.tensor(SEQUENCES[:1])
        loss = lambda x: plain(inputs_embeds=x, labels=labels).loss
        untied = "bert.embeddings.word_embeddings.weight"
        named = [(n, p) for n, p in plain.named_parameters() if n != untied]
        self.check(adapter, batch, plain, loss, x, named)


def gauss_newton(values, x0, free, released, *, steps=30, damping=0.0):
    """argmin ||value(x) - released||^2 + damping ||x - x0||^2 over the free coordinates, from x0, to rounding.

    ``values`` returns (value, Jacobian) at x. Rounding in a step delays the iteration and does not move its end.
    """
    move = torch.zeros(int(free.sum()), dtype=x0.dtype)
    identity = torch.eye(len(move), dtype=x0.dtype)
    for _ in range(steps):
        x = x0.reshape(-1).clone()
        x[free] += move
        value, jacobian = values(x.reshape(x0.shape))
        jacobian = jacobian[:, free]
        slope = jacobian.T @ (value - released) + damping * move
        step = torch.linalg.solve(jacobian.T @ jacobian + damping * identity, slope)
        move = move - step
        if step.norm() <= 1e-10 * move.norm():
            break
    error = torch.zeros(x0.numel(), dtype=x0.dtype)
    error[free] = move
    return error.reshape(x0.shape)


def gradient_and_jacobian(adapter, batch, shared):
    """Return x -> (g (P,), d g / d x (P, dx)), one plain backward of dL/dx per coordinate of x."""
    selection = adapter.select(shared)
    theta = {n: adapter.parameters()[n].requires_grad_() for n in selection.names}
    leaves = list(theta.values())

    def join(tensors):
        return torch.cat([
            (torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, leaves, strict=True)
        ]).detach()  # fmt: skip

    def values(x):
        x = x.detach().requires_grad_()
        loss = adapter.shared_loss(batch, x, theta, selection)
        (slope_in_x,) = torch.autograd.grad(loss, x, create_graph=True)
        rows = [
            join(torch.autograd.grad(s, leaves, retain_graph=True, allow_unused=True)) for s in slope_in_x.reshape(-1)
        ]
        return join(torch.autograd.grad(loss, leaves, allow_unused=True)), torch.stack(rows, 1)

    return values


def direction_of(values):
    """Return x -> (u, d u / d x) with u = g / ||g||."""

    def direction(x):
        g, jacobian = values(x)
        u = g / g.norm()
        return u, (jacobian - torch.outer(u, u @ jacobian)) / g.norm()

    return direction


def slope(sizes, errors):
    """Slope of log(error) over log(size), by least squares."""
    a, b = np.log(np.array(sizes)), np.log(np.array(errors))
    return float(np.polyfit(a, b, 1)[0])


def attack(problems, adapter, batch, *, scales, attacker="l2", damping=0.0, shared="no-word-embeddings"):
    """Attack at every scale of one perturbation; return (predictions, attacker's errors), shaped like x."""
    values = gradient_and_jacobian(adapter, batch, shared)
    x0, free = adapter.input(batch), adapter.free(batch).reshape(-1)
    jacobian = attacker_jacobian(adapter, batch, shared=shared, attacker=attacker)
    delta = problems.like_theta(jacobian, seed=5)
    direction = problems.flat(delta, jacobian.parameter_names)
    g0, _ = values(x0)
    response = InfluenceSolver(jacobian, adapter.prior(), tol=1e-10, max_products=4000).respond(delta, [damping])
    predictions, errors = [], []
    for scale in scales:
        released = g0 + scale * direction
        result = response.influence(damping, scale=scale)
        assert result.converged
        predictions.append(result.error)
        if attacker == "cosine":  # 2 (1 - cos) = ||g / |g| - released / |released| ||^2
            found = gauss_newton(direction_of(values), x0, free, released / released.norm(), damping=damping)
        else:
            found = gauss_newton(values, x0, free, released, damping=damping)
        errors.append(found)
    return predictions, errors


def check(predictions, errors, scales, tolerance=0.01):
    """The smallest perturbation is predicted to 1 %, and what is left falls with its square."""
    assert errors[-1].norm().item() == pytest.approx(predictions[-1].norm().item(), rel=tolerance)
    assert (errors[-1] - predictions[-1]).norm() <= tolerance * predictions[-1].norm()
    left = [(e - p).norm().item() for e, p in zip(errors, predictions, strict=True)]
    assert slope(scales, left) == pytest.approx(2.0, abs=0.2)


SMALL = [1e-3, 2e-4, 4e-5]


class TestPerfectAttacker:
    """xhat - x0 = A^-1 J delta + O(||delta||^2)."""

    def test_linear_softmax(self, problems):
        adapter, batch, *_ = problems.linear_softmax()
        check(*attack(problems, adapter, batch, scales=SMALL), SMALL)

    def test_linear_softmax_of_a_batch(self, problems):
        adapter, batch, *_ = problems.linear_softmax(batch=2)
        check(*attack(problems, adapter, batch, scales=SMALL), SMALL)

    def test_lenet(self, problems):
        adapter, batch = problems.small_lenet()
        scales = [s * 1e-3 for s in SMALL]
        check(*attack(problems, adapter, batch, scales=scales), scales)

    @pytest.mark.parametrize("name", ["bert", "gpt2"])
    def test_language_models_near_the_truth(self, name, problems):
        """Regularised towards the truth, as the damped I2F is; null directions stay where they are."""
        adapter, batch = problems.make(name, size=1)
        matrix = GradientJacobian(adapter, batch).to_dense()
        damping = 1e-2 * torch.linalg.matrix_norm(matrix, 2).item() ** 2
        check(*attack(problems, adapter, batch, damping=damping, scales=SMALL), SMALL)

    def test_a_part_of_the_gradient(self, problems):
        """Only the first convolution is released."""
        adapter, batch = problems.small_lenet()
        matrix = GradientJacobian(adapter, batch, shared="body.0").to_dense()
        damping = 1e-2 * torch.linalg.matrix_norm(matrix, 2).item() ** 2
        scales = [s * 1e-2 for s in SMALL]
        check(*attack(problems, adapter, batch, shared="body.0", damping=damping, scales=scales), scales)

    def test_cosine(self, problems):
        adapter, batch, *_ = problems.linear_softmax()
        check(*attack(problems, adapter, batch, attacker="cosine", scales=SMALL), SMALL)

    def test_cosine_is_not_the_l2_attacker(self, problems):
        adapter, batch, *_ = problems.linear_softmax()
        (l2, *_), _ = attack(problems, adapter, batch, scales=SMALL[:1])
        (cosine, *_), _ = attack(problems, adapter, batch, attacker="cosine", scales=SMALL[:1])
        assert (cosine - l2).norm() > 0.05 * l2.norm()
