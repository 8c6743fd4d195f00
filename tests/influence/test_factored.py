"""Products through token-sized factors: every kind of layer, what goes by double backward, what is allocated."""

import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lmleak.adapters import LeNet, adapt
from lmleak.gradients import capture_gradient
from lmleak.influence import CosineJacobian, GradientJacobian, PartialInputJacobian, inversion_influence
from lmleak.influence.factors import LinearFactor
from lmleak.influence.jacobian import IMPLEMENTATIONS
from tests.families import FAMILIES, image_problem, make
from tests.influence.vectors import randn, relative


class Residual(nn.Module):
    """Convolutions of all sorts, BatchNorm, activations in place, a layer used twice, a parameter of no module."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.twice, self.depthwise = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.group_norm, self.slope = nn.GroupNorm(2, 6), nn.PReLU(6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.fc = nn.Linear(96, 3)
        self.elsewhere = nn.Linear(3, 3)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu_()  # in place, right after a module
        y = torch.tanh(self.twice(torch.tanh(self.twice(y)))) * self.scale
        y = self.slope(self.group_norm(self.depthwise(y)))
        return nn.functional.linear(self.fc(y.flatten(1)), self.elsewhere.weight)  # its module never runs


VISION = {
    "lenet": lambda: LeNet(channels=3, size=8, num_classes=3),
    "odd": Residual,
    "resnet": lambda: tf.ResNetForImageClassification(tf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, attn_implementation="eager")),
    "convnext": lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3, image_size=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION)
def test_image_models_equal_double_backward(name):
    adapter, batch = image_problem(VISION[name])
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    v = randn(*fast.x.shape, seed=1)
    assert relative(fast.gram(v), reference.gram(v)) < 1e-10
    delta = {n: randn(*s, seed=2) for n, s in fast.parameter_shapes.items()}
    assert relative(fast.matvec(delta), reference.matvec(delta)) < 1e-10
    got, expected = fast.rmatvec(v), reference.rmatvec(v)
    largest = max(t.norm() for t in expected.values())
    assert all((got[n] - expected[n]).norm() < 1e-10 * largest for n in expected)


def test_what_has_no_factors_goes_by_double_backward_and_is_named():
    adapter, batch = image_problem(Residual)
    products = GradientJacobian(adapter, batch)._products
    # The BatchNorm's output is overwritten in place; GroupNorm is of no known kind.
    assert set(products.by_autodiff) == {
        "norm.weight", "norm.bias", "group_norm.weight", "group_norm.bias", "slope.weight", "scale",
        "elsewhere.weight",
    }  # fmt: skip
    assert set(products.factors) == {
        "stem.weight", "twice.weight", "twice.bias", "depthwise.weight", "depthwise.bias", "fc.weight", "fc.bias",
    }  # fmt: skip
    jacobian = GradientJacobian(adapter, batch)
    assert set(jacobian.by_autodiff) == set(products.by_autodiff)
    assert "by double backward: scale, norm.weight" in repr(jacobian)
    assert jacobian.restrict(["fc.weight", "scale"]).by_autodiff == ("scale",)
    assert "backward" not in repr(jacobian.restrict(["fc.weight"]))


@pytest.mark.parametrize("attacker", ["l2", "cosine"])
def test_a_result_names_what_went_by_double_backward(attacker):
    adapter, batch = image_problem(Residual)
    named = GradientJacobian(adapter, batch).by_autodiff
    settings = {"noise_std": 0.1, "attacker": attacker, "max_products": 3}
    assert inversion_influence(adapter, batch, **settings, shared="all").by_autodiff == named != ()
    lenet, images = image_problem(VISION["lenet"])
    assert inversion_influence(lenet, images, **settings, shared="all").by_autodiff == ()
    everything = inversion_influence(lenet, images, **settings, shared="all", implementation="autodiff")
    assert everything.by_autodiff == GradientJacobian(lenet, images).parameter_names


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_have_factors_for_every_parameter(name):
    adapter, batch = make(name)
    products = GradientJacobian(adapter, batch)._products
    left = {"opt": {"model.decoder.embed_positions.weight"}}  # its module adds an offset to the indices
    assert set(products.by_autodiff) == left.get(name, set())


@pytest.mark.parametrize("large", [1, 2**18])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "opt"])
def test_float32_equals_double_backward(name, large, monkeypatch):
    """Whether linear maps go by oneDNN or by torch's own product, one by one and in a block."""
    monkeypatch.setattr("lmleak.influence.row_maps.LARGE", large)
    adapter, batch = make(name, dtype=torch.float32)
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    v = randn(*fast.x.shape, dtype=torch.float32)
    assert relative(fast.gram(v), reference.gram(v)) < 1e-4
    delta = {n: randn(*p.shape, seed=i, dtype=torch.float32) for i, (n, p) in enumerate(fast.theta.items())}
    assert relative(fast.matvec(delta), reference.matvec(delta)) < 1e-4
    fast.block_size = 3
    block = randn(fast.dx, 3, seed=1, dtype=torch.float32)
    assert relative(fast.gram_operator().matmat(block), reference.gram_operator().matmat(block)) < 1e-4


