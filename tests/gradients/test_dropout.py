"""Gradients with dropout on: what ``model.train()`` and ``loss.backward()`` give, and nothing left behind."""

from dataclasses import replace

import pytest
import torch

from lmleak.adapters import adapt
from lmleak.adapters.dropout import dropout_on
from lmleak.defenses import parse_defense
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.types import Aggregation
from tests.families import LABELS, SEQUENCES, IdTokenizer, build
from tests.gradients.training import eager_copy, largest_difference, own_loss


def case(name, **settings):
    """(model, adapter, batch); every family's dropouts are set to 0.2 unless ``settings`` says otherwise."""
    task, model = build(name)
    for module in model.modules():  # where layers keep their probability outside a Dropout module
        if settings.get("p") is None and isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.2
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = settings.get("p", 0.2)
    adapter = adapt(model, tokenizer=IdTokenizer() if task == "masked-lm" else None, task=task)
    return model, adapter, adapter.batch(SEQUENCES, LABELS if task == "sequence-classification" else None)


def trained(model, batch, steps, *, seed, learning_rate):
    """SGD on the caller's model in training mode, masks from a seed; one step of it is the gradient."""
    model = eager_copy(model).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for rows in steps:
            optimizer.zero_grad()
            own_loss(model, batch, rows).backward()
            optimizer.step()
    return {n: (before[n] - p).detach() / (learning_rate * len(steps)) for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "distilbert", "roberta", "gpt2", "opt", "gpt-neox", "llama"])
def test_equals_training_mode_with_the_same_masks(name):
    """Also where attention applies dropout as a function, by the flag of its own module."""
    model, adapter, batch = case(name)
    noisy = capture_gradient(adapter, batch, shared="all", dropout=True, seed=3).gradient
    expected = trained(model, batch, [slice(None)], seed=3, learning_rate=1.0)
    assert largest_difference(noisy, expected) < 1e-11
    clean = capture_gradient(adapter, batch, shared="all").gradient
    assert largest_difference(clean, expected) > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_local_step_draws_its_own_masks(name):
    model, adapter, batch = case(name)
    local = Aggregation(steps_per_epoch=3, epochs=2, learning_rate=0.1)
    got = capture_gradient(adapter, batch, shared="all", aggregation=local, dropout=True, seed=5)
    expected = trained(model, batch, [[0], [1], [2]] * 2, seed=5, learning_rate=0.1)
    assert largest_difference(got.gradient, expected) < 1e-11
    assert got.aggregation == local


def test_attention_weights_alone_can_be_dropped():
    """LLaMA has no Dropout module at all."""
    _, adapter, batch = case("llama")
    assert not any(isinstance(module, torch.nn.Dropout) for module in adapter.model.modules())
    clean, noisy = (capture_gradient(adapter, batch, dropout=on).gradient for on in (False, True))
    assert largest_difference(noisy, clean) > 1e-2


def test_the_seed_decides_and_global_randomness_is_untouched():
    _, adapter, batch = case("bert")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, same, other = (capture_gradient(adapter, batch, dropout=True, seed=s).gradient for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert largest_difference(first, other) > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_modes_are_restored_also_after_an_exception(name):
    model, adapter, batch = case(name)
    model.train()
    clean = capture_gradient(adapter, batch).gradient
    state = torch.get_rng_state()
    capture_gradient(adapter, batch, dropout=True)
    wrong = replace(batch, inputs={"input_ids": batch.inputs["input_ids"][:, :2]})
    with pytest.raises(DataError, match="x is shaped"):
        capture_gradient(adapter, wrong, dropout=True)
    assert not any(module.training for module in adapter.model.modules())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    again = capture_gradient(adapter, batch).gradient
    assert all(torch.equal(again[n], clean[n]) for n in clean)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_of_the_caller_changes_nothing():
    """It would run again, in the backward pass, away from the functional parameters."""
    model, adapter, batch = case("gpt2")
    expected = capture_gradient(adapter, batch, dropout=True).gradient
    model.gradient_checkpointing_enable({"use_reentrant": True})
    got = capture_gradient(adapt(model), batch, dropout=True).gradient
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert model.is_gradient_checkpointing


def test_batch_normalisation_stays_in_evaluation():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5), torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 3),
    )  # fmt: skip
    adapter = adapt(net)
    batch = adapter.batch(torch.linspace(-2, 2, 2 * 64).reshape(2, 1, 8, 8), [0, 2])
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    with dropout_on(adapter.model, seed=0):
        assert [m.training for m in adapter.model] == [True, False, True, True, True]
        adapter.logits(batch.inputs["pixel_values"])
    capture_gradient(adapter, batch, shared="all", dropout=True)
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers())


def test_a_model_without_dropout_is_refused():
    """A gradient marked "dropout(on)" that dropout never touched would be a false promise."""
    for name, settings in (("gpt2", {"p": 0.0}), ("llama", {"p": 0.0})):
        _, adapter, batch = case(name, **settings)
        with pytest.raises(UnsupportedModelError, match="has no dropout"):
            capture_gradient(adapter, batch, dropout=True)
        assert not adapter.model.training


def test_it_is_recorded_as_the_first_defense_and_travels(tmp_path):
    _, adapter, batch = case("bert")
    shared = capture_gradient(adapter, batch, dropout=True, seed=123454321)
    assert shared.defenses == ("dropout(on)",)
    released = parse_defense("clip(max_norm=1)", seed=0)(shared)
    assert released.defenses == ("dropout(on)", "clip(max_norm=1.0)")
    path = released.save(tmp_path / "g")
    loaded = SharedGradient.load(path, adapter)
    assert loaded.defenses == released.defenses
    assert b"123454321" not in path.read_bytes()[:100_000]
    others = list(shared.gradient)[1:]
    partial = replace(shared, gradient={n: shared.gradient[n] for n in others})
    with pytest.raises(DataError, match="lacks 1 parameter"):  # only hide-layers excuses that
        partial.check(adapter)
