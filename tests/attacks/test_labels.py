"""Class labels from the head's gradient (iDLG), and attacks that are not told them."""

import pytest
import torch

import lmleak
from lmleak.attacks.labels import infer_labels
from lmleak.attacks.matching import DLG, TAG
from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from tests.families import SEQUENCES, make


def infer(adapter, batch, **keywords):
    shared = capture_gradient(adapter, batch, reveal_labels=False, **keywords)
    text = RelaxedText(adapter, shared.observation(lengths=True, labels=False))
    return infer_labels(text, seed=0)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2-classifier"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_label_of_one_text_is_exact_with_or_without_a_bias(name, label):
    adapter, _ = make(name)
    found = infer(adapter, adapter.batch(SEQUENCES[:1], [label]))
    assert found.labels.tolist() == [label]
    assert ("weight" if name == "gpt2-classifier" else "bias") in found.source


def test_two_classes_without_a_bias_are_undecided():
    adapter, _ = make("gpt2-classifier")
    adapter.config.num_labels = 2
    adapter.model.score.weight = torch.nn.Parameter(adapter.model.score.weight[:2].detach().clone())
    found = infer(adapter, adapter.batch(SEQUENCES[:1], [1]))
    assert found.labels is None
    assert found.counts is None


def test_counts_of_a_batch_and_when_they_settle_the_labels():
    adapter, _ = make("bert")
    alike = [s[:4] for s in SEQUENCES]
    found = infer(adapter, adapter.batch(alike, [2, 0, 2]))
    assert found.counts.tolist() == [1, 0, 2]
    assert sorted(found.labels.tolist()) == [0, 2, 2]  # texts of one length are in no order anyway
    assert infer(adapter, adapter.batch(SEQUENCES, [2, 0, 2])).labels is None
    assert infer(adapter, adapter.batch(SEQUENCES, [1, 1, 1])).labels.tolist() == [1, 1, 1]
    assert infer(adapter, adapter.batch(SEQUENCES, [1, 1, 1]), shared="block:0-1").labels is None


def test_an_inferring_attack_is_told_no_labels_and_a_told_one_refuses_without():
    adapter, batch = make("bert", size=1)
    silent = capture_gradient(adapter, batch, reveal_labels=False)
    assert not DLG(labels="inferred").assumes.labels
    assert DLG.assumes.labels
    assert DLG().assumes.labels
    with pytest.raises(UnsupportedCombinationError, match="labels are known"):
        DLG(iterations=2).run(adapter, silent)
    told = DLG(iterations=20, candidates=2).run(adapter, capture_gradient(adapter, batch))
    blind = DLG(iterations=20, candidates=2, labels="inferred").run(adapter, silent)
    assert blind.token_ids == told.token_ids
    assert blind.objective == pytest.approx(told.objective, rel=1e-9)
    assert any("[0] were inferred (read off 'classifier.bias')" in note for note in blind.notes)
    with pytest.raises(ConfigError, match="Did you mean 'inferred'"):
        DLG(labels="infered")


def test_undecided_labels_are_matched_along_with_the_text():
    adapter, batch = make("bert")  # labels 0, 2, 1 of texts of unequal lengths
    silent = capture_gradient(adapter, batch, reveal_labels=False)
    found = TAG(iterations=60, candidates=8, labels="inferred", restarts=2).run(adapter, silent)
    start = TAG(iterations=1, candidates=8, labels="inferred", restarts=2).run(adapter, silent)
    assert found.objective < 0.7 * start.objective
    assert any("matched together" in note for note in found.notes)


def test_language_models_have_no_class_labels_to_infer():
    adapter, batch = make("gpt2", size=1)
    shared = capture_gradient(adapter, batch)
    told, blind = (DLG(iterations=4, candidates=2, labels=w).run(adapter, shared) for w in ("given", "inferred"))
    assert told.token_ids == blind.token_ids
    assert lmleak.score_text(told, batch).token_recall == lmleak.score_text(blind, batch).token_recall
