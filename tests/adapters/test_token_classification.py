"""Classifiers of tokens: the model's own loss on a label per token, and the products of its gradient."""

import pytest
import torch
import transformers as tf

from lmleak import GradientJacobian, capture_gradient, inversion_influence
from lmleak.adapters import adapt
from lmleak.attacks import parse_attack
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.evaluation import AuditConfig, run_audit
from lmleak.types import IGNORE
from tests.families import BERT, DISTILBERT, POSITIONS, SEQUENCES
from tests.influence.vectors import randn, relative

MODELS = {
    "bert": lambda: tf.BertForTokenClassification(tf.BertConfig(**BERT)),
    "distilbert": lambda: tf.DistilBertForTokenClassification(tf.DistilBertConfig(**DISTILBERT)),
    "roberta": lambda: tf.RobertaForTokenClassification(
        tf.RobertaConfig(**BERT | {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2})
    ),
}
LABELS = [[IGNORE, 1, 0, 2, 1, IGNORE], [0, 0, 2, 1], [IGNORE, IGNORE, 1, 2, 0]]


def model_of(name, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_and_its_gradient_are_the_model_s_own(name, side):
    model = model_of(name)
    adapter = adapt(model)  # the task is read from the class
    assert adapter.task == "token-classification"
    batch = adapter.batch(SEQUENCES, LABELS, padding_side=side)
    assert (batch.targets == IGNORE).tolist() == (batch.targets < 0).tolist()
    assert sorted(batch.targets[batch.targets >= 0].tolist()) == sorted(c for row in LABELS for c in row if c >= 0)
    loss = adapter.loss(adapter.input(batch), batch.targets, batch.layout)
    own = model(
        input_ids=batch.inputs["input_ids"], labels=batch.targets, **batch.layout, **adapter._positions(batch.layout)
    )
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-12)
    own.loss.backward()
    gradient = capture_gradient(adapter, batch).gradient
    for parameter, value in gradient.items():
        assert torch.allclose(value, model.get_parameter(parameter).grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_products_and_influence(name):
    adapter = adapt(model_of(name))
    batch = adapter.batch(SEQUENCES, LABELS)
    fast, dense = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "dense"))
    assert fast.by_autodiff == ()
    v = randn(*fast.x.shape)
    assert relative(fast.gram(v), dense.gram(v)) < 1e-10
    assert fast.verify() < 1e-10
    result = inversion_influence(adapter, batch, noise_std=1e-3)
    assert 0 < result.lower_bound.l2 <= result.influence.l2 <= result.upper_bound.l2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels="), ([0, 1, 2], "must be a list"), (LABELS[:2], "labels of 2 texts for 3"),
        ([*LABELS[:2], [0, 1]], "2 labels for the 5 tokens of text 2"), ([[3] * 6, *LABELS[1:]], "label 3 in text 0"),
        ([[0.5] * 6, *LABELS[1:]], "label 0.5 in text 0"), ([[True] * 6, *LABELS[1:]], "label True in text 0"),
        ([[IGNORE] * n for n in (6, 4, 5)], "no token of these texts has a label"),
        ([["B", *[0] * 5], *LABELS[1:]], "label 'B' in text 0"),
    ],
)  # fmt: skip
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        adapt(model_of("bert")).batch(SEQUENCES, labels)


def test_attacks_and_commands_that_do_not_know_the_task_say_so(tmp_path):
    model = model_of("bert", torch.float32)
    adapter = adapt(model)
    shared = capture_gradient(adapter, adapter.batch(SEQUENCES[:1], LABELS[:1]))
    with pytest.raises(UnsupportedCombinationError, match="this model's task is 'token-classification'"):
        parse_attack("span").run(adapter, shared)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(55))])
    )
    settings = {"model": str(tmp_path / "model"), "texts": ["1 2 3"], "samples": 1, "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="a label per token, which these commands cannot read; in Python"):
        run_audit(AuditConfig(**settings))
