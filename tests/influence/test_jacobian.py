"""The operator J: closed form, dense against automatic differentiation, finite differences, padding, restriction."""

import pytest
import torch

from lmleak.adapters import adapt
from lmleak.errors import ConfigError, DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import CosineJacobian, GradientJacobian
from tests.families import FAMILIES, SEQUENCES, make
from tests.influence.vectors import relative

IMPLEMENTATIONS = ("factored", "autodiff", "dense")
RIGHT_ONLY = ("bert", "distilbert", "roberta", "unlisted-electra")  # they read the first position
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class TestClosedForm:
    """Linear softmax z = W x + b: r = p - e_y, S = diag(p) - p p^T, M = S W."""

    def parts(self, weight, bias, x, y):
        p = torch.softmax(weight @ x + bias, 0)
        r = p.clone()
        r[y] -= 1
        return r.detach(), ((torch.diag(p) - torch.outer(p, p)) @ weight).detach()

    @implementations
    def test_one_example(self, implementation, problems):
        adapter, batch, weight, bias = problems.linear_softmax()
        x = batch.inputs["pixel_values"].flatten()
        r, m = self.parts(weight, bias, x, 0)
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        assert jacobian.shape == (9, 50)
        a = (
            r.dot(r) * torch.eye(9, dtype=torch.float64)
            + (x.dot(x) + 1) * m.T @ m
            + torch.outer(m.T @ r, x)
            + torch.outer(x, m.T @ r)
        )
        u = problems.randn(9, seed=5)
        image = u.reshape(1, 1, 3, 3)
        assert relative(jacobian.gram(image).flatten(), a @ u) < 1e-8
        got = jacobian.rmatvec(image)
        assert relative(got["1.weight"], torch.outer(m @ u, x) + torch.outer(r, u)) < 1e-8
        assert relative(got["1.bias"], m @ u) < 1e-8
        delta = problems.like_theta(jacobian)
        expected = m.T @ (delta["1.weight"] @ x) + delta["1.weight"].T @ r + m.T @ delta["1.bias"]
        assert relative(jacobian.matvec(delta).flatten(), expected) < 1e-8
        dense = jacobian.to_dense()
        assert relative(dense @ dense.T, a) < 1e-8
        operator = jacobian.gram_operator()
        assert relative(operator.to_dense(), a) < 1e-8
        assert operator.products == 9

    @implementations
    def test_a_batch_stacks_its_examples_over_the_batch_size(self, implementation, problems):
        adapter, batch, weight, bias = problems.linear_softmax(batch=3)
        images = batch.inputs["pixel_values"].flatten(1)
        parts = [self.parts(weight, bias, x, y) for x, y in zip(images, batch.targets.tolist(), strict=True)]
        u = problems.randn(3, 9, seed=5)
        got = GradientJacobian(adapter, batch, implementation=implementation).rmatvec(u.reshape(3, 1, 3, 3))
        expected = sum(
            torch.outer(m @ v, x) + torch.outer(r, v) for (r, m), v, x in zip(parts, u, images, strict=True)
        )
        assert relative(got["1.weight"], expected / 3) < 1e-8
        assert relative(got["1.bias"], sum(m @ v for (_, m), v in zip(parts, u, strict=True)) / 3) < 1e-8


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_implementations_agree_and_are_adjoint(name, side, problems):
    if side == "left" and name in RIGHT_ONLY:
        adapter, batch = make(name, size=1, padding_side="left")  # nothing to pad
    else:
        adapter, batch = make(name, padding_side=side)
    fast, reference, dense = (GradientJacobian(adapter, batch, implementation=i) for i in IMPLEMENTATIONS)
    assert fast.shape == dense.shape
    assert fast.dx == int(batch.layout["attention_mask"].sum()) * adapter.width
    assert fast.parameter_names == dense.parameter_names == adapter.select("no-word-embeddings").names
    v, delta = problems.randn(*fast.x.shape, seed=1), problems.like_theta(fast, seed=2)
    names = fast.parameter_names
    for matrix_free in (fast, reference):
        assert relative(matrix_free.gram(v), dense.gram(v)) < 1e-10
        assert relative(matrix_free.matvec(delta), dense.matvec(delta)) < 1e-10
        assert relative(problems.flat(matrix_free.rmatvec(v), names), problems.flat(dense.rmatvec(v), names)) < 1e-10
    for jacobian in (fast, reference, dense):
        left = (jacobian.matvec(delta) * v).sum().item()
        right = (problems.flat(jacobian.rmatvec(v), names) @ problems.flat(delta, names)).item()
        assert left == pytest.approx(right, rel=1e-8)
        assert torch.equal(jacobian.gram(v), jacobian.gram(v))
        assert torch.equal(jacobian.matvec(delta), jacobian.matvec(delta))
        assert relative(jacobian.gram(v), jacobian.matvec(jacobian.rmatvec(v))) < 1e-11


