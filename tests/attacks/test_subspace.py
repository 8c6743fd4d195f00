"""The subspace attack: its likelihood against closed forms, and recovery from clean and noisy gradients."""

import pytest
import torch

import lmleak
from lmleak.attacks import make_attack
from lmleak.attacks.span_layers import Site
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.attacks.subspace_objective import (
    RIDGE_SHARE,
    GradientLikelihood,
    KnownText,
    _Scaled,
    sentence_maps,
)
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.types import Aggregation
from tests.families import SEQUENCES, make


def score(attack, adapter, batch, shared):
    return lmleak.score_text(attack.run(adapter, shared), batch)


# The likelihood -------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nats_are_the_ridge_residual_of_the_gradient():
    gradient, h, ridge, noise = random(30, 12), random(2, 5, 12, seed=1), 0.03, 210.0
    h = torch.nn.functional.normalize(h, dim=-1)
    _, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    left = torch.stack([
        gradient.square().sum()
        - torch.trace(gradient @ x.T @ torch.linalg.inv(x @ x.T + ridge * torch.eye(5).double()) @ x @ gradient.T)
        for x in h
    ])  # fmt: skip
    torch.testing.assert_close(_Scaled(vt.T * s, ridge, noise).nats(h), -noise / 2 * (left / noise).log())


def test_gain_is_what_an_input_adds():
    gradient, h = random(30, 12), torch.nn.functional.normalize(random(6, 12, seed=1), dim=-1)
    _, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    site = _Scaled(vt.T * s, 1e-12, 1.0)
    explained = [(gradient @ torch.linalg.pinv(x) @ x).square().sum() for x in (h[:5], h)]
    torch.testing.assert_close(site.gain(h[5:], h[:5])[0], explained[1] - explained[0])
    assert site.gain(h[5:], h[:5])[0] < site.largest_gain(h[:5])
    assert site.gain(h[:1], h[:5]).item() == pytest.approx(0, abs=1e-6)  # a repeated token explains nothing more


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_likelihood_is_differentiable_and_largest_at_the_truth(family):
    adapter, batch = make(family, size=2)
    shared = lmleak.capture_gradient(adapter, batch)
    observation = shared.observation(lengths=True, labels=False)
    sites = [Site(adapter.attention_inputs(0), "first"), *sentence_maps(adapter, shared.gradient, 1)]
    known = KnownText(adapter, observation)
    gradients = {site: stacked_gradient(adapter, shared.gradient, site.paths) for site in sites}
    likelihood = GradientLikelihood(known, gradients)
    rows = torch.arange(2)

    def nats(x):
        return likelihood.nats([h[None] for h in likelihood.inputs(x, rows)])[0]

    x = adapter.input(batch)
    assert 0 < RIDGE_SHARE < 1
    for seed in range(3):
        assert nats(x + 0.1 * random(*x.shape, seed=seed)) < nats(x)
    x = (x + 0.1 * random(*x.shape)).requires_grad_()
    (slope,) = torch.autograd.grad(nats(x), x)
    assert not slope[~known.read].any()  # padding, and the last token of a language model
    direction = random(*x.shape, seed=3)
    with torch.no_grad():
        change = (nats(x + 1e-6 * direction) - nats(x - 1e-6 * direction)) / 2e-6
    assert change.item() == pytest.approx((slope * direction).sum().item(), rel=1e-4)


def test_known_text_moves_padding_to_the_right():
    adapter, batch = make("gpt2-classifier", size=2, padding_side="left")
    known = KnownText(adapter, lmleak.capture_gradient(adapter, batch).observation(lengths=True, labels=False))
    assert known.real.sum(1).tolist() == [6, 4]
    assert known.real[1].tolist() == [True] * 4 + [False] * 2


# Recovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "side"),
    [("bert", "right"), ("roberta", "right"), ("distilbert", "right"), ("gpt2-classifier", "left")],
)
def test_exact_on_clean_classifiers(family, side):
    adapter, batch = make(family, size=2, dtype=torch.float32, padding_side=side)
    result = score(make_attack("subspace"), adapter, batch, lmleak.capture_gradient(adapter, batch))
    assert result.exact_match == 1.0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_language_models_all_but_the_last_token(family):
    adapter, batch = make(family, size=2, dtype=torch.float32)
    recovered = make_attack("subspace").run(adapter, lmleak.capture_gradient(adapter, batch))
    assert set(recovered.token_ids) == {tuple(s[:-1]) for s in SEQUENCES[:2]}
    assert any("last token" in note for note in recovered.notes)
    assert recovered.cost.gradient_evaluations == 0
    assert recovered.cost.iterations > 0


def test_masked_tokens_stay_masked_and_are_not_claimed():
    adapter, batch = make("bert-mlm", size=1, dtype=torch.float32)
    recovered = make_attack("subspace").run(adapter, lmleak.capture_gradient(adapter, batch))
    (ids,), (confidence,) = recovered.token_ids, recovered.confidence
    assert ids == tuple(batch.inputs["input_ids"][0].tolist())
    mask = adapter.tokenizer.mask_token_id
    assert mask in ids
    assert all(c == 0 for t, c in zip(ids, confidence, strict=True) if t == mask)


def test_free_embeddings():
    adapter, batch = make("bert", size=1, dtype=torch.float32)
    attack = make_attack("subspace", free_embeddings=True)
    assert score(attack, adapter, batch, lmleak.capture_gradient(adapter, batch)).exact_match == 1.0


MESSAGES = {"reference-bert": 1, "reference-gpt2": 1}


@pytest.mark.parametrize("name", MESSAGES)
def test_message_from_released_gradients(name):
    adapter = lmleak.load_adapter(name)
    labels = [0] if adapter.task == "sequence-classification" else None
    batch = adapter.batch(["the biopsy was positive and I start on March 14"], labels)
    clean = lmleak.capture_gradient(adapter, batch)
    rounded = clean.released({k: g.bfloat16() for k, g in clean.gradient.items()}, "bf16")
    noisy = lmleak.defenses.GaussianNoise(std=0.1, unit="rms", seed=1)(clean)
    local = lmleak.capture_gradient(
        adapter, batch, shared="all", aggregation=Aggregation(epochs=2, learning_rate=1e-3)
    )
    ends = 1 if labels is None else 0  # the last token of a language model
    tokens = len(batch.token_ids[0])
    for shared in (clean, rounded, noisy, local):
        result = score(make_attack("subspace"), adapter, batch, shared)
        assert result.token_recall >= (tokens - ends) / tokens - 1e-9


@pytest.mark.slow
def test_two_messages_under_noise_as_large_as_the_gradient():
    adapter = lmleak.load_adapter("reference-gpt2")
    batch = adapter.batch(
        ["the biopsy was positive and I start on March 14", "please send the rent to my new account"]
    )
    shared = lmleak.defenses.GaussianNoise(std=1.0, unit="rms", seed=1)(lmleak.capture_gradient(adapter, batch))
    assert score(make_attack("subspace"), adapter, batch, shared).token_recall >= 0.5


# Refusals -------------------------------------------------------------------------------------------------------


def test_refusals():
    for option in ("iterations", "candidates", "restarts", "blocks"):
        with pytest.raises(ConfigError, match=option):
            make_attack("subspace", **{option: 0})
    with pytest.raises(ConfigError, match="learning_rate"):
        make_attack("subspace", learning_rate=0.0)
    attack = make_attack("subspace")
    adapter, batch = make("bert", size=3, dtype=torch.float32)
    for shared, reason in (("head", "which tokens were where"), (r"0\.attention\.self", "belong together")):
        with pytest.raises(UnsupportedCombinationError, match=reason):
            attack.run(adapter, lmleak.capture_gradient(adapter, batch, shared=shared))
    many = adapter.batch([list(range(7, 19)), list(range(20, 32))], [0, 1])
    with pytest.raises(UnsupportedCombinationError, match="fewer tokens"):
        attack.run(adapter, lmleak.capture_gradient(adapter, many))
    with pytest.raises(DataError, match="SharedGradient"):
        attack.run(adapter, {})
