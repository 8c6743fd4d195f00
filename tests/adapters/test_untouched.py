"""The caller's model is left exactly as it was, also after an exception, and its later updates are seen."""

import copy

import pytest
import torch

from lmleak.adapters import LeNet, adapt
from lmleak.errors import DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, inversion_influence
from tests.families import FAMILIES, LABELS, SEQUENCES, IdTokenizer, build


def photograph(model):
    """Everything about a module that using it could change."""
    config = getattr(model, "config", None)
    return {
        "modules": [(path, id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
                     len(m._backward_hooks), sorted(vars(m))) for path, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None, p.dtype, p.data_ptr(), p._version)
                       for name, p in model.named_parameters()],
        "config": copy.deepcopy(config.to_dict()) if config is not None else None,
        "attention": getattr(config, "_attn_implementation", None),
    }  # fmt: skip


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def use(model, task):
    """Everything that the first floors do with a model."""
    tokenizer = IdTokenizer() if task == "masked-lm" else None
    adapter = adapt(model, tokenizer=tokenizer, task=task)
    batch = adapter.batch(SEQUENCES, LABELS if task == "sequence-classification" else None)
    capture_gradient(adapter, batch, shared="all")
    inversion_influence(adapter, batch, noise_std=1e-2, max_products=5)
    GradientJacobian(adapter, batch, shared="embeddings", implementation="dense").gram(adapter.input(batch))
    adapter.attention_inputs(0)
    adapter.prior()
    adapter.roles()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_untouched(name, training):
    task, model = build(name)
    model.train(training)
    frozen = [p for n, p in model.named_parameters() if ".1." in n and "bias" in n]
    for p in frozen:
        p.requires_grad_(False)
    before, numbers = photograph(model), weights(model)
    use(model, task)
    assert photograph(model) == before
    after = weights(model)
    assert all(torch.equal(after[key], numbers[key]) for key in numbers)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_model_is_untouched_after_an_exception(name):
    task, model = build(name)
    model.train()
    before = photograph(model)
    adapter = adapt(model, task=task)
    batch = adapter.batch(SEQUENCES, LABELS if task == "sequence-classification" else None)
    good = adapter.logits(adapter.input(batch), batch.layout)
    with pytest.raises(DataError):
        adapter.batch([[7, 10**6]], [0] if task == "sequence-classification" else None)
    with pytest.raises(DataError, match="x is shaped"):
        adapter.logits(adapter.input(batch)[:, :, :3], batch.layout)
    with pytest.raises((RuntimeError, IndexError, ValueError)):  # deep inside the model
        adapter.logits(adapter.input(batch), {"attention_mask": batch.layout["attention_mask"].repeat(1, 9)})
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        adapter.loss(adapter.input(batch), batch.targets + 10**6, batch.layout)
    assert photograph(model) == before
    assert torch.equal(adapter.logits(adapter.input(batch), batch.layout), good)  # no pending input is left behind
    assert torch.equal(adapter.logits_from_ids(batch), good)


def test_gradients_that_the_caller_holds_survive():
    task, model = build("gpt2")
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    use(model, task)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())


def test_dropout_of_the_caller_is_off_in_the_adapter_only():
    task, model = build("bert")
    model.train()
    adapter = adapt(model, task=task)
    batch = adapter.batch(SEQUENCES, LABELS)
    first, second = (capture_gradient(adapter, batch).gradient for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert model.training
    assert model.bert.embeddings.dropout.training


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_updates_in_place_are_seen(name):
    task, model = build(name)
    labels = LABELS if task == "sequence-classification" else None
    adapter = adapt(model, task=task)
    batch = adapter.batch(SEQUENCES, labels)
    before = capture_gradient(adapter, batch).gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.get_input_embeddings()(torch.tensor([7])).sum().backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    got = capture_gradient(adapter, batch).gradient
    fresh_adapter = adapt(model, task=task)
    fresh = capture_gradient(fresh_adapter, fresh_adapter.batch(SEQUENCES, labels)).gradient
    assert all(torch.equal(got[n], fresh[n]) for n in fresh)
    assert any(not torch.equal(got[n], before[n]) for n in got)


def test_an_operator_refuses_to_mix_old_graphs_with_new_weights():
    task, model = build("gpt2")
    adapter = adapt(model, task=task)
    jacobian = GradientJacobian(adapter, batch := adapter.batch(SEQUENCES))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    with pytest.raises(DataError, match=r"changed in place since .* build it anew"):
        jacobian.gram(adapter.input(batch))


def test_a_vision_model_is_untouched():
    with torch.random.fork_rng():
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
                                    torch.nn.Dropout(0.5), torch.nn.Linear(4 * 36, 3))  # fmt: skip
    model.train()
    before, numbers = photograph(model), weights(model)
    adapter = adapt(model)
    batch = adapter.batch(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), [0, 2])
    inversion_influence(adapter, batch, noise_std=1e-2, max_products=5)
    assert photograph(model) == before
    assert all(torch.equal(model.state_dict()[key], numbers[key]) for key in numbers)  # running statistics too


def test_a_parameter_named_twice_stays_one():
    """Tied tables keep sharing in the private copy, and the adapter shares them with the caller's."""
    _, model = build("gpt2")
    adapter = adapt(model, task="causal-lm")
    assert adapter.model.lm_head.weight is adapter.model.transformer.wte.weight
    assert adapter.model.lm_head.weight is model.lm_head.weight
    assert adapter.model.transformer.h[0] is not model.transformer.h[0]


def test_lenet_draws_from_its_own_generator():
    before = torch.get_rng_state()
    first, second, other = LeNet(seed=1), LeNet(seed=1), LeNet(seed=2)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert torch.equal(torch.get_rng_state(), before)
