"""The noise-aware span attack: better than thresholds where there is noise, as good where there is none."""

import math

import pytest
import torch
import transformers as tf

import lmleak
from lmleak.adapters import adapt
from lmleak.attacks.noisy_beam import Evidence, surprise_of_pairs
from lmleak.attacks.noisy_span import NoisySpan, select
from lmleak.attacks.span import Span
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from lmleak.types import Aggregation
from tests.families import make

LENGTH = 9
VISIBLE = (LENGTH - 1) / LENGTH  # the last token of a causal model's text is no input that reaches the loss


@pytest.fixture(scope="module")
def case():
    """Three random texts in a model of 128 dimensions."""
    config = tf.GPT2Config(
        vocab_size=500, n_embd=128, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(tf.GPT2LMHeadModel(config).eval())
    ids = torch.randint(3, 500, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    batch = adapter.batch(ids)
    return adapter, batch, capture_gradient(adapter, batch, reveal_lengths=False)


def recover(adapter, shared, **options):
    return NoisySpan(**options).run(adapter, shared)


@pytest.mark.parametrize("defense", ["none", "bf16", "quantize(bits=8)", "gaussian(std=0.01, unit=rms)"])
@pytest.mark.parametrize("lengths", ["unknown", "given"])
def test_every_token_comes_out_the_last_one_by_the_head(case, defense, lengths):
    adapter, batch, _ = case
    shared = capture_gradient(adapter, batch, reveal_lengths=lengths == "given")
    found = recover(adapter, parse_defense(defense)(shared), lengths=lengths)
    if (defense, lengths) == ("quantize(bits=8)", "unknown"):  # known weakness: texts run on, in place of last tokens
        assert lmleak.score_text(found, batch).token_recall >= 0.8
    else:
        assert sorted(found.token_ids) == sorted(batch.token_ids)


def test_given_lengths_end_texts_where_they_end():
    """Texts of unequal length, at noise as large as the gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=500, n_embd=128, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
        )).eval())  # fmt: skip
    batch = adapter.batch([list(range(20, 31)), list(range(40, 45))])
    shared = capture_gradient(adapter, batch)
    noisy = parse_defense("gaussian(std=1, unit=rms)")(shared)
    found = recover(adapter, noisy, lengths="given")
    assert sorted(len(ids) for ids in found.token_ids) in ([4, 10], [4, 11], [5, 10], [5, 11])
    with pytest.raises(UnsupportedCombinationError, match="lengths are known"):
        recover(adapter, capture_gradient(adapter, batch, reveal_lengths=False), lengths="given")
    assert not NoisySpan().assumes.lengths
    with pytest.raises(ConfigError, match="lengths"):
        NoisySpan(lengths="known")


@pytest.mark.parametrize(
    ("defense", "least"),
    [("gaussian(std=0.3, unit=rms)", 0.75), ("laplace(std=0.3, unit=rms)", 0.75), ("gaussian(std=1, unit=rms)", 0.4),
     ("clip(max_norm=0.1)+gaussian(std=1e-5)", 0.8)],
)  # fmt: skip
def test_noise_costs_tokens_only_slowly(case, defense, least):
    adapter, batch, shared = case
    assert lmleak.score_text(recover(adapter, parse_defense(defense)(shared)), batch).token_recall >= least


def test_thresholds_find_nothing_at_one_percent_noise(case):
    adapter, batch, shared = case
    noisy = parse_defense("gaussian(std=0.01, unit=rms)")(shared)
    with pytest.raises(UnsupportedCombinationError, match="no noise"):
        Span().run(adapter, noisy)
    score = lmleak.score_text(recover(adapter, noisy), batch)
    assert score.token_recall == 1


def test_several_local_steps(case):
    adapter, batch, _ = case
    update = capture_gradient(adapter, batch, shared="block:0-1", aggregation=Aggregation(epochs=2, learning_rate=0.1))
    assert lmleak.score_text(recover(adapter, update), batch).token_recall > 0.8


def test_left_padding_lengths_and_labels_are_not_needed():
    for name in ("gpt2-classifier", "opt", "llama"):
        adapter, batch = make(name, padding_side="left")
        shared = capture_gradient(adapter, batch, reveal_lengths=False, reveal_labels=False)
        score = lmleak.score_text(recover(adapter, shared), batch)
        assert score.token_recall > 0.5, name  # 15 tokens in 16 dimensions


@pytest.mark.parametrize("shared", ["block:0-1", "block:0", r"h\.0\.attn|h\.1\.attn"])
def test_partial_gradients(case, shared):
    adapter, batch, _ = case
    released = parse_defense("bf16")(capture_gradient(adapter, batch, shared=shared))
    assert lmleak.score_text(recover(adapter, released), batch).token_recall == pytest.approx(VISIBLE)


def test_missing_maps_are_refused_with_their_names(case):
    adapter, batch, _ = case
    with pytest.raises(UnsupportedCombinationError, match=r"h\.0\.attn\.c_attn.*which tokens were where"):
        recover(adapter, capture_gradient(adapter, batch, shared="block:1"))
    with pytest.raises(UnsupportedCombinationError, match=r"belong together"):
        recover(adapter, capture_gradient(adapter, batch, shared=r"h\.0\.attn\.c_attn"))
    encoder, texts = make("bert")
    with pytest.raises(UnsupportedCombinationError, match="encoder"):
        recover(encoder, capture_gradient(encoder, texts))


@pytest.mark.parametrize("option", ["beam", "candidates"])
def test_options_are_positive(option):
    with pytest.raises(ConfigError, match=rf"{option} must be at least 1, got 0"):
        NoisySpan(**{option: 0})


def test_same_seed_same_answer_and_other_seed_other_calibration(case):
    adapter, _, shared = case
    noisy = parse_defense("gaussian(std=0.3, unit=rms)")(shared)
    first, again, other = (NoisySpan().run(adapter, noisy, seed=s) for s in (3, 3, 4))
    assert (first.token_ids, first.confidence) == (again.token_ids, again.confidence)
    assert first.confidence != other.confidence


def test_confidence_tells_right_from_wrong(case):
    adapter, batch, shared = case
    true = set().union(*(set(enumerate(ids)) for ids in batch.token_ids))
    confidence, right = [], []
    for level in (0.01, 0.1, 0.3, 0.5):
        found = recover(adapter, parse_defense(f"gaussian(std={level}, unit=rms)")(shared))
        for ids, c in zip(found.token_ids, found.confidence, strict=True):
            confidence += c
            right += [pair in true for pair in enumerate(ids)]
    confidence, right = torch.tensor(confidence), torch.tensor(right).double()
    sure, unsure = right[confidence > 0.9], right[confidence < 0.7]
    assert sure.mean() > 0.85
    assert unsure.mean() < 0.6


def test_surprise_of_pairs_is_a_tail_probability_whatever_prefix_and_token():
    gain = torch.randn(64, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain = gain + torch.linspace(0, 30, 64)[:, None] + torch.linspace(-20, 20, 50)
    surprise = surprise_of_pairs(gain)
    assert (surprise > -math.log(0.1)).double().mean().item() == pytest.approx(0.1, rel=0.05)
    for probability in (0.05, 0.025):  # an exponential tail is on the careful side of a normal one
        assert 0.3 * probability < (surprise > -math.log(probability)).double().mean() < 1.05 * probability
    assert (surprise > -math.log(1e-3)).double().mean() <= 1.5e-3


def test_texts_explain_what_others_do_not_and_end_where_they_fade():
    margin = {(1,): 5.0, (2,): 4.0, (1, 3): 5.0, (2, 3): 1.0, (2, 4): 3.0, (1, 3, 9): 1.0, (1, 3, 9, 9): 1.0}
    nats = dict.fromkeys(margin, 50.0) | {(1, 3, 9): 40.0, (1, 3, 9, 9): 2.0}
    evidence = Evidence(margin, nats, 0, "")
    assert select(evidence, 2) == [(1, 3, 9), (2, 4)]
    assert select(evidence, 1) == [(1, 3, 9)]