class LargestNewTensor(TorchDispatchMode):
    """While active, notes the size of the largest tensor that an operation allocates."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return output


def wide_gpt2(length=6):
    """Width 64, inner width 256, vocabulary 1,000, a tied head; few tokens."""
    config = tf.GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(tf.GPT2LMHeadModel(config))
    return adapter, adapter.batch([list(range(5, 5 + length))])


FUSED_MAP = 3 * 64 * 64  # numbers in the map of Q, K and V: fewer have only the square ones


def test_a_tied_table_adds_nothing_of_its_size():
    """30 tokens of width 64: twice their logits is nearly the table, and with one more factor more than it."""
    adapter, batch = wide_gpt2(length=30)
    jacobian = GradientJacobian(adapter, batch, shared="all")
    v = randn(*jacobian.x.shape, dtype=torch.float32)
    with LargestNewTensor() as watch:
        jacobian.gram(v)
    assert watch.numbers <= 30 * 1000 < adapter.parameters()["transformer.wte.weight"].numel()
    assert jacobian._products.factors["transformer.wte.weight"].by_tokens


@pytest.mark.parametrize("shared", ["no-word-embeddings", "all"])
@pytest.mark.parametrize("way", ["by tokens", "by weights", "autodiff"])
def test_no_tensor_of_a_weights_size_is_allocated(way, shared, monkeypatch):
    """Products of the weights' size and the reference show that the watch sees; with "all" the tied table counts."""
    monkeypatch.setattr("lmleak.influence.row_maps.LARGE", 1)
    adapter, batch = wide_gpt2()
    if way == "by weights":
        monkeypatch.setattr("lmleak.influence.factors.positions_are_cheaper", lambda *sizes: False)
    implementation = "autodiff" if way == "autodiff" else "factored"
    with LargestNewTensor() as watch:
        jacobian = GradientJacobian(adapter, batch, shared=shared, implementation=implementation)
        for seed in range(2):
            jacobian.gram(randn(*jacobian.x.shape, seed=seed, dtype=torch.float32))
    assert (watch.numbers < FUSED_MAP) == (way == "by tokens"), watch.numbers


