"""Side information read off gradients, against the truth of tiny models in float64."""

from dataclasses import replace

import pytest
import torch

import lmleak
from lmleak.defenses import GaussianNoise, unit_noise
from lmleak.gradients.readout import class_labels, layer_ranks, next_tokens, sequence_lengths, token_bag
from lmleak.gradients.readout_bag import RowNoise, significant_rows
from lmleak.gradients.readout_targets import round_to_sum
from lmleak.types import IGNORE, Aggregation
from tests.families import FAMILIES, make

TIED = ["gpt2", "llama-tied", "bert-mlm", "opt"]
UNTIED = ["gpt2-untied", "llama", "bert", "roberta", "gpt2-classifier"]


def inputs_that_reach_the_loss(adapter, batch) -> set[int]:
    found = set()
    for ids, mask in zip(batch.inputs["input_ids"], batch.layout["attention_mask"].bool(), strict=True):
        text = ids[mask].tolist()
        found |= set(text[:-1] if adapter.task == "causal-lm" else text)
    return found


def targets(adapter, batch) -> set[int]:
    wanted = batch.targets[:, 1:] if adapter.task == "causal-lm" else batch.targets
    return set(wanted[wanted != IGNORE].tolist())


def noisy(shared, std=0.01, seed=1):
    return GaussianNoise(std=std, unit="rms", seed=seed)(shared)


# Bag of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", UNTIED + TIED)
def test_the_bag_is_exact(name, dtype):
    adapter, batch = make(name, dtype=dtype)
    bag = token_bag(adapter, lmleak.capture_gradient(adapter, batch, shared="all"))
    assert bag.exact
    assert set(bag.ids.tolist()) == inputs_that_reach_the_loss(adapter, batch)


@pytest.mark.parametrize("name", ["gpt2-untied", "gpt2"])
def test_the_bag_from_the_embedding_layer_alone(name):
    adapter, batch = make(name, size=2)
    bag = token_bag(adapter, lmleak.capture_gradient(adapter, batch, shared="embeddings"))
    assert set(bag.ids.tolist()) == inputs_that_reach_the_loss(adapter, batch)


def test_the_bag_of_a_local_update_of_an_untied_table():
    adapter, batch = make("llama", size=2)
    local = Aggregation(steps_per_epoch=2, learning_rate=0.1)
    bag = token_bag(adapter, lmleak.capture_gradient(adapter, batch, shared="all", aggregation=local))
    assert set(bag.ids.tolist()) == inputs_that_reach_the_loss(adapter, batch)


@pytest.mark.parametrize("name", UNTIED)
def test_the_bag_of_an_untied_table_under_noise(name):
    adapter, batch = make(name)
    truth = inputs_that_reach_the_loss(adapter, batch)
    shared = lmleak.capture_gradient(adapter, batch, shared="all")
    quiet = token_bag(adapter, noisy(shared))
    assert not quiet.exact
    assert set(quiet.ids.tolist()) == truth
    loud = token_bag(adapter, noisy(shared, std=1.0))
    assert set(loud.ids.tolist()) <= truth  # tokens are missed, none is invented


def test_the_bag_of_a_tied_table_is_refused_when_the_head_fills_the_space():
    adapter, _ = make("gpt2")  # width 16
    batch = adapter.batch([[7, 12, 33, 41, 20, 9, 51, 22, 13, 18, 44, 57, 36, 29, 10, 8, 47, 55, 3, 6]])
    bag = token_bag(adapter, lmleak.capture_gradient(adapter, batch, shared="all"))
    assert bag.ids is None
    assert "exceed the hidden size" in bag.reason


def test_no_bag_without_looked_up_rows():
    adapter, batch = make("gpt2")
    assert "through the head alone" in token_bag(adapter, lmleak.capture_gradient(adapter, batch)).reason
    adapter, batch = make("llama")
    bag = token_bag(adapter, lmleak.capture_gradient(adapter, batch))
    assert bag.ids is None
    assert "not released" in bag.reason