SHARED = ("all", "no-word-embeddings", "embeddings", "block:1", "head", r"bias$")


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2-untied", "llama", "llama-tied", "bert-mlm"])
def test_products_are_derivatives_of_the_captured_gradient(name, shared, problems):
    """Central differences in x, looked-up rows of the table included where they are shared."""
    if name.startswith("llama") and shared == r"bias$":
        shared = r"norm"  # it has no biases
    adapter, batch = make(name, size=2)
    x, free = adapter.input(batch), adapter.free(batch)
    gradient = problems.gradient_function(adapter, batch, shared)
    v, step = problems.randn(*x.shape, seed=1) * free, 1e-5
    difference = ((gradient(x + step * v) - gradient(x - step * v)) / (2 * step)).detach()
    captured = capture_gradient(adapter, batch, shared=shared).gradient
    assert torch.allclose(gradient(x), problems.flat(captured, list(captured)), rtol=1e-12, atol=1e-15)
    for implementation in IMPLEMENTATIONS:
        jacobian = GradientJacobian(adapter, batch, shared=shared, implementation=implementation)
        assert jacobian.parameter_names == tuple(captured)
        got = problems.flat(jacobian.rmatvec(v), jacobian.parameter_names)
        assert relative(got, difference) < 1e-6
        delta = problems.like_theta(jacobian)
        flat = problems.flat(delta, jacobian.parameter_names)
        error = (jacobian.matvec(delta) * v).sum() - flat @ difference
        assert error.abs() < 1e-6 * flat.norm() * difference.norm()


def test_the_looked_up_rows_are_part_of_the_embedding_gradient():
    """d g[row t] / d x is the Hessian in x: symmetric, and zero for tokens that were not used."""
    adapter, batch = make("gpt2-untied", size=1)
    jacobian = GradientJacobian(adapter, batch, shared="wte")
    dense = jacobian.to_dense().reshape(jacobian.dx, 60, 16)
    used = SEQUENCES[0]
    hessian = dense[:, used].reshape(jacobian.dx, jacobian.dx)
    assert torch.allclose(hessian, hessian.T, atol=1e-12)
    assert dense.abs().sum((0, 2)).nonzero().flatten().tolist() == sorted(used[:-1])


class TestPadding:
    @implementations
    def test_rows_of_padding_are_zero_and_ignored(self, implementation, problems):
        adapter, batch = make("gpt2")
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        padding = ~adapter.free(batch)
        delta = problems.like_theta(jacobian)
        assert jacobian.matvec(delta)[padding].abs().max() == 0
        v = problems.randn(*jacobian.x.shape)
        assert jacobian.gram(v)[padding].abs().max() == 0
        loud = v + 1e6 * padding
        assert torch.equal(jacobian.gram(loud), jacobian.gram(v))
        quiet = problems.flat(jacobian.rmatvec(v), jacobian.parameter_names)
        assert torch.equal(problems.flat(jacobian.rmatvec(loud), jacobian.parameter_names), quiet)

    @implementations
    def test_known_coordinates_are_cut_out_of_the_operator(self, implementation, problems, monkeypatch):
        """A proper model never reads padding; here the coordinates that are not free do reach the gradient."""
        adapter, batch, *_ = problems.linear_softmax()
        whole = GradientJacobian(adapter, batch).to_dense()
        free = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool).reshape(1, 1, 3, 3)
        monkeypatch.setattr(adapter, "free", lambda batch: free)
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        kept = whole[free.flatten()]
        assert jacobian.shape == (6, 50)
        assert relative(jacobian.to_dense(), kept) < 1e-12
        assert relative(jacobian.gram_operator().to_dense(), kept @ kept.T) < 1e-10
        v = problems.randn(1, 1, 3, 3)
        assert relative(jacobian.flatten(jacobian.gram(v)), kept @ (kept.T @ v[free])) < 1e-10
        assert relative(problems.flat(jacobian.rmatvec(v), jacobian.parameter_names), kept.T @ v[free]) < 1e-10
        assert jacobian.gram(v)[~free].abs().max() == 0

    def test_dx_counts_real_coordinates(self):
        adapter, batch = make("gpt2")
        jacobian = GradientJacobian(adapter, batch)
        assert jacobian.dx == sum(map(len, SEQUENCES)) * 16
        assert jacobian.to_dense().shape == jacobian.shape
        assert jacobian.gram_operator().shape == (jacobian.dx, jacobian.dx)

    def test_flatten_and_unflatten_are_inverse(self, problems):
        adapter, batch = make("gpt2", padding_side="left")
        jacobian = GradientJacobian(adapter, batch)
        vector = problems.randn(jacobian.dx)
        assert torch.equal(jacobian.flatten(jacobian.unflatten(vector)), vector)
        assert jacobian.unflatten(vector)[~jacobian.free].abs().max() == 0

    def test_the_side_of_the_padding_changes_nothing(self):
        """A is the same matrix in the order of the tokens."""
        dense = []
        for side in ("right", "left"):
            adapter, batch = make("llama", padding_side=side)
            matrix = GradientJacobian(adapter, batch).to_dense()
            dense.append(matrix @ matrix.T)
        assert relative(dense[1], dense[0]) < 1e-10

    def test_to_dense_is_the_operator_column_by_column(self, problems):
        adapter, batch = make("gpt2", size=2)
        jacobian = GradientJacobian(adapter, batch)
        dense, delta = jacobian.to_dense(), problems.like_theta(jacobian)
        expected = jacobian.flatten(jacobian.matvec(delta))
        assert relative(dense @ problems.flat(delta, jacobian.parameter_names), expected) < 1e-10