class Shared(nn.Module):
    """A matrix that is used as it is, twice, and transposed, and a table that is looked up twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.back = nn.Linear(48, 48), Conv1D(48, 48)
        self.back.weight = self.fc.weight
        self.table, self.head = nn.Embedding(48, 48, padding_idx=2), nn.Linear(48, 3)

    def forward(self, x):
        y = torch.tanh(self.fc(x.flatten(2)) + self.table(torch.tensor([1, 2, 1])))
        y = self.back(torch.tanh(self.fc(y) * self.table(torch.tensor([[4, 1, 4]]))))
        return self.head(torch.tanh(y).mean(1))


@pytest.mark.parametrize("by_tokens", [True, False])
def test_a_weight_that_is_used_more_than_once(by_tokens, monkeypatch):
    monkeypatch.setattr("lmleak.influence.factors.positions_are_cheaper", lambda *sizes: by_tokens)
    adapter, batch = image_problem(Shared, (2, 3, 6, 8))
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    parts = {name: len(factor.parts) for name, factor in fast._products.factors.items()}
    assert (parts["fc.weight"], parts["table.weight"], parts["head.weight"]) == (3, 2, 1)
    v = randn(*fast.x.shape)
    assert relative(fast.gram(v), reference.gram(v)) < 1e-10
    names = ["fc.weight", "table.weight"]
    assert relative(fast.restrict(names).gram(v), reference.restrict(names).gram(v)) < 1e-10
    with LargestNewTensor() as watch:
        fast.gram(v)
    assert (watch.numbers < 48 * 48) == by_tokens


def test_tokens_or_weights_whatever_is_cheaper():
    assert LinearFactor(randn(6, 64), randn(6, 256)).by_tokens
    assert not LinearFactor(randn(600, 64), randn(600, 256)).by_tokens


def test_all_probes_share_their_memory():
    adapter, batch = wide_gpt2(length=20)
    products = GradientJacobian(adapter, batch)._products
    memories = {probe.untyped_storage().data_ptr() for probe in products.probes.values()}
    assert len(memories) == 1 < len(products.probes)
    assert not any(probe.any() for probe in products.probes.values())


def test_graphs_are_freed_with_the_operator():
    adapter, batch = wide_gpt2()
    jacobian = GradientJacobian(adapter, batch)
    jacobian.gram(randn(*jacobian.x.shape, dtype=torch.float32))
    watched = [weakref.ref(t) for t in (*jacobian._products.nodes.values(), jacobian._products.transpose)]
    assert all(reference() is not None for reference in watched)
    del jacobian  # no cycle is left for the collector
    assert not any(reference() is not None for reference in watched)


def test_cosine_products_agree_with_their_definition():
    adapter, batch = make("bert")
    plain = GradientJacobian(adapter, batch)
    cosine = CosineJacobian(plain, capture_gradient(adapter, batch).gradient)
    v = randn(*plain.x.shape) * plain.free
    assert relative(cosine.gram(v), cosine.matvec(cosine.rmatvec(v))) < 1e-10


def test_a_restricted_operator_is_the_part_of_its_parameters():
    adapter, batch = make("gpt2")
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    names = [n for n in fast.parameter_names if ".h.0." in n]
    v = randn(*fast.x.shape)
    assert relative(fast.restrict(names).gram(v), reference.restrict(names).gram(v)) < 1e-10


def blocks_and_one_by_one(jacobian, count=5):
    """Return A V by blocks of three and a column at a time."""
    columns = randn(jacobian.dx, count, seed=4, dtype=jacobian.dtype)
    jacobian.block_size = 3
    many = jacobian.gram_operator()
    jacobian.block_size = 1
    single = jacobian.gram_operator()
    together, alone = many.matmat(columns), single.matmat(columns)
    assert many.products == single.products == count
    return together, alone


@pytest.mark.parametrize("name", [*FAMILIES, *VISION])
def test_several_products_at_once_are_those_one_by_one(name):
    """Texts of unequal lengths, so that padding is left out of both."""
    adapter, batch = image_problem(VISION[name]) if name in VISION else make(name)
    together, alone = blocks_and_one_by_one(GradientJacobian(adapter, batch))
    assert relative(together, alone) < 1e-12


@pytest.mark.parametrize("kind", ["autodiff", "dense", "cosine", "partial", "float32"])
def test_several_products_at_once_of_other_operators(kind):
    adapter, batch = make("bert", size=2, dtype=torch.float32 if kind == "float32" else torch.float64)
    jacobian = GradientJacobian(adapter, batch, implementation=kind if kind in IMPLEMENTATIONS else "factored")
    if kind == "cosine":
        jacobian = CosineJacobian(jacobian, capture_gradient(adapter, batch).gradient)
    if kind == "partial":
        jacobian = PartialInputJacobian.of_example(jacobian, 1)
    assert relative(*blocks_and_one_by_one(jacobian)) < (1e-5 if kind == "float32" else 1e-12)


def test_blocks_are_as_wide_as_pays():
    adapter, batch = make("bert", size=2)
    jacobian = GradientJacobian(adapter, batch)
    assert jacobian.gram_operator().block_size == 64  # a tiny model
    assert CosineJacobian(jacobian, capture_gradient(adapter, batch).gradient).gram_operator().block_size == 64
    assert PartialInputJacobian.of_example(jacobian, 0).gram_operator().block_size == 64
    assert GradientJacobian(adapter, batch, implementation="autodiff").gram_operator().block_size == 1


def test_large_products_go_one_by_one(monkeypatch):
    monkeypatch.setattr("lmleak.influence.factored.BLOCK_NUMBERS", 100_000)
    sizes = {n: GradientJacobian(*make("bert", size=n)).block_size for n in (1, 2, 3)}
    assert 64 > sizes[1] > sizes[2] > sizes[3] >= 1
    lenet, images = image_problem(VISION["lenet"])
    as_others = GradientJacobian(lenet, images)
    monkeypatch.setattr("lmleak.influence.factored.CONVOLUTION_WEIGHT", 1)
    assert as_others.block_size < GradientJacobian(lenet, images).block_size