def test_false_rows_are_as_rare_as_promised():
    generator = torch.Generator().manual_seed(0)
    found = sum(len(significant_rows(torch.randn(500, 16, generator=generator))[0]) for _ in range(40))
    assert found <= 3  # 0.4 expected
    laplace = [unit_noise("rows", (500, 64), torch.float64, seed, "laplace") for seed in range(20)]
    found = sum(len(significant_rows(rows)[0]) for rows in laplace)
    assert found <= 10  # heavier tails: more than the 0.2 expected, but few of 10,000


def test_the_noise_level_is_that_of_the_noise():
    rows = 0.3 * torch.randn(4000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = RowNoise.fit(rows.square().sum(1), 32)
    assert noise.plausible
    assert noise.scale * noise.freedom / 32 == pytest.approx(0.09, rel=0.02)
    assert noise.freedom == pytest.approx(32, rel=0.15)
    assert noise.surprise(noise.scale * torch.tensor([31.3], dtype=torch.float64)).item() == pytest.approx(
        0.69, abs=0.1
    )


# Lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "opt", "gpt2-classifier", "bert-mlm"])
def test_the_longest_text_shows_in_the_position_table(name):
    adapter, batch = make(name)
    longest = sequence_lengths(adapter, lmleak.capture_gradient(adapter, batch))
    assert longest.exact
    assert longest.tokens == 6
    hidden = adapter.batch([[30, 11, 44, 19, 25]], [1] if "classification" in adapter.task else None)
    assert sequence_lengths(adapter, lmleak.capture_gradient(adapter, hidden)).tokens == 5
    assert sequence_lengths(adapter, noisy(lmleak.capture_gradient(adapter, batch))).tokens == 6


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_left_padding_makes_no_difference(name):
    adapter, batch = make(name, padding_side="left")
    assert sequence_lengths(adapter, lmleak.capture_gradient(adapter, batch)).tokens == 6


def test_no_length_from_rotary_positions_or_a_withheld_table():
    adapter, batch = make("llama")
    assert "no learned position table" in sequence_lengths(adapter, lmleak.capture_gradient(adapter, batch)).reason
    adapter, batch = make("gpt2")
    withheld = lmleak.capture_gradient(adapter, batch, shared="block:0")
    assert "not released" in sequence_lengths(adapter, withheld).reason


# Labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2-classifier"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_label_of_one_text(name, label):
    adapter, _ = make(name)
    batch = adapter.batch([[7, 12, 33, 41]], [label])
    labels = class_labels(adapter, lmleak.capture_gradient(adapter, batch))
    assert labels.exact
    assert labels.counts.argmax() == label


@pytest.mark.parametrize("given", [[0, 0, 0, 0], [0, 2, 1, 1], [2, 2, 1, 2]])
def test_label_counts_lie_within_their_bounds(given):
    adapter, _ = make("bert")
    batch = adapter.batch([[7, 12, 33], [50, 8, 17], [30, 11, 44], [9, 9, 21]], given)
    labels = class_labels(adapter, lmleak.capture_gradient(adapter, batch))
    truth = torch.bincount(torch.tensor(given), minlength=3)
    assert (labels.least <= truth).all()
    assert (truth <= labels.most).all()
    assert labels.counts.sum() == 4
    assert not labels.exact or torch.equal(labels.counts, truth)


def test_undecided_labels_say_why():
    adapter, batch = make("gpt2-classifier")  # its head has no bias
    assert "decides" in class_labels(adapter, lmleak.capture_gradient(adapter, batch)).reason
    adapter, batch = make("gpt2")
    assert class_labels(adapter, lmleak.capture_gradient(adapter, batch)).counts is None


def test_rounding_keeps_the_sum():
    assert round_to_sum(torch.tensor([1.6, 0.9, -0.4]), 2).tolist() == [1, 1, 0]
    assert round_to_sum(torch.zeros(4), 2).sum() == 2


# Targets ------------------------------------------------------------------------------------------------------


def bias_gradient(adapter, batch):
    """(1/N) sum_t (p_t - y_t), from the logits."""
    logits = adapter.logits(adapter.input(batch), batch.layout)
    wanted = batch.targets
    if adapter.task == "causal-lm":
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    kept = wanted != IGNORE
    p = logits[kept].softmax(-1)
    return (p - torch.nn.functional.one_hot(wanted[kept], p.shape[1])).mean(0)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "opt", "bert-mlm"])
