"""The engine: the plain algorithm's loss curve, many guesses at once as one by one, pruned gradients, local steps."""

from dataclasses import replace

import pytest
import torch

import lmleak
from lmleak.attacks import descent
from lmleak.attacks.descent import Descent, Matching
from lmleak.attacks.matching import DLG, GS, TAG
from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.errors import ConfigError
from lmleak.gradients.capture import capture_gradient
from lmleak.types import Aggregation
from tests.attacks.test_matching import truth
from tests.families import make


def problem_of(attack, adapter, shared):
    observation = shared.observation(lengths=True, labels=True)
    return Matching(attack, RelaxedText(adapter, observation), observation)


def loss_curve(monkeypatch, attack, adapter, shared):
    values, see = [], Descent.see

    def spy(self, value, iterate, options):
        values.append(value)
        see(self, value, iterate, options)

    monkeypatch.setattr(Descent, "see", spy)
    attack.run(adapter, shared, seed=3)
    return values


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
@pytest.mark.parametrize("attack", [DLG, TAG], ids=["dlg", "tag"])
def test_loss_curve_is_that_of_a_plain_implementation(name, attack, monkeypatch):
    from benchmarks.matching import plain_loss_curve

    adapter, batch = make(name, size=2)
    shared, options = capture_gradient(adapter, batch), attack(iterations=25, candidates=1, mask_zeros=False)
    plain = plain_loss_curve(options, adapter, shared.observation(lengths=True, labels=True), seed=3)
    ours = loss_curve(monkeypatch, options, adapter, shared)
    assert len(ours) == 25
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < 0.9 * ours[0]


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "distilbert", "roberta", "gpt2", "opt", "gpt-neox", "llama",
                                  "gpt2-classifier", "unlisted-electra"])  # fmt: skip
def test_many_guesses_together_equal_one_by_one(name):
    adapter, batch = make(name)
    problem = problem_of(TAG(), adapter, capture_gradient(adapter, batch))
    generator = torch.Generator().manual_seed(0)
    guesses = [problem.text.draw(generator, 1.0) for _ in range(5)]
    problem.together = 3  # neither one nor a divisor
    alone = torch.stack([problem.distance(guess, create_graph=False).detach() for guess in guesses])
    assert torch.allclose(problem.distances(guesses), alone, rtol=1e-10)
    assert problem.evaluations == 5


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
def test_restarts_side_by_side_equal_restarts_in_turn(name, monkeypatch):
    adapter, batch = make(name, size=2)
    shared = capture_gradient(adapter, batch)
    attack = DLG(iterations=12, candidates=3, restarts=3)
    together = attack.run(adapter, shared, seed=1)
    monkeypatch.setattr(descent, "GRADIENT_NUMBERS", 0)
    in_turn = attack.run(adapter, shared, seed=1)
    assert together.token_ids == in_turn.token_ids
    assert together.objective == pytest.approx(in_turn.objective, rel=1e-7)
    assert together.cost.gradient_evaluations == in_turn.cost.gradient_evaluations == 3 * (3 + 36)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(together.embeddings, in_turn.embeddings, strict=True))


def test_a_restart_that_breaks_leaves_the_others_alone(monkeypatch):
    adapter, batch = make("bert", size=1)
    attack = DLG(iterations=5, candidates=1, restarts=2)
    problem = problem_of(attack, adapter, capture_gradient(adapter, batch))
    draw, drawn = problem.text.draw, []

    def first_is_broken(generator, scale):
        drawn.append(draw(generator, scale))
        if len(drawn) == 1:
            drawn[0].u.data.fill_(torch.nan)
        return drawn[-1]

    monkeypatch.setattr(problem.text, "draw", first_is_broken)
    broken, whole = problem.attempts(0)
    assert "objective became nan at iteration 0" in broken.stopped
    assert whole.stopped == "iteration limit"
    assert whole.objective < 10


@pytest.mark.parametrize("attack", [DLG, TAG, GS], ids=["dlg", "tag", "gs"])
def test_truth_is_a_zero_of_a_pruned_gradient_only_where_it_was_kept(attack):
    adapter, batch = make("bert")
    pruned = lmleak.parse_defense("prune(ratio=0.6)")(capture_gradient(adapter, batch))
    distances = {}
    for mask in (True, False, "auto"):
        problem = problem_of(attack(mask_zeros=mask), adapter, pruned)
        distances[mask] = problem.distance(truth(problem.text, batch), create_graph=False).item()
    assert distances[True] < 1e-12
    assert distances[False] > 1e-4
    assert distances["auto"] == distances[True]
    clean = problem_of(attack(), adapter, capture_gradient(adapter, batch))
    assert not clean.objective.kept  # position rows beyond the text are zero, too, and that is known of every guess
    with pytest.raises(ConfigError, match="mask_zeros"):
        attack(mask_zeros=1)
    with pytest.raises(ConfigError, match="mask_zeros"):
        attack(mask_zeros="never")


@pytest.mark.parametrize(
    "aggregation",
    [Aggregation(clients=3), Aggregation(epochs=2, steps_per_epoch=3, learning_rate=0.1)], ids=["clients", "steps"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "gpt2-untied"])
def test_updates_of_several_clients_or_local_steps_are_matched(name, aggregation):
    adapter, batch = make(name)
    adapter.model.get_input_embeddings().weight.requires_grad_(False)  # frozen, so that x is fixed
    shared = capture_gradient(adapter, batch, aggregation=aggregation)
    problem = problem_of(DLG(mask_zeros=False), adapter, shared)
    assert problem.distance(truth(problem.text, batch), create_graph=False).item() < 1e-10
    if aggregation.steps > 1:
        plain = problem_of(DLG(mask_zeros=False), adapter, replace(shared, aggregation=Aggregation()))
        assert plain.distance(truth(plain.text, batch), create_graph=False).item() > 1e-8
    found = DLG(iterations=20, candidates=2).run(adapter, shared)
    start = DLG(iterations=1, candidates=2).run(adapter, shared)
    assert found.objective < start.objective
    assert found.cost.gradient_evaluations == aggregation.epochs * (2 + 60)


def test_cosine_sees_through_the_size_that_clipping_hides():
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    clipped = shared.released({n: 0.01 * g for n, g in shared.gradient.items()}, "clip")
    whole, small = (GS(iterations=20, candidates=4).run(adapter, s) for s in (shared, clipped))
    assert whole.token_ids == small.token_ids
    assert whole.objective == pytest.approx(small.objective, rel=1e-6)


def test_restarts_of_a_model_of_real_size_run_side_by_side():
    """Its gradients are longer than a piece of the objective, and taken together."""
    adapter = lmleak.load_adapter("reference-gpt2")
    shared = lmleak.capture_gradient(adapter, adapter.batch(["my scan came back"]))
    for name in ("dlg", "tag"):
        together = lmleak.run_attack(name, adapter, shared, iterations=3, restarts=3, candidates=4)
        assert together.cost.iterations == 9
        assert 0 < together.objective < float("inf")