class TestRestriction:
    @implementations
    def test_it_keeps_the_dense_columns(self, implementation, problems):
        adapter, batch = make("gpt2", size=2)
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        kept = [n for n in jacobian.parameter_names if ".h.1." in n]
        restricted = jacobian.restrict(reversed(kept))
        assert restricted.parameter_names == tuple(kept)
        other = GradientJacobian(adapter, batch, shared="block:1", implementation=implementation)
        assert restricted.shape == other.shape
        v, delta = problems.randn(*jacobian.x.shape), problems.like_theta(restricted)
        assert relative(restricted.gram(v), other.gram(v)) < 1e-10
        assert relative(restricted.matvec(delta), jacobian.matvec(delta)) < 1e-10
        assert set(restricted.rmatvec(v)) == set(kept)
        columns, start = [], 0
        for name, shape in jacobian.parameter_shapes.items():
            columns += [torch.arange(start, start + shape.numel())] if name in kept else []
            start += shape.numel()
        assert relative(restricted.to_dense(), jacobian.to_dense()[:, torch.cat(columns)]) < 1e-12

    def test_the_whole_is_left_as_it_was(self, problems):
        adapter, batch = make("gpt2", size=1)
        jacobian = GradientJacobian(adapter, batch)
        shape, v = jacobian.shape, problems.randn(*jacobian.x.shape)
        before = jacobian.gram(v)
        jacobian.restrict(jacobian.parameter_names[:1]).gram(v)
        assert jacobian.shape == shape
        assert torch.equal(jacobian.gram(v), before)

    def test_a_restriction_refuses_what_it_dropped(self, problems):
        adapter, batch = make("gpt2", size=1)
        jacobian = GradientJacobian(adapter, batch)
        restricted = jacobian.restrict(jacobian.parameter_names[:1])
        with pytest.raises(DataError, match="not among the shared parameters"):
            restricted.matvec(problems.like_theta(jacobian))

    @pytest.mark.parametrize("names", [[], ["no.such.weight"], ["transformer.ln_f.bias", "no.such.weight"]])
    def test_unknown_names_are_refused(self, names):
        adapter, batch = make("gpt2", size=1)
        with pytest.raises(ConfigError, match="expected some of"):
            GradientJacobian(adapter, batch).restrict(names)


