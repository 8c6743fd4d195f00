"""What a comparison with double backward finds, at once, of products that are wrong in one place."""

import re

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lmleak.adapters import adapt
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.influence import GradientJacobian, factors
from tests.families import FAMILIES, LLAMA, SEQUENCES, image_problem, make
from tests.influence.vectors import randn


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shared", ["no-word-embeddings", "all"])
def test_right_products_pass_in_both_precisions(name, shared):
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        adapter, batch = make(name, dtype=dtype)
        assert 0 < GradientJacobian(adapter, batch, shared=shared).verify() < most


@pytest.mark.parametrize(
    ("kind", "product", "where"),
    [
        ("LinearFactor", "tangent", "J^T v"), ("LinearFactor", "cotangent", "J delta"),
        ("LinearFactor", "gram", "A v"), ("ScaleFactor", "tangent", "J^T v"), ("SumFactor", "cotangent", "J delta"),
        ("RowFactor", "gram", "A v"),
    ],
)  # fmt: skip
def test_one_wrong_product_of_one_kind_of_factor_is_found(kind, product, where, monkeypatch):
    adapter, batch = make("bert", dtype=torch.float32)
    jacobian = GradientJacobian(adapter, batch)
    right = getattr(getattr(factors, kind), product)

    def wrong(self, argument):
        result = right(self, argument)
        return tuple(1.2 * r for r in result) if isinstance(result, tuple) else 1.2 * result

    monkeypatch.setattr(getattr(factors, kind), product, wrong)
    with pytest.raises(UnsupportedModelError, match=rf"^{re.escape(where)} .*write implementation='autodiff'"):
        jacobian.verify()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixture_of_experts_of_no_listed_family(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2))
    adapter = adapt(model.to(dtype).eval(), task="causal-lm")
    jacobian = GradientJacobian(adapter, adapter.batch(SEQUENCES))
    assert "model.layers.0.mlp.experts.down_proj" in jacobian.by_autodiff
    assert 0 < jacobian.verify() < (1e-10 if dtype == torch.float64 else 1e-4)


class Steeper(torch.autograd.Function):
    """f(w) = w with f' = 1 for every w that a probe would draw, and 2 at the w that the layer has."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return torch.where(w < 80, g, 2 * g)


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 90.0))

    def forward(self, x):
        return x * Steeper.apply(self.weight)


class BentNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 6, 3), Bent(), nn.Linear(216, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self.stem(x))).flatten(1))


def test_a_layer_made_to_pass_every_other_check_is_found():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(BentNetwork().double().eval(), task="image-classification")
    batch = adapter.batch(randn(2, 3, 8, 8), [0, 1])
    with pytest.raises(UnsupportedModelError, match=r"J\^T v at layer.weight differs"):
        GradientJacobian(adapter, batch).verify()
    assert GradientJacobian(adapter, batch, implementation="autodiff").verify() < 1e-10


def test_a_part_of_the_parameters_is_compared_alone():
    adapter, batch = make("gpt2")
    part = GradientJacobian(adapter, batch).restrict(["transformer.h.0.attn.c_attn.weight"])
    assert 0 < part.verify(seed=3) < 1e-10


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(192, 4), nn.Linear(4, 3)
        nn.init.constant_(self.layer.bias, -100.0)

    def forward(self, x):
        return self.head(torch.relu(self.layer(x.flatten(1))))


def test_a_gradient_that_does_not_move_is_refused():
    adapter, batch = image_problem(Dead)
    with pytest.raises(DataError, match="does not move with the input"):
        GradientJacobian(adapter, batch).verify()
