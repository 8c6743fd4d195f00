"""LAMP: its moves, its prior, and that orders are chosen by objective plus perplexity."""

import pytest
import torch

import lmleak
from lmleak.attacks import descent
from lmleak.attacks.descent import Matching
from lmleak.attacks.lamp import LAMP
from lmleak.attacks.lamp_moves import random_orders
from lmleak.attacks.language_prior import load_prior
from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.errors import ConfigError
from lmleak.gradients.capture import capture_gradient
from tests.attacks.test_matching import truth
from tests.families import make

QUICK = {"iterations": 10, "candidates": 2, "permutations": 2, "moves": 6, "rounds": 2}


def test_orders_are_permutations_with_the_present_one_first():
    orders = random_orders(7, 60, torch.Generator().manual_seed(0))
    assert orders[0].tolist() == list(range(7))
    assert all(sorted(order.tolist()) == list(range(7)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders) > 30
    assert [order.tolist() for order in random_orders(2, 20, torch.Generator().manual_seed(0))] == [[0, 1], [1, 0]]


def test_every_kind_of_move_occurs():
    orders = [tuple(o.tolist()) for o in random_orders(6, 400, torch.Generator().manual_seed(1))]
    assert (0, 4, 2, 3, 1, 5) in orders  # a swap
    assert (1, 2, 3, 0, 4, 5) in orders  # one token moved
    assert (0, 3, 4, 1, 2, 5) in orders  # a sub-sequence moved
    assert (2, 3, 4, 5, 0, 1) in orders  # a prefix moved to the end


def test_log_perplexity_is_that_of_the_model_and_padding_does_not_matter():
    prior = load_prior("reference-gpt2", torch.device("cpu"))
    texts = ["i have an appointment tomorrow", "my blood test came back positive and i am scared", ""]
    together = prior.nats_per_token(texts)
    alone = torch.cat([prior.nats_per_token([text]) for text in texts])
    assert torch.allclose(together, alone, rtol=1e-4)
    adapter = prior.adapter
    ids = prior.start + adapter.tokenizer(texts[0])["input_ids"]
    batch = adapter.batch([ids])
    loss = adapter.loss(adapter.input(batch), batch.targets, batch.layout).item()
    assert together[0].item() == pytest.approx(loss, rel=1e-4)
    assert together[2].item() == pytest.approx(torch.tensor(float(adapter.vocabulary_size)).log().item())
    shuffled = prior.nats_per_token(["scared and am my blood i positive came back test"])
    assert shuffled.item() > together[1].item()


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
def test_moves_undo_a_swap_by_the_gradient_alone(name):
    adapter, batch = make(name, size=2)
    observation = capture_gradient(adapter, batch).observation(lengths=True, labels=True)
    attack = LAMP(prior="none", moves=60, norm_weight=0.0)
    problem = Matching(attack, RelaxedText(adapter, observation), observation)
    right = truth(problem.text, batch)
    order = torch.arange(len(right.u))
    order[[1, 3]] = order[[3, 1]]
    moved = attack.move(problem, right.permuted(order), torch.Generator().manual_seed(0))
    assert torch.equal(moved.u, right.u)
    assert problem.distances([right.permuted(order)]).item() > 1e-3


def test_a_heavy_prior_decides_the_order():
    adapter = lmleak.load_adapter("reference-bert")
    batch = adapter.batch(["the doctor called me about my test results"], [0])
    observation = capture_gradient(adapter, batch).observation(lengths=True, labels=True)
    attack = LAMP(moves=80, prior_weight=1e6)
    problem = Matching(attack, RelaxedText(adapter, observation), observation)
    right = truth(problem.text, batch)
    shuffled = right.permuted(torch.randperm(len(right.u), generator=torch.Generator().manual_seed(2)))
    prior = load_prior("reference-gpt2", adapter.device)

    def nats(guess):
        return prior.nats_per_token([adapter.decode(problem.text.decode(guess)[0][0])]).item()

    assert nats(attack.move(problem, shuffled, torch.Generator().manual_seed(0))) < nats(shuffled)


@pytest.mark.parametrize("objective", ["cos", "l1l2"])
def test_runs_with_every_objective_and_counts_its_gradients(objective):
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    found = LAMP(objective=objective, prior="none", **QUICK).run(adapter, shared)
    steps, starts = 3 * 10, 2 + 3
    moves = found.cost.gradient_evaluations - steps - starts
    assert 2 * 4 <= moves <= 2 * 6  # repeated orders are not scored twice
    longer = LAMP(objective=objective, prior="none", **QUICK | {"iterations": 60}).run(adapter, shared)
    assert longer.objective < found.objective
    assert found.stopped == "iteration limit"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_one_gradient_at_a_time_gives_the_same(name, monkeypatch):
    adapter, batch = make(name, size=2)
    shared, attack = capture_gradient(adapter, batch), LAMP(prior="none", **QUICK)
    together = attack.run(adapter, shared)
    monkeypatch.setattr(descent, "GRADIENT_NUMBERS", 0)  # as for a large model
    alone = attack.run(adapter, shared)
    assert alone.token_ids == together.token_ids
    assert alone.objective == pytest.approx(together.objective, rel=1e-7)


def test_rounds_are_spread_over_the_steps():
    attack = LAMP(iterations=300, rounds=3)
    assert [i for i in range(1, 301) if attack.moves_after(i)] == [30, 120, 210]


def test_norms_are_pulled_to_those_of_the_table():
    adapter, batch = make("bert", size=1)
    observation = capture_gradient(adapter, batch).observation(lengths=True, labels=True)
    attack, text = LAMP(norm_weight=2.0), RelaxedText(adapter, observation)
    guess = text.draw(torch.Generator().manual_seed(0), 1.0)
    share = text.rows(guess).norm(dim=-1).mean() / text.table.norm(dim=-1).mean()
    assert attack.penalty(text, guess).item() == pytest.approx(2 * (share - 1).item() ** 2)


@pytest.mark.parametrize(
    "option", [{"objective": "cosine"}, {"prior": 3}, {"rounds": 0}, {"moves": True}, {"prior_weight": -1}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_impossible_options_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        LAMP(**option)


def test_a_prior_that_does_not_exist_is_refused_before_anything_runs():
    adapter, batch = make("bert", size=1)
    with pytest.raises(ConfigError):
        LAMP(prior="no/such-model-anywhere").check(adapter, capture_gradient(adapter, batch))
    with pytest.raises(ConfigError, match="must be a causal language model"):
        LAMP(prior="reference-bert").check(adapter, capture_gradient(adapter, batch))