class TestArguments:
    @implementations
    def test_missing_names_count_as_zero(self, implementation, problems):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        delta = problems.like_theta(jacobian)
        some = {n: delta[n] for n in list(delta)[:5]}
        padded = {n: some.get(n, torch.zeros_like(d)) for n, d in delta.items()}
        assert relative(jacobian.matvec(some), jacobian.matvec(padded)) < 1e-12
        assert jacobian.matvec({}).abs().max() == 0

    @implementations
    def test_wrong_vectors_are_refused(self, implementation):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        with pytest.raises(DataError, match=r"'bert.pooler.dense.bias' has shape .* expected"):
            jacobian.matvec({"bert.pooler.dense.bias": torch.zeros(3)})
        with pytest.raises(DataError, match="not among the shared"):
            jacobian.matvec({adapter.lookup_table(): torch.zeros(60, 16)})
        for product in (jacobian.rmatvec, jacobian.gram):
            with pytest.raises(DataError, match="shaped like x"):
                product(torch.zeros(jacobian.dx))

    def test_another_dtype_is_converted(self, problems):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch)
        delta = {n: d.float() for n, d in problems.like_theta(jacobian).items()}
        expected = jacobian.matvec({n: d.double() for n, d in delta.items()})
        assert torch.equal(jacobian.matvec(delta), expected)

    def test_an_unknown_implementation_is_refused(self):
        adapter, batch = make("bert", size=1)
        with pytest.raises(ConfigError, match="Did you mean 'dense'"):
            GradientJacobian(adapter, batch, implementation="dens")

    def test_a_dense_matrix_that_is_too_large_is_refused_before_it_is_made(self, monkeypatch):
        adapter, batch = make("bert", size=1)
        monkeypatch.setattr("lmleak.influence.products.DENSE_LIMIT", 1000)
        with pytest.raises(ConfigError, match="take products instead"):
            GradientJacobian(adapter, batch, implementation="dense")

    def test_products_carry_no_graph(self, problems):
        adapter, batch = make("bert", size=1)
        for implementation in IMPLEMENTATIONS:
            jacobian = GradientJacobian(adapter, batch, implementation=implementation)
            v = problems.randn(*jacobian.x.shape).requires_grad_()
            assert not jacobian.rmatvec(v.detach())["classifier.weight"].requires_grad
            assert not jacobian.matvec(problems.like_theta(jacobian)).requires_grad


def test_a_loss_without_the_input_is_refused():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.bias.expand(len(x), 3)

    constant = adapt(Constant())
    with pytest.raises(DataError, match="J is zero"):
        GradientJacobian(constant, constant.batch(torch.ones(1, 1, 2, 2), [0]))


class TestCosine:
    def test_it_is_the_derivative_of_the_direction(self, problems):
        adapter, batch = make("gpt2", size=1)
        x = adapter.input(batch)
        gradient = problems.gradient_function(adapter, batch)

        def direction(x):
            g = gradient(x).detach()
            return g / g.norm()

        jacobian = GradientJacobian(adapter, batch)
        cosine = CosineJacobian(jacobian, capture_gradient(adapter, batch).gradient)
        v, step = problems.randn(*x.shape), 1e-5
        expected = (direction(x + step * v) - direction(x - step * v)) / (2 * step)
        assert relative(problems.flat(cosine.rmatvec(v), cosine.parameter_names), expected) < 1e-6

    def test_it_is_adjoint_and_blind_to_the_length(self, problems):
        adapter, batch = make("bert", size=2)
        jacobian, g = GradientJacobian(adapter, batch), capture_gradient(adapter, batch).gradient
        cosine = CosineJacobian(jacobian, g)
        v, delta = problems.randn(*jacobian.x.shape), problems.like_theta(jacobian)
        left = (cosine.matvec(delta) * v).sum().item()
        names = cosine.parameter_names
        right = (problems.flat(cosine.rmatvec(v), names) @ problems.flat(delta, names)).item()
        assert left == pytest.approx(right, rel=1e-8)
        assert cosine.matvec(g).norm() < 1e-10 * jacobian.matvec(g).norm()
        assert relative(cosine.gram(v), cosine.matvec(cosine.rmatvec(v))) < 1e-12
        assert cosine.shape == jacobian.shape
        some = {names[0]: delta[names[0]]}
        padded = {n: some.get(n, torch.zeros_like(delta[n])) for n in names}
        assert relative(cosine.matvec(some), cosine.matvec(padded)) < 1e-12

    def test_the_hessian_of_the_cosine_distance_is_its_gram(self, problems):
        adapter, batch, *_ = problems.linear_softmax()
        x = adapter.input(batch)
        gradient = problems.gradient_function(adapter, batch)
        g0 = gradient(x).detach()

        def distance(x):
            g = gradient(x)
            return 1 - g @ g0 / (g.norm() * g0.norm())

        hessian = torch.autograd.functional.hessian(distance, x).reshape(9, 9)
        jacobian = GradientJacobian(adapter, batch)
        cosine = CosineJacobian(jacobian, capture_gradient(adapter, batch).gradient)
        assert relative(cosine.gram_operator().to_dense(), hessian) < 1e-8

    def test_a_gradient_without_a_direction_is_refused(self):
        adapter, batch = make("bert", size=1)
        jacobian = GradientJacobian(adapter, batch)
        zero = {n: torch.zeros(s) for n, s in jacobian.parameter_shapes.items()}
        with pytest.raises(DataError, match="no direction"):
            CosineJacobian(jacobian, zero)
