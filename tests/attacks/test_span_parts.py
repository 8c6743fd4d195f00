"""The parts of the span attack against brute force: row space, first-layer filter, prefix model, head."""

import pytest
import torch
import transformers as tf
from torch import nn

from lmleak.adapters import adapt
from lmleak.attacks.span_filter import FirstLayerFilter, SeparableNorm, by_position
from lmleak.attacks.span_head import Unreadable, read_head
from lmleak.attacks.span_layers import PrefixModel, dependence, forward, linear_groups, prefix_sites
from lmleak.attacks.span_subspace import row_space, stacked_gradient
from lmleak.errors import UnsupportedCombinationError, UnsupportedModelError
from lmleak.gradients.capture import capture_gradient
from tests.families import SEQUENCES, make

DECODERS = ("gpt2", "gpt2-classifier", "opt", "gpt-neox", "llama", "unlisted-gemma")
LANGUAGE_MODELS = ("gpt2", "gpt2-untied", "opt", "gpt-neox", "llama-tied")
EPS = torch.finfo(torch.float64).eps


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def observe(adapter, batch, shared="no-word-embeddings"):
    return capture_gradient(adapter, batch, shared=shared).observation(lengths=False, labels=False)


def first_filter(adapter, batch, **options):
    gradient = observe(adapter, batch).gradient
    paths = adapter.attention_inputs(0)
    span = row_space(stacked_gradient(adapter, gradient, paths), torch.finfo(adapter.dtype).eps)
    return FirstLayerFilter(adapter, paths[0], span, seed=0, **options)


# Row space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width", "rank"), [(30, 12, 5), (30, 12, 1), (8, 20, 6), (6, 20, 6), (30, 12, 12)])
def test_rank_and_projection(rows, width, rank):
    d, x = randn(rows, rank), randn(rank, width, seed=1)
    span = row_space(d @ x, EPS)
    assert span.rank == rank
    torch.testing.assert_close(span.basis.T @ span.basis, torch.eye(rank, dtype=torch.float64))
    q, _ = torch.linalg.qr(x.T)
    probe = randn(7, width, seed=2)
    expected = (probe - probe @ q @ q.T).norm(dim=1) / probe.norm(dim=1)
    torch.testing.assert_close(span.residual(probe), expected, atol=1e-12, rtol=0)
    assert span.accepts(x).all()
    assert not span.accepts(probe).any() or rank == width


def test_rows_of_very_different_size_in_float32():
    """Equilibration: rows a million times smaller than others still count."""
    d, x = randn(40, 9, dtype=torch.float32), randn(9, 16, seed=1, dtype=torch.float32)
    x = x + 3  # a common mean, as hidden states have
    d[:30] *= 1e-6
    d[30:, 4:] = 0  # the large rows alone show four dimensions
    eps = torch.finfo(torch.float32).eps
    span = row_space(d @ x, eps)
    assert span.rank == 9
    assert span.accepts(x).all()
    assert not span.accepts(x + 1e-2 * randn(9, 16, seed=2)).any()


def test_expected_rounding_bounds_the_measured_one():
    """On float32 products the true inputs stay within the expected rounding, near full rank too."""
    eps = torch.finfo(torch.float32).eps
    for seed in range(5):
        x = randn(60, 64, seed=seed, dtype=torch.float32) * torch.logspace(0, -3, 64) + 1
        span = row_space(randn(192, 60, seed=seed + 9, dtype=torch.float32) @ x, eps)
        assert span.rank == 60
        assert (span.residual(x) < span.rounding(x)).all()
        assert span.rounding(x).max() < span.largest_accepted()
        other = randn(200, 64, seed=seed + 99) * torch.logspace(0, -3, 64) + 1
        assert span.accepts(other).double().mean() < 0.05


@pytest.mark.parametrize("factor", [1e-5, 3e-6])
def test_token_whose_gradient_is_near_rounding(factor):
    """It counts towards the rank, and its badly known direction lets no other input in."""
    eps = torch.finfo(torch.float32).eps
    d, x = randn(192, 20, dtype=torch.float32), randn(20, 64, seed=1, dtype=torch.float32)
    d[:, 7] *= factor
    span = row_space(d @ x, eps)
    assert span.rank == 20
    assert span.accepts(x[torch.arange(20) != 7]).all()
    assert span.residual(x[7]) < span.rounding(x[7])
    assert not span.accepts(randn(500, 64, seed=2)).any()
    assert not span.accepts(x[7] + 0.1 * randn(500, 64, seed=3)).any()


def test_zero_gradient_is_refused():
    with pytest.raises(UnsupportedCombinationError, match="is zero"):
        row_space(torch.zeros(6, 4), EPS)


