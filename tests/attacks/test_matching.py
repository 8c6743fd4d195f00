"""Gradient matching (DLG, TAG): the objective against hand computation, the descent's promises, the relaxation."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import lmleak
from lmleak.adapters import adapt
from lmleak.attacks.descent import Matching, matched_names
from lmleak.attacks.matching import DLG, TAG
from lmleak.attacks.objectives import NORM_FLOOR, SquaredL2, SquaredL2PlusL1, layer_scales
from lmleak.attacks.relaxed_text import RelaxedText, token_template
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient, gradient_of
from tests.families import IdTokenizer, make

OBSERVED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[0.0, -0.1]])}
GUESS = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[0.2, -0.1]])}


class TemplateTokenizer(IdTokenizer):
    """Puts 1 before and 2 after every text, as BERT puts [CLS] and [SEP]."""

    all_special_ids = [0, 1, 2]  # noqa: RUF012 (a constant of a test double)

    def __call__(self, text, add_special_tokens=True):
        ids = [int(word) + 2 for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def observe(adapter, batch, **keywords):
    return capture_gradient(adapter, batch, **keywords).observation(lengths=True, labels=True)


def truth(text, batch):
    """Return unknowns at the private input; targets one-hot, as far as the relaxation can express it."""
    guess = text.draw(torch.Generator().manual_seed(0), 1.0)
    rows = text.adapter.input(batch)[text.free]
    guess.u = ((rows - text.prior.mean) / text.prior.std).requires_grad_()
    if guess.logits is not None:
        hard = 1e4 * F.one_hot(batch.targets.clamp(min=0)[text.free], len(text.table))
        guess.logits = hard.to(guess.u).requires_grad_()
    if guess.gate is not None:
        guess.gate = torch.where(batch.targets[text.free] >= 0, 1e4, -1e4).to(guess.u).requires_grad_()
    return guess


def random_gpt2(seed, vocabulary=500, width=64):
    """The 2 x 64 model of which the published comparison code recovers 7 tokens of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tf.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        adapter = adapt(tf.GPT2LMHeadModel(config).eval())
        return adapter, adapter.batch(torch.randint(1, vocabulary, (1, 8)).tolist())


def random_bert(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tf.BertConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=32, num_labels=2,
        )  # fmt: skip
        adapter = adapt(tf.BertForSequenceClassification(config).eval())
        return adapter, adapter.batch(torch.randint(1, 500, (1, 8)).tolist(), [seed % 2])


# The objective --------------------------------------------------------------------------------------------


def test_scales_by_hand():
    assert layer_scales(OBSERVED, 0.0) == pytest.approx(dict.fromkeys("ab", 1 / 25.01**0.5))
    # balance 1: s_a = c / 5, s_b = c / 0.1, and two layers of norm c make c = 1 / sqrt(2)
    assert layer_scales(OBSERVED, 1.0) == pytest.approx({"a": 0.5**0.5 / 5, "b": 0.5**0.5 / 0.1})


def test_objectives_by_hand():
    # differences: a (0, -2), b (0.2, 0); unscaled squares 4 + 0.04 over 25.01; absolute values 2.2 over 7.1
    assert SquaredL2(OBSERVED, balance=0.0)(GUESS).item() == pytest.approx(4.04 / 25.01)
    assert SquaredL2(OBSERVED, balance=1.0)(GUESS).item() == pytest.approx(0.5 * (4 / 25 + 0.04 / 0.01))
    tag = SquaredL2PlusL1(OBSERVED, balance=0.0, alpha=0.3)
    assert tag(GUESS).item() == pytest.approx(4.04 / 25.01 + 0.3 * 2.2 / 7.1)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_zero_guess_scores_one_whatever_the_size_of_the_gradient(balance, size):
    observed = {name: size * g for name, g in OBSERVED.items()}
    zero = {name: torch.zeros_like(g) for name, g in OBSERVED.items()}
    assert SquaredL2(observed, balance=balance)(zero).item() == pytest.approx(1, rel=1e-5)
    assert SquaredL2PlusL1(observed, balance=balance, alpha=0.3)(zero).item() == pytest.approx(1.3, rel=1e-5)