def test_targets_are_the_negative_entries_of_the_bias_gradient(name):
    """With a bias, or a LayerNorm that has one before the head."""
    adapter, batch = make(name)
    read = next_tokens(adapter, lmleak.capture_gradient(adapter, batch))
    truth = bias_gradient(adapter, batch)
    assert read.exact
    assert set(read.ids.tolist()) == set((truth < 0).nonzero()[:, 0].tolist()) <= targets(adapter, batch)
    assert torch.allclose(read.scores, -truth[read.ids], atol=1e-9)


def test_targets_behind_an_rms_norm_are_a_good_guess():
    adapter, batch = make("llama")
    read = next_tokens(adapter, lmleak.capture_gradient(adapter, batch))
    assert not read.exact
    found, truth = set(read.ids.tolist()), targets(adapter, batch)
    assert found <= truth
    assert len(found) >= len(truth) / 2


def test_of_a_looked_up_tied_table_only_targets_that_were_no_inputs():
    adapter, batch = make("gpt2")
    read = next_tokens(adapter, lmleak.capture_gradient(adapter, batch, shared="all"))
    assert read.exact
    assert (
        set(read.ids.tolist()) == {9, 28, 25} == targets(adapter, batch) - inputs_that_reach_the_loss(adapter, batch)
    )


def test_targets_under_noise_are_not_called_exact():
    adapter, batch = make("bert-mlm")
    read = next_tokens(adapter, noisy(lmleak.capture_gradient(adapter, batch), std=0.1))
    assert not read.exact
    assert set(read.ids.tolist()) == targets(adapter, batch)


def test_no_targets_without_a_head():
    adapter, batch = make("llama")
    assert "not released" in next_tokens(adapter, lmleak.capture_gradient(adapter, batch, shared="block:0")).reason
    adapter, batch = make("bert")
    assert "no token targets" in next_tokens(adapter, lmleak.capture_gradient(adapter, batch)).reason


# Ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_ranks_are_those_of_numpy_in_double_precision(name):
    adapter, batch = make(name, size=2)
    shared = lmleak.capture_gradient(adapter, batch)
    ranks = layer_ranks(adapter, shared)
    assert set(ranks) == {n for n, g in shared.gradient.items() if g.dim() == 2}
    for name_, (rank, rows, columns) in ranks.items():
        gradient = shared.gradient[name_]
        assert (rows, columns) == gradient.shape
        norms = gradient.norm(dim=int(rows >= columns), keepdim=True)
        expected = torch.linalg.matrix_rank(gradient / norms.clamp(min=1e-300), rtol=1e-13)
        assert rank == expected, name_


def test_the_first_block_counts_tokens():
    adapter, batch = make("gpt2", size=2, dtype=torch.float32)
    shared = lmleak.capture_gradient(adapter, batch)
    assert layer_ranks(adapter, shared)["transformer.h.0.attn.c_attn.weight"] == (8, 16, 48)
    one_row = {"transformer.wpe.weight": torch.zeros(24, 16)}
    assert layer_ranks(adapter, replace(shared, gradient=one_row))["transformer.wpe.weight"] == (0, 24, 16)


# All ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_can_be_read_and_is_left_alone(name):
    adapter, batch = make(name, dtype=torch.float32)
    shared = lmleak.capture_gradient(adapter, batch, shared="all")
    before, state = {k: p.clone() for k, p in adapter.model.named_parameters()}, torch.get_rng_state()
    for read in (token_bag, sequence_lengths, class_labels, next_tokens):
        assert read(adapter, shared).reason
        observation = shared.observation(lengths=False, labels=False)
        assert read(adapter, observation).reason == read(adapter, shared).reason
    assert torch.equal(state, torch.get_rng_state())
    for k, p in adapter.model.named_parameters():
        assert torch.equal(p, before[k])
        assert p.grad is None
