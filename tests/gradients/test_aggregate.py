"""FedSGD of several clients and FedAvg: what is captured, and what an attacker can simulate."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lmleak
from lmleak.adapters import LeNet, adapt
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.gradients import SharedGradient, capture_gradient, gradient_of, update_of
from lmleak.types import SINGLE_STEP, Aggregation
from tests.families import LABELS, SEQUENCES, IdTokenizer, build
from tests.gradients.training import backward, fedavg, largest_difference

EIGHT = [*SEQUENCES, [15, 16, 17], [40, 41, 42, 43, 44], [9, 8, 21], [33, 34], [52, 7, 30, 28]]
LOCAL = Aggregation(clients=2, epochs=2, steps_per_epoch=2, learning_rate=0.05)
# Written out: client by client, the rows of four steps.
LOCAL_ROWS = [[[0, 1], [2, 3], [0, 1], [2, 3]], [[4, 5], [6, 7], [4, 5], [6, 7]]]


def case(name, size=8, *, freeze_table=False, dtype=torch.float64):
    """(model, adapter, batch) of a tiny family model."""
    task, model = build(name, dtype=dtype)
    if freeze_table:
        model.get_input_embeddings().weight.requires_grad_(False)
    adapter = adapt(model, tokenizer=IdTokenizer() if task == "masked-lm" else None, task=task)
    labels = [*LABELS, 1, 0, 2, 2, 0][:size] if task == "sequence-classification" else None
    return model, adapter, adapter.batch(EIGHT[:size], labels)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama-tied", "opt", "unlisted-gemma", "bert", "bert-mlm"])
def test_local_steps_equal_training_with_sgd(name):
    """Tied and untied tables: the client reads x from a table that moves."""
    model, adapter, batch = case(name)
    expected = fedavg(model, batch, LOCAL_ROWS, learning_rate=0.05)
    got = capture_gradient(adapter, batch, shared="all", aggregation=LOCAL).gradient
    assert set(got) == set(expected)
    assert largest_difference(got, expected) < 1e-11
    single = capture_gradient(adapter, batch, shared="all").gradient
    assert largest_difference(single, backward(model, batch)) < 1e-11
    assert largest_difference(single, expected) > 1e-3  # so the steps did matter


def test_an_image_classifier_trains_locally_too():
    model = LeNet(size=8, seed=1).double()
    adapter = adapt(model)
    batch = adapter.batch(torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8).double().sin(), [0, 3, 1, 7])
    local = Aggregation(steps_per_epoch=2, learning_rate=0.1)
    trained = LeNet(size=8, seed=1).double()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for rows in ([0, 1], [2, 3]):
        optimizer.zero_grad()
        images, labels = batch.inputs["pixel_values"][rows], batch.targets[rows]
        torch.nn.functional.cross_entropy(trained(images), labels).backward()
        optimizer.step()
    expected = {n: (p - q).detach() / 0.2 for (n, p), q in zip(model.named_parameters(), trained.parameters())}  # noqa: B905
    got = capture_gradient(adapter, batch, shared="all", aggregation=local).gradient
    assert largest_difference(got, expected) < 1e-11


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("steps", [{}, {"epochs": 3, "learning_rate": 0.05}], ids=["gradient", "local steps"])
def test_several_clients_are_the_mean_of_each_alone(name, steps):
    _, adapter, batch = case(name)
    got = capture_gradient(adapter, batch, shared="all", aggregation=Aggregation(clients=4, **steps))
    alone = []
    for i in range(4):
        rows = slice(2 * i, 2 * i + 2)
        own = replace(
            batch,
            inputs={n: t[rows] for n, t in batch.inputs.items()},
            targets=batch.targets[rows],
            layout={n: t[rows] for n, t in batch.layout.items()},
        )
        alone.append(capture_gradient(adapter, own, shared="all", aggregation=Aggregation(**steps)).gradient)
    expected = {n: torch.stack([g[n] for g in alone]).mean(0) for n in alone[0]}
    assert largest_difference(got.gradient, expected) < 1e-12
    assert got.batch_size == 8
    # Equal to the whole batch's gradient where examples have equal weight, but not where tokens do.
    whole = capture_gradient(adapter, batch, shared="all").gradient
    assert (largest_difference(got.gradient, whole) < 1e-12) == (name == "bert" and not steps)


def test_only_the_selection_is_released_but_everything_moves():
    _, adapter, batch = case("bert")
    everything = capture_gradient(adapter, batch, shared="all", aggregation=LOCAL).gradient
    block = capture_gradient(adapter, batch, shared="block:1", aggregation=LOCAL).gradient
    assert set(block) == set(adapter.select("block:1").names)
    assert all(torch.equal(everything[name], tensor) for name, tensor in block.items())


def test_a_gradient_shared_by_two_parameters_is_not_counted_twice():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x.flatten(1)[:, :3] + (self.a + self.b)  # autograd hands both the same tensor

    adapter = adapt(Sum())
    batch = adapter.batch(torch.arange(12.0).reshape(3, 1, 2, 2), [0, 1, 2])
    got = capture_gradient(adapter, batch, shared="all", aggregation=Aggregation(clients=3)).gradient
    expected = capture_gradient(adapter, batch, shared="all").gradient
    assert torch.allclose(got["a"], expected["a"], atol=1e-7)
    assert torch.equal(got["a"], got["b"])


def test_the_model_does_not_move():
    model, adapter, batch = case("gpt2")
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first, second = (capture_gradient(adapter, batch, shared="all", aggregation=LOCAL).gradient for _ in range(2))
    assert all(torch.equal(p, before[n]) and p.grad.eq(1).all() for n, p in model.named_parameters())
    assert all(torch.equal(first[n], second[n]) and not first[n].requires_grad for n in first)
    assert torch.equal(state, torch.get_rng_state())


# What cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"steps_per_epoch": True}, "steps_per_epoch must be an integer"),
        ({"epochs": 2}, "2 local steps need learning_rate="),
        ({"epochs": 2, "learning_rate": 0.0}, "positive number, got 0"),
        ({"learning_rate": float("nan")}, "positive number, got nan"),
        ({"epochs": 2, "learning_rate": "0.1"}, "positive number, got '0.1'"),
    ],
)
def test_impossible_protocols_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregation(**options)


def test_the_schedule_is_what_the_fields_say():
    assert LOCAL.schedule(8) == [[slice(r[0], r[-1] + 1) for r in steps] for steps in LOCAL_ROWS]
    assert SINGLE_STEP.schedule(5) == [[slice(0, 5)]]
    for size in (6, 2, 0):
        with pytest.raises(DataError, match=r"must be a multiple of 4"):
            LOCAL.schedule(size)


def test_a_batch_that_cannot_be_divided_is_refused():
    _, adapter, batch = case("bert", size=3)
    with pytest.raises(DataError, match="a batch of 3 cannot be divided"):
        capture_gradient(adapter, batch, aggregation=Aggregation(clients=2))


def test_a_tied_table_cannot_be_split_after_local_steps():
    _, adapter, batch = case("gpt2")
    for shared in ("no-word-embeddings", "wte"):
        with pytest.raises(UnsupportedCombinationError, match="pass shared='all'"):
            capture_gradient(adapter, batch, shared=shared, aggregation=LOCAL)
        assert capture_gradient(adapter, batch, shared=shared, aggregation=Aggregation(clients=2)).gradient
    assert capture_gradient(adapter, batch, shared="block:0-1", aggregation=LOCAL).gradient
    both = capture_gradient(adapter, batch, shared="all", aggregation=LOCAL)
    both.check(adapter)
    with pytest.raises(DataError, match="said to be the head's part alone"):
        replace(both, shared="no-word-embeddings").check(adapter)


def test_a_step_too_small_to_move_float32_weights_is_refused():
    _, adapter, batch = case("bert", dtype=torch.float32)
    tiny = Aggregation(epochs=2, learning_rate=1e-30)
    with pytest.raises(DataError, match="learning rate is too small"):
        capture_gradient(adapter, batch, shared=r"dense\.weight", aggregation=tiny)
    with pytest.raises(DataError, match="NaN or Inf"):
        capture_gradient(adapter, batch, aggregation=Aggregation(epochs=8, learning_rate=1e30))


# The file -----------------------------------------------------------------------------------------------------


def test_the_protocol_travels_in_the_file(tmp_path):
    _, adapter, batch = case("bert")
    path = capture_gradient(adapter, batch, aggregation=LOCAL).save(tmp_path / "update")
    loaded = SharedGradient.load(path, adapter)
    assert loaded.aggregation == LOCAL
    assert loaded.observation(lengths=True, labels=True).aggregation == LOCAL
    single = capture_gradient(adapter, batch).save(tmp_path / "single")
    with safe_open(single, framework="pt") as file:
        assert "aggregation" not in file.metadata()


@pytest.mark.parametrize(
    "change",
    [
        {"clients": 3},
        {"clients": "2"},
        {"epochs": -1},
        {"learning_rate": None},
        {"learning_rate": True},
        {"rate": 1},
        [],
    ],
    ids=str,
)
def test_a_damaged_protocol_is_refused(change, tmp_path):
    _, adapter, batch = case("bert")
    path = capture_gradient(adapter, batch, aggregation=LOCAL).save(tmp_path / "update")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["aggregation"] = json.dumps(asdict(LOCAL) | change if isinstance(change, dict) else change)
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(DataError, match=r"damaged|cannot be divided"):
        SharedGradient.load(path)


# The attacker's simulation ------------------------------------------------------------------------------------


def guess(adapter, batch):
    return adapter.input(batch), batch.targets, batch.layout


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_one_step_of_one_client_is_the_gradient(name):
    _, adapter, batch = case(name)
    names = adapter.select("no-word-embeddings").names
    gradient, loss = gradient_of(adapter, *guess(adapter, batch), names)
    update, same_loss = update_of(adapter, *guess(adapter, batch), names, SINGLE_STEP)
    assert all(torch.equal(update[n], gradient[n]) for n in names)
    assert torch.equal(loss, same_loss)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "bert", "bert-mlm"])
@pytest.mark.parametrize("aggregation", [LOCAL, Aggregation(clients=4)], ids=["local steps", "clients"])
def test_the_update_is_exact_at_the_true_input_of_a_frozen_table(name, aggregation, create_graph):
    _, adapter, batch = case(name, freeze_table=True)
    names = adapter.select("all").names
    captured = capture_gradient(adapter, batch, shared="all", aggregation=aggregation).gradient
    update, loss = update_of(adapter, *guess(adapter, batch), names, aggregation, create_graph=create_graph)
    assert largest_difference(update, captured) < 1e-11
    assert loss.dim() == 0
    assert any(u.requires_grad for u in update.values()) == create_graph == loss.requires_grad
    some = adapter.select("block:0").names
    fewer, _ = update_of(adapter, *guess(adapter, batch), some, aggregation)
    assert set(fewer) == set(some)
    assert largest_difference(fewer, captured) < 1e-11


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_trained_table_leaves_an_error_of_first_order_in_the_learning_rate(name):
    _, adapter, batch = case(name)
    names = tuple(n for n in adapter.select("all").names if n != adapter.lookup_table())
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        local = replace(LOCAL, learning_rate=rate)
        captured = capture_gradient(adapter, batch, shared="all", aggregation=local).gradient
        update, _ = update_of(adapter, *guess(adapter, batch), names, local)
        difference = sum((update[n] - captured[n]).square().sum() for n in names).sqrt()
        errors.append((difference / sum(captured[n].square().sum() for n in names).sqrt()).item())
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.05)
    assert errors[0] < 0.02


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_update_can_be_differentiated_through_the_local_steps(name):
    """The derivative of ||update(x)||^2 in x, and in soft targets, against finite differences."""
    _, adapter, batch = case(name, size=4)
    local = Aggregation(clients=2, epochs=3, learning_rate=0.2)
    names = adapter.select("block:0").names
    x = adapter.input(batch)
    classes = 3 if name == "bert" else 60
    soft = torch.nn.functional.one_hot(batch.targets.clamp(min=0), classes).to(x) * 0.9 + 0.1 / classes
    unknowns = [x.requires_grad_(), soft.requires_grad_()]

    def norm(x, soft):
        update, _ = update_of(adapter, x, soft, batch.layout, names, local, create_graph=True)
        return sum(u.square().sum() for u in update.values())

    slopes = torch.autograd.grad(norm(*unknowns), unknowns)
    directions = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).sin().reshape(t.shape) for t in unknowns]
    step = 2e-6
    ends = [
        norm(*((t + sign * step * d).detach() for t, d in zip(unknowns, directions, strict=True))).item()
        for sign in (1, -1)
    ]
    got = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True)).item()
    assert got == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


# Attacks ------------------------------------------------------------------------------------------------------


def test_span_reads_the_texts_of_all_clients():
    _, adapter, batch = case("gpt2-classifier", size=2, dtype=torch.float32)
    shared = capture_gradient(adapter, batch, aggregation=Aggregation(clients=2))
    recovered = lmleak.run_attack("span", adapter, shared)
    assert sorted(recovered.token_ids) == sorted(batch.token_ids)


@pytest.mark.parametrize("attack", ["span", "dlg", "tag"])
def test_attacks_that_need_one_step_refuse_several(attack):
    _, adapter, batch = case("gpt2", size=2, dtype=torch.float32)
    several = Aggregation(epochs=2, learning_rate=0.1)
    if lmleak.attacks.ATTACKS[attack].assumes.local_steps:
        pytest.skip("simulates the local steps")
    shared = capture_gradient(adapter, batch, shared="all", aggregation=several)
    with pytest.raises(UnsupportedCombinationError, match="needs the gradient of one step"):
        lmleak.run_attack(attack, adapter, shared)