def test_rounding_noise_is_not_blown_up_and_zero_gradients_are_finite():
    noise = {"a": torch.tensor([1.0]), "key.bias": torch.tensor([1e-12]), "unused": torch.zeros(3)}
    scales = layer_scales(noise, 1.0)
    assert scales["key.bias"] == pytest.approx(scales["a"] / NORM_FLOOR)
    assert scales["key.bias"] == scales["unused"]
    zero = {"a": torch.zeros(2)}
    for distance in (SquaredL2(zero, balance=1.0), SquaredL2PlusL1(zero, balance=1.0, alpha=0.5)):
        assert torch.isfinite(distance({"a": torch.ones(2)}))


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "gpt2-untied", "gpt2-classifier"])
@pytest.mark.parametrize("attack", [DLG(), TAG()], ids=["dlg", "tag"])
def test_truth_is_a_zero_and_for_dlg_a_stationary_point(name, attack):
    adapter, batch = make(name)
    observation = observe(adapter, batch)
    text = RelaxedText(adapter, observation)
    problem, guess = Matching(attack, text, observation), truth(RelaxedText(adapter, observation), batch)
    elsewhere = text.draw(torch.Generator().manual_seed(1), 1.0)
    objective = problem.distance(guess, create_graph=True)
    assert objective.item() < 1e-12
    if attack.name == "dlg":  # the L1 norm has a kink there
        (slope,) = torch.autograd.grad(objective, [guess.u])
        away = torch.autograd.grad(problem.distance(elsewhere, create_graph=True), [elsewhere.u])[0]
        assert slope.norm() < 1e-9 * away.norm()
    assert problem.distance(elsewhere, create_graph=False).item() > 1e-3


# The relaxation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_soft_targets_that_are_one_hot_give_the_hard_loss(name, side):
    adapter, batch = make(name, padding_side=side)
    text = RelaxedText(adapter, observe(adapter, batch))
    x, guess = adapter.input(batch), truth(text, batch)
    soft = adapter.loss(x, text.targets(guess), batch.layout)
    assert soft.item() == pytest.approx(adapter.loss(x, batch.targets, batch.layout).item(), rel=1e-12)


def test_causal_targets_sit_where_the_loss_is():
    adapter, batch = make("gpt2", padding_side="left")
    text = RelaxedText(adapter, observe(adapter, batch))
    mass = text.targets(text.draw(torch.Generator().manual_seed(0), 1.0)).sum(-1)
    assert torch.allclose(mass[:, 1:], (batch.targets[:, 1:] >= 0).to(mass))
    assert not mass[:, 0].any()  # the loss never reads the first target


def test_template_comes_from_the_tokenizer_and_is_fixed():
    adapter, batch = make("bert")
    assert token_template(adapter) == ((), ())
    adapter.tokenizer = TemplateTokenizer()
    assert token_template(adapter) == ((1,), (2,))
    batch = adapter.batch([[1, 9, 8, 7, 2], [1, 30, 2]], [0, 1])
    text = RelaxedText(adapter, observe(adapter, batch))
    assert text.known.tolist() == [[1, -1, -1, -1, 2], [1, -1, 2, 0, 0]]
    x = text.x(text.draw(torch.Generator().manual_seed(0), 1.0))
    known = text.known >= 0
    assert torch.equal(x[known], adapter.input(batch)[known])
    found = DLG(iterations=2, candidates=1).run(adapter, capture_gradient(adapter, batch))
    assert [len(ids) for ids in found.token_ids] == [3, 1]
    assert not {0, 1, 2} & {t for ids in found.token_ids for t in ids}  # special tokens only in the template
    assert [len(e) for e in found.embeddings] == [5, 3]


def test_public_causal_targets_are_hard():
    adapter, _ = make("gpt2")
    adapter.tokenizer = TemplateTokenizer()
    batch = adapter.batch([[1, 9, 8, 2]])
    text = RelaxedText(adapter, observe(adapter, batch))
    targets = text.targets(text.draw(torch.Generator().manual_seed(0), 1.0))
    assert targets[0, 3, 2] == 1
    assert targets[0].sum(-1).tolist() == pytest.approx([0, 1, 1, 1])


