"""Dropout masks as unknowns: every dropout is covered, true masks match, the model is left as it was."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lmleak.adapters import adapt
from lmleak.attacks.descent import Matching
from lmleak.attacks.dropout_masks import calling_dropouts, find_dropouts
from lmleak.attacks.matching import DLG
from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from tests.attacks.test_matching import truth
from tests.families import IdTokenizer, build, make

P = 0.2


def case(name, p=P, size=1):
    """A tiny model whose every dropout, also the functional one of attention, has probability p."""
    task, model = build(name)
    for module in model.modules():
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, p)
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    adapter = adapt(model, tokenizer=IdTokenizer() if task == "masked-lm" else None, task=task)
    sequences = [[7, 12, 33, 41, 20, 9], [50, 8, 17, 28, 5, 6]][:size]
    return adapter, adapter.batch(sequences, [0, 2][:size] if task == "sequence-classification" else None)


class RecordMasks(TorchFunctionMode):
    """Keeps what dropout multiplied by, found by dropping out ones with the same random state."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("training") and kwargs.get("p"):
            mask = func(torch.ones_like(args[0]), **kwargs)
            self.masks.append(mask.detach())
            return args[0] * mask
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "opt"])
def test_the_true_masks_give_the_released_gradient(name):
    adapter, batch = case(name)
    with RecordMasks() as recorded:
        shared = capture_gradient(adapter, batch, dropout=True, seed=1)
    observation = shared.observation(lengths=True, labels=True)
    text = RelaxedText(adapter, observation)
    with calling_dropouts(adapter):
        problem = Matching(DLG(dropout_masks=True, mask_zeros=False), text, observation)
        guess = truth(text, batch)
        assert [m.shape for m in guess.masks] == [m.shape for m in recorded.masks]
        assert problem.distance(guess, create_graph=False).item() > 1e-3
        guess.masks = tuple(recorded.masks)
        assert problem.distance(guess, create_graph=False).item() < 1e-18
        assert problem.distances([guess, guess]).max().item() < 1e-18
    assert problem.largest_masks == pytest.approx([1 / (1 - P)] * len(guess.masks))
    if name == "bert":  # embeddings; attention weights, attention output and MLP of two blocks; head
        assert [len(m.shape) for m in guess.masks] == [3, 4, 3, 3, 4, 3, 3, 2]


def test_learning_masks_lowers_the_floor_of_matching():
    adapter, batch = case("bert")
    shared = capture_gradient(adapter, batch, dropout=True, seed=1)
    options = {"iterations": 150, "candidates": 8}
    ignoring = DLG(**options).run(adapter, shared)
    learning = DLG(**options, dropout_masks=True).run(adapter, shared)
    assert learning.objective < 0.5 * ignoring.objective
    assert any("dropout was on" in note for note in ignoring.notes)
    together = DLG(iterations=3, candidates=2, restarts=2, dropout_masks=True).run(adapter, shared)
    assert together.cost.iterations == 6


def test_the_model_is_restored_also_after_an_exception():
    adapter, batch = case("bert")
    shared = capture_gradient(adapter, batch)
    before = torch.get_rng_state()
    DLG(iterations=2, candidates=1, dropout_masks=True).run(adapter, shared)
    assert not any(module.training for module in adapter.model.modules())
    found = RelaxedText(adapter, shared.observation(lengths=True, labels=True)).real
    with pytest.raises(DataError), calling_dropouts(adapter):
        adapter.loss(found, batch.targets, batch.layout)  # not an input
    assert not any(module.training for module in adapter.model.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_refusals():
    adapter, batch = case("bert", p=0.0)
    with pytest.raises(UnsupportedCombinationError, match="no dropout"):
        DLG(dropout_masks=True).run(adapter, capture_gradient(adapter, batch))
    adapter, batch = make("opt", size=1)
    adapter.config.layerdrop = 0.1
    with pytest.raises(UnsupportedCombinationError, match="layerdrop"):
        DLG(dropout_masks=True).run(adapter, capture_gradient(adapter, batch))
    with pytest.raises(ConfigError, match="dropout_masks must be True or False"):
        DLG(dropout_masks=1)


def test_dropouts_of_probability_zero_are_no_unknowns():
    adapter, batch = case("bert")
    adapter.model.bert.embeddings.dropout.p = 0.0
    with calling_dropouts(adapter):
        found = find_dropouts(adapter, lambda: adapter.loss(adapter.input(batch), batch.targets, batch.layout))
    assert len(found) == 7