def test_span_that_excludes_nothing_is_refused():
    span = row_space(randn(30, 12), EPS)
    with pytest.raises(UnsupportedCombinationError, match="rank 12 at hidden size 12"):
        span.null(randn(50, 12, seed=1))


# First-layer filter -------------------------------------------------------------------------------------------


class ShiftedRMSNorm(nn.Module):
    """RMSNorm with weights around zero, (1 + w), as Gemma has."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(randn(width)), 1e-4

    def forward(self, z):
        return z * (z.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", ["layer-norm", "layer-norm-bare", "rms-norm", "shifted-rms-norm"])
def test_norms_are_read_by_probing(kind, width):
    module = {
        "layer-norm": lambda: nn.LayerNorm(width, eps=1e-3),
        "layer-norm-bare": lambda: nn.LayerNorm(width, elementwise_affine=False),
        "rms-norm": lambda: nn.RMSNorm(width, eps=1e-3),
        "shifted-rms-norm": lambda: ShiftedRMSNorm(width),
    }[kind]()
    module = module.double()
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(randn(width, seed=seed))
    norm = SeparableNorm.probe("norm", module, width)
    assert norm.centred == kind.startswith("layer-norm")
    z = randn(5, width, seed=7).to(norm.gain.dtype)
    torch.testing.assert_close(norm(z), module(z), rtol=1e-5, atol=1e-6)


def test_separable_residual_equals_the_direct_one():
    width, gain, shift = 12, randn(12, seed=1), randn(12, seed=2)
    basis, _ = torch.linalg.qr(randn(width, 5, seed=3))
    tokens, positions = randn(20, width, seed=4), randn(6, width, seed=5)
    for centred in (True, False):
        norm = SeparableNorm("norm", gain, shift, 1e-5, centred)
        f = norm(tokens[:, None] + positions)
        expected = (f - f @ basis @ basis.T).square().sum(-1) / f.square().sum(-1)
        torch.testing.assert_close(norm.squared_residual(tokens, positions, basis), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", DECODERS)
def test_separable_filter_equals_brute_force(name, dtype):
    adapter, batch = make(name, dtype=dtype)
    fast, brute = first_filter(adapter, batch), first_filter(adapter, batch, separable=False)
    assert fast.norm is not None  # Gemma's scaled embeddings and (1 + w) norm included
    assert brute.norm is None
    assert fast.position_free == (name in ("gpt-neox", "llama", "unlisted-gemma"))
    for a, b in zip(fast.survivors(0, 7), brute.survivors(0, 7), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        torch.testing.assert_close(a.residual, b.residual, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_survivors_by_position_hold_the_batch_and_end_with_it(name):
    adapter, batch = make(name)
    found = list(by_position(first_filter(adapter, batch), window=2))
    assert len(found) == max(map(len, SEQUENCES)) - 1  # the last token of a causal LM reaches no loss as an input
    for position, survivors in enumerate(found):
        assert {s[position] for s in SEQUENCES if position < len(s) - 1} <= set(survivors.ids.tolist())
        assert survivors.residual.tolist() == sorted(survivors.residual.tolist())


def test_position_free_filter_has_one_set():
    adapter, batch = make("llama")
    survivors = by_position(first_filter(adapter, batch))
    assert set(next(survivors).ids.tolist()) >= {t for s in SEQUENCES for t in s[:-1]}
    assert len(list(survivors)) == adapter.max_positions() - 1


# Prefix model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_cached_rows_equal_the_whole_pass(name):
    adapter, _ = make(name)
    for site in prefix_sites(adapter):
        model = PrefixModel(adapter, site.paths[0])
        assert model.cached
        ids = torch.tensor([[7, 12, 33, 41, 20], [50, 8, 17, 28, 9]])
        whole = forward(adapter, ids, stop_at=site.paths[0])
        prefixes, both = None, torch.arange(2)
        for t in range(ids.shape[1]):
            prefixes, x = model.extend(prefixes, both, ids[:, t])
            torch.testing.assert_close(x, whole[:, t], rtol=1e-10, atol=1e-10)
        assert prefixes.ids.tolist() == ids.tolist()
        # Continuations of selected parents, in any order and number.
        chosen, tokens = torch.tensor([1, 0, 1]), torch.tensor([3, 4, 5])
        _, x = model.extend(prefixes, chosen, tokens)
        longer = torch.cat([ids[chosen], tokens[:, None]], dim=1)
        torch.testing.assert_close(x, forward(adapter, longer, stop_at=site.paths[0])[:, -1], rtol=1e-10, atol=1e-10)
        _, x = PrefixModel(adapter, site.paths[0], cached=False).extend(prefixes, chosen, tokens)
        torch.testing.assert_close(x, forward(adapter, longer, stop_at=site.paths[0])[:, -1])


def test_attention_input_is_what_the_maps_read():
    adapter, _ = make("llama")
    path = adapter.attention_inputs(1)[0]
    seen = []
    handle = adapter.model.get_submodule(path).register_forward_hook(lambda m, a, output: seen.append(a[0]))
    forward(adapter, torch.tensor([SEQUENCES[0]]))
    handle.remove()
    torch.testing.assert_close(forward(adapter, torch.tensor([SEQUENCES[0]]), stop_at=path), seen[0], rtol=0, atol=0)


def test_map_that_never_runs_is_named():
    adapter, _ = make("gpt2")
    adapter.model.spare = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="never reached 'spare'"):
        forward(adapter, torch.tensor([[7, 8]]), stop_at="spare")


@pytest.mark.parametrize(("name", "later"), [("gpt2", False), ("llama", False), ("bert", True), ("distilbert", True)])
def test_direction_of_attention_is_measured(name, later):
    adapter, _ = make(name)
    assert dependence(adapter, adapter.attention_inputs(0)[0]) == (False, False)
    assert dependence(adapter, adapter.attention_inputs(1)[0]) == (True, later)


def test_maps_fed_one_tensor_are_grouped():
    adapter, _ = make("llama")
    groups = linear_groups(adapter, adapter.blocks[0] + ".")
    short = [tuple(path.rpartition(".")[2] for path in group) for group in groups]
    assert short == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert linear_groups(adapter)[-1] == ("lm_head",)


def test_parallel_blocks_fall_back_to_the_attention_output():
    """In GPT-NeoX the MLP of a block reads no attention, so it cannot tell prefixes apart."""
    adapter, _ = make("gpt-neox")
    first, second = list(prefix_sites(adapter))
    assert first.where == "the attention input of block 1"
    assert second.paths[0].endswith("attention.dense")


# Head ---------------------------------------------------------------------------------------------------------


def tree_of(sequences):
    return sorted({tuple(s[: t + 1]) for s in sequences for t in range(len(s))}, key=len)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_head_tells_endings_and_repetitions(name):
    adapter, _ = make(name)
    texts = [[7, 12, 33], [7, 12, 33], [7, 12, 9], [7, 12, 33, 41], [50, 8]]
    observation = observe(adapter, adapter.batch(texts))
    endings = read_head(adapter, observation, tree_of([t[:-1] for t in texts]))
    assert sorted([*e.prefix, e.last] for e in endings) == sorted(texts)
    assert min(e.certainty for e in endings) > 1 - 1e-8


def test_false_prefixes_get_no_text():
    adapter, _ = make("gpt2")
    observation = observe(adapter, adapter.batch(SEQUENCES[:2]))
    endings = read_head(adapter, observation, tree_of([*(s[:-1] for s in SEQUENCES[:2]), [7, 12, 9], [50, 4]]))
    assert sorted([*e.prefix, e.last] for e in endings) == sorted(SEQUENCES[:2])


def test_missing_prefix_is_noticed():
    adapter, batch = make("gpt2")
    with pytest.raises(Unreadable, match="do not explain"):
        read_head(adapter, observe(adapter, batch), tree_of(s[:-1] for s in SEQUENCES[:2]))
    adapter, batch = make("gpt2-classifier")
    with pytest.raises(Unreadable, match="do not explain"):
        read_head(adapter, observe(adapter, batch), tree_of(SEQUENCES[:2]))


def test_withheld_head_and_too_many_prefixes_are_named():
    adapter, batch = make("gpt2")
    with pytest.raises(Unreadable, match="not released"):
        read_head(adapter, observe(adapter, batch, "block:0-1"), tree_of(SEQUENCES))
    with pytest.raises(Unreadable, match="not fewer than the hidden size 16"):
        read_head(adapter, observe(adapter, batch), tree_of([range(20, 40)]))


def test_scaled_gradient_of_a_language_model_is_still_read():
    """Clipping scales the gradient; the counts are ratios."""
    adapter, batch = make("gpt2")
    observation = observe(adapter, batch)
    scaled = {n: 0.01 * g for n, g in observation.gradient.items()}
    observation = type(observation)(gradient=scaled, task=observation.task, batch_size=3)
    endings = read_head(adapter, observation, tree_of(s[:-1] for s in SEQUENCES))
    assert sorted([*e.prefix, e.last] for e in endings) == sorted(SEQUENCES)


def test_classifier_head_tells_whole_texts():
    config = tf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, num_labels=2, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(tf.GPT2ForSequenceClassification(config).double().eval())
    texts = [[7, 12, 33], [7, 12, 33], [7, 12], [50, 8]]
    endings = read_head(adapter, observe(adapter, adapter.batch(texts, [0, 1, 1, 0])), tree_of(texts))
    assert sorted(list(e.prefix) for e in endings) == sorted(texts)