@pytest.mark.parametrize("name", ["gpt2", "gpt2-classifier", "opt", "llama"])
def test_padding_side_does_not_matter(name):
    found = []
    for side in ("right", "left"):
        adapter, batch = make(name, padding_side=side)
        found.append(DLG(iterations=5, candidates=2).run(adapter, capture_gradient(adapter, batch), seed=4))
    right, left = found
    assert right.objective == pytest.approx(left.objective, rel=1e-6)
    assert right.token_ids == left.token_ids
    assert [len(e) for e in left.embeddings] == [6, 4, 5]
    for a, b in zip(right.embeddings, left.embeddings, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
def test_decoding_the_truth_gives_the_text(name):
    adapter, batch = make(name)
    text = RelaxedText(adapter, observe(adapter, batch))
    guess = truth(text, batch).detached()
    sequences, confidence = text.decode(guess)
    assert [tuple(s) for s in sequences] == list(batch.token_ids)  # masked tokens come from their targets
    assert all(0 < c <= 1 for row in confidence for c in row)
    for row, embedding in enumerate(text.embeddings(guess)):
        real = batch.layout["attention_mask"][row].bool()
        assert torch.allclose(embedding, adapter.input(batch)[row][real])


# The descent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [DLG, TAG])
@pytest.mark.parametrize("name", ["bert", "bert-mlm", "distilbert", "gpt2", "unlisted-gemma"])
def test_objective_falls_and_is_that_of_the_returned_input(name, attack):
    adapter, batch = make(name, size=1)
    shared = capture_gradient(adapter, batch)
    short, long = (attack(iterations=n, candidates=1, decay="none").run(adapter, shared) for n in (1, 60))
    assert long.objective < 0.5 * short.objective
    assert long.cost.iterations == 60
    assert long.cost.gradient_evaluations == 180
    assert long.stopped == "iteration limit"
    if name in ("bert", "distilbert"):  # labels are known, so the embeddings alone determine the gradient
        x, names = torch.stack(long.embeddings), matched_names(adapter, shared)
        gradient, _ = gradient_of(adapter, x, batch.targets, batch.layout, names)
        options = attack()
        distance = options.make_objective({n: shared.gradient[n] for n in names}, {})
        assert distance(gradient).item() == pytest.approx(long.objective, rel=1e-6)


def test_best_iterate_is_kept_and_a_huge_step_ends_cleanly():
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    first = DLG(iterations=1, candidates=1).run(adapter, shared)
    wild = DLG(iterations=30, candidates=1, learning_rate=1e4, decay="none").run(adapter, shared)
    assert wild.objective <= first.objective
    assert torch.isfinite(torch.stack(wild.embeddings)).all()


def test_overflow_stops_with_the_reason_and_the_best_iterate():
    adapter, batch = make("bert", size=1, dtype=torch.float32)
    shared = capture_gradient(adapter, batch)
    first = DLG(iterations=1, candidates=1).run(adapter, shared)
    wild = DLG(iterations=30, candidates=1, learning_rate=1e30, prior_pull=1e30).run(adapter, shared)
    assert "objective became" in wild.stopped
    assert wild.objective == first.objective
    assert torch.isfinite(torch.stack(wild.embeddings)).all()
    broken = DLG(iterations=30, candidates=2, init_scale=1e30).run(adapter, shared)
    assert "objective became" in broken.stopped
    assert broken.objective is None
    assert len(broken.token_ids[0]) == len(batch.token_ids[0])


def test_stopping_reasons():
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    assert DLG(candidates=1, loss_tolerance=1e9).run(adapter, shared).stopped == "objective below tolerance"
    stuck = DLG(candidates=1, learning_rate=1e-12, patience=7).run(adapter, shared)
    assert stuck.stopped == "no improvement for 7 iterations"
    assert stuck.cost.iterations == 8


def test_restarts_and_candidates_keep_the_best():
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    one = DLG(iterations=10, candidates=1).run(adapter, shared, seed=5)
    three = DLG(iterations=10, candidates=1, restarts=3).run(adapter, shared, seed=5)
    assert three.objective <= one.objective
    assert three.cost.iterations == 30
    many = DLG(iterations=1, candidates=20).run(adapter, shared, seed=5)
    assert many.objective <= DLG(iterations=1, candidates=1).run(adapter, shared, seed=5).objective
    assert many.cost.gradient_evaluations == 20 + 3
    # A match ends the attempts beside it, too: one step each.
    assert DLG(restarts=5, candidates=1, loss_tolerance=1e9).run(adapter, shared).cost.iterations == 5


def test_attack_is_blind_to_the_size_of_the_loss():
    adapter, batch = make("bert", size=1)
    shared = capture_gradient(adapter, batch)
    # Another scale of the same gradient is another gradient, so scale both sides: the objective does not notice.
    distance, scaled = (SquaredL2({n: k * g for n, g in shared.gradient.items()}, balance=0.5) for k in (1.0, 1e-7))
    guess = {n: g.roll(1) + 0.1 for n, g in shared.gradient.items()}
    assert scaled({n: 1e-7 * g for n, g in guess.items()}).item() == pytest.approx(distance(guess).item(), rel=1e-9)


# What is matched ------------------------------------------------------------------------------------------


def test_looked_up_rows_are_not_matched():
    adapter, batch = make("gpt2", size=1)
    shared = capture_gradient(adapter, batch, shared="all")
    table = adapter.lookup_table()
    assert table in shared.gradient
    assert table not in matched_names(adapter, shared)
    assert table in matched_names(adapter, capture_gradient(adapter, batch))  # tied: through the head, a function of x
    found = DLG(iterations=2, candidates=1).run(adapter, shared)
    assert any(table in note for note in found.notes)
    withheld = "hide-layers(names='^(?!.*wte)')"
    only = replace(shared, gradient={table: shared.gradient[table]}, defenses=(withheld,))
    with pytest.raises(UnsupportedCombinationError, match="word table"):
        DLG().run(adapter, only)


@pytest.mark.parametrize(
    "spec", ["gaussian(std=1.0, unit=rms)", "prune(ratio=0.9)", "sign", "quantize(bits=4)", "bf16"]
)
def test_runs_on_a_defended_gradient_and_says_when_it_did_not_match(spec):
    adapter, batch = make("bert", size=1, dtype=torch.float32)
    found = TAG(iterations=5, candidates=1).run(adapter, lmleak.parse_defense(spec)(capture_gradient(adapter, batch)))
    assert len(found.token_ids[0]) == len(batch.token_ids[0])
    assert found.objective > 0.1
    assert any("not matched" in note for note in found.notes)


@pytest.mark.parametrize(
    "option", [{"iterations": 0}, {"restarts": 1.5}, {"candidates": True}, {"learning_rate": 0}, {"balance": 2},
               {"init_scale": float("nan")}, {"loss_tolerance": float("inf")}, {"decay": "cosin"}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_impossible_options_are_refused(option):
    with pytest.raises(ConfigError):
        TAG(**option)
    with pytest.raises(ConfigError, match="alpha"):
        TAG(alpha=-0.1)


# How much is recovered ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_random_gpt2_gives_up_every_token_in_place(seed):
    adapter, batch = random_gpt2(seed)
    found = DLG(iterations=200, candidates=8).run(adapter, capture_gradient(adapter, batch), seed=seed)
    assert found.token_ids == batch.token_ids  # the last token, which enters no loss, from its target


@pytest.mark.slow
@pytest.mark.parametrize("attack", [DLG(), TAG()], ids=["dlg", "tag"])
@pytest.mark.parametrize("build", [random_gpt2, random_bert])
def test_defaults_recover_small_random_models(build, attack):
    accuracies = []
    for seed in range(2):
        adapter, batch = build(seed)
        found = attack.run(adapter, capture_gradient(adapter, batch), seed=seed)
        accuracies.append(lmleak.score_text(found, batch).position_accuracy)
    assert sum(accuracies) / 2 > 0.9  # at most one token of 16 is wrong; none is here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference-bert", "reference-gpt2"])
def test_defaults_recover_text_from_the_reference_models(name):
    from lmleak.data.embedded import sample_messages

    adapter, recalls = lmleak.load_adapter(name), []
    for message in sample_messages()[:4:2]:
        batch = adapter.batch([message.text], None if adapter.task == "causal-lm" else [message.label])
        found = DLG().run(adapter, capture_gradient(adapter, batch))
        recalls.append(lmleak.score_text(found, batch).token_recall)
    assert sum(recalls) / 2 > 0.25  # a random token is right once in 2,000
