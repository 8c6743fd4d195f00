"""Predicted recovery against closed forms, brute-force integration and real gradients, in float64."""

import itertools
import math

import pytest
import torch

import lmleak.influence.recovery as recovery
from lmleak.adapters import adapt
from lmleak.errors import ConfigError, UnsupportedCombinationError, UnsupportedModelError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian
from lmleak.influence.recovery import METHODS, RecoveryPredictor, predict_recovery
from lmleak.influence.recovery_posterior import (
    LinearGaussian,
    effective_precision,
    gaussian_hits,
    posterior_covariance,
    posterior_hits,
    posterior_scores,
)
from lmleak.influence.recovery_substitution import Sketch, SubstitutionTable, substitution_hits, text_gradients


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def close(hits, expected, draws):
    """Whether a share of draws agrees with a probability to four standard errors."""
    return abs(hits.double().mean().item() - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws) + 1e-9


def linear_problem(tokens=3, width=4, vocabulary=7, rank=None, seed=0, prior_std=0.8):
    """A random linearised problem of full rank, or of the given rank."""
    size = tokens * width
    factor = randn(size, rank or size + 3, seed=seed)
    table = randn(vocabulary, width, seed=seed + 1)
    truth = torch.arange(tokens) % vocabulary
    gram = factor @ factor.T
    return gram, LinearGaussian.from_gram(gram, table[truth], table, truth, table.mean(0), prior_std)


# The linear posterior ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_std", [0.5, 1.5, 4.0])
def test_two_tokens_have_the_closed_form(noise_std):
    gram, problem = linear_problem(tokens=1, width=3, vocabulary=2)
    d = problem.table[1] - problem.table[0]
    expected = phi(math.sqrt((d @ gram @ d).item()) / noise_std / 2)
    assert close(posterior_hits(problem, noise_std, 20_000, generator(), "known"), expected, 20_000)


@pytest.mark.parametrize("noise_std", [0.3, 1.0, 3.0])
def test_gaussian_attacker_on_a_line_has_the_closed_form(noise_std):
    # One coordinate, tokens +1 and -1, mu = 0: cosine decodes the sign of shrink * (p x0 + sqrt(p) n).
    gram, table = torch.tensor([[2.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
    problem = LinearGaussian.from_gram(gram, table[:1], table, torch.tensor([0]), torch.zeros(1), 1.0)
    assert close(gaussian_hits(problem, noise_std, 20_000, generator()), phi(math.sqrt(2.0) / noise_std), 20_000)


def test_gaussian_estimate_has_the_shrunk_mean_and_its_covariance():
    # Against W and its moments computed by inverses: the recall of a very large sample drawn from them.
    gram, problem = linear_problem(seed=3)
    p, tau = gram / 4.0, problem.prior_std
    w = torch.linalg.inv(p + torch.eye(len(p)) / tau**2)
    mu = problem.prior_mean.repeat(len(problem.x))
    mean, factor = mu + w @ p @ (problem.x.reshape(-1) - mu), torch.linalg.cholesky(w @ p @ w)
    sample = (mean + randn(40_000, len(mean), seed=9) @ factor.T).reshape(40_000, *problem.x.shape)
    similarity = torch.nn.functional.normalize(sample, dim=-1) @ torch.nn.functional.normalize(problem.table, dim=-1).T
    expected = (similarity.argmax(-1) == problem.truth).double().mean(0)
    found = gaussian_hits(problem, 2.0, 40_000, generator()).double().mean(0)
    assert (expected - 0.5).abs().min() < 0.4  # the case is not decided beforehand
    assert torch.allclose(found, expected, atol=0.015)


@pytest.mark.parametrize("rank", [None, 6])
def test_effective_precision_is_the_schur_complement(rank):
    gram, problem = linear_problem(rank=rank)
    sigma, width = 0.7, 4
    p, tau = gram / sigma**2, problem.prior_std
    covariance = torch.linalg.inv(p + torch.eye(len(p)) / tau**2)
    belief = tau**2 * torch.eye(width, dtype=torch.float64).expand(3, -1, -1)
    found = effective_precision(problem, sigma, belief)
    for t in range(3):
        own = slice(t * width, (t + 1) * width)
        expected = torch.linalg.inv(covariance[own, own]) - torch.eye(width) / tau**2
        assert torch.allclose(found[t], expected, rtol=1e-8, atol=1e-8)
        assert torch.allclose(effective_precision(problem, sigma, None)[t], p[own, own], rtol=1e-9, atol=1e-9)


def test_effective_precision_for_any_belief_about_the_others():
    gram, problem = linear_problem()
    factors = randn(3, 4, 2, seed=5)  # singular beliefs, as a posterior over two tokens has
    beliefs = factors @ factors.mT
    found = effective_precision(problem, 1.0, beliefs)
    for t in range(3):
        own = torch.zeros(12, dtype=torch.bool)
        own[t * 4 : (t + 1) * 4] = True
        c = torch.block_diag(*[b for s, b in enumerate(beliefs) if s != t])
        to, oo = gram[own][:, ~own], gram[~own][:, ~own]
        expected = gram[own][:, own] - to @ c @ torch.linalg.inv(torch.eye(8) + oo @ c) @ to.T
        assert torch.allclose(found[t], expected, rtol=1e-8, atol=1e-8)


def test_schur_form_equals_integrating_the_other_token_out():
    # Two tokens of one coordinate: log of the likelihood integrated over x_2 on a grid is a parabola in x_1.
    gram, problem = linear_problem(tokens=2, width=1, vocabulary=5, seed=2)
    mu, tau, s = problem.prior_mean.item(), problem.prior_std, randn(2, seed=8)
    other = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    step = 0.5

    def log_integral(d):
        delta = torch.stack([torch.full_like(other, d), other - problem.x[1, 0]])
        exponent = -(delta * (gram @ delta)).sum(0) / 2 + s @ delta - ((other - mu) / tau) ** 2 / 2
        return exponent.logsumexp(0).item()

    curvature = -(log_integral(step) - 2 * log_integral(0.0) + log_integral(-step)) / step**2
    found = effective_precision(problem, 1.0, torch.full((2, 1, 1), tau**2, dtype=torch.float64))[0, 0, 0].item()
    assert found == pytest.approx(curvature, rel=1e-6)


def test_recall_falls_with_noise_from_one_to_chance():
    _, problem = linear_problem(vocabulary=6)
    for others in ("known", "gaussian", "mean-field"):
        recalls = [
            posterior_hits(problem, std, 2000, generator(), others).double().mean().item()
            for std in (1e-4, 0.3, 1.0, 3.0, 30.0)
        ]
        assert recalls[0] == 1.0
        assert all(a >= b - 0.02 for a, b in itertools.pairwise(recalls))
        assert recalls[-1] < 0.5


def test_drowned_in_noise_exactly_one_token_wins_so_chance_is_one_in_v():
    gram, problem = linear_problem(tokens=1, vocabulary=6)
    wins = 0
    for truth in range(6):
        own = LinearGaussian.from_gram(
            gram, problem.table[truth : truth + 1], problem.table, torch.tensor([truth]), problem.prior_mean, 1.0
        )
        wins = wins + posterior_hits(own, 1e7, 500, generator(), "known").long()
    assert wins.unique().tolist() == [1]  # the same noise picks one direction


def test_a_token_that_the_gradient_does_not_show_is_guessed():
    _, problem = linear_problem(tokens=1, vocabulary=5)
    blind = LinearGaussian.from_gram(
        torch.zeros(4, 4), problem.x, problem.table, problem.truth, problem.prior_mean, 1.0
    )
    assert close(posterior_hits(blind, 1.0, 20_000, generator(), "known"), 1 / 5, 20_000)


def test_mean_field_lies_between_its_neighbours_and_its_covariance_is_right():
    _, problem = linear_problem(tokens=4, width=3, vocabulary=12, seed=4)
    known, field, prior = (
        posterior_hits(problem, 1.2, 4000, generator(), others).double().mean().item()
        for others in ("known", "mean-field", "gaussian")
    )
    assert prior - 0.02 <= field <= known + 0.02
    assert prior < known - 0.02
    scores = posterior_scores(problem, effective_precision(problem, 1.2, None), randn(1, 4, 3, seed=6))
    weight = scores[0, 2].softmax(0)
    mean = weight @ problem.table
    expected = (problem.table - mean).T @ torch.diag(weight) @ (problem.table - mean)
    assert torch.allclose(posterior_covariance(problem, scores)[2], expected, atol=1e-12)


# Substitutions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "side"), [("bert", "right"), ("gpt2", "right"), ("gpt2", "left"), ("llama-tied", "right")]
)
def test_text_gradients_are_what_a_client_with_the_other_text_sends(problems, family, side):
    adapter, batch = problems.make(family, padding_side=side)
    sequences = [list(s) for s in problems.sequences]
    sequences[1][2] = 44
    labels = problems.labels if adapter.task == "sequence-classification" else None
    other = adapter.batch(sequences, labels, padding_side=side)
    names = adapter.select("no-word-embeddings").names
    ids = torch.stack([batch.inputs["input_ids"], other.inputs["input_ids"]])
    found = text_gradients(adapter, batch, ids, names)
    for k, client in enumerate((batch, other)):
        expected = capture_gradient(adapter, client).gradient
        for name in names:
            assert torch.allclose(found[name][k], expected[name], rtol=1e-9, atol=1e-11)


def test_sketch_is_linear_and_keeps_inner_products_on_average():
    parameters = {"a": torch.zeros(30, 20).double(), "b": torch.zeros(50).double()}
    u, v = ({n: randn(1, *p.shape, seed=s + i) for i, (n, p) in enumerate(parameters.items())} for s in (1, 5))
    flat = [torch.cat([g[n].reshape(-1) for n in parameters]) for g in (u, v)]
    products = []
    for seed in range(200):
        sketch = Sketch(parameters, 64, generator(seed))
        su, sv = sketch(u)[0], sketch(v)[0]
        assert torch.allclose(sketch({n: 2 * u[n] - v[n] for n in u})[0], 2 * su - sv)
        products.append([(su @ sv).item(), (su @ su).item()])
    mean, error = torch.tensor(products).mean(0), torch.tensor(products).std(0) / 200**0.5
    assert abs(mean[0] - flat[0] @ flat[1]) < 4 * error[0]
    assert abs(mean[1] - flat[0] @ flat[0]) < 4 * error[1]


@pytest.mark.parametrize("others_known", [True, False])
def test_two_candidates_have_the_closed_form(others_known):
    changes = torch.zeros(1, 2, 6)
    changes[0, 1] = randn(6).float()
    table = SubstitutionTable(changes, torch.tensor([[3, 4]]), 2)
    hits = substitution_hits(table, 0.8, 20_000, generator(), others_known=others_known)
    assert close(hits, phi(changes[0, 1].norm().item() / 0.8 / 2), 20_000)


def test_substitutions_that_do_not_interact_are_judged_one_by_one():
    changes = torch.zeros(3, 5, 12)
    for t in range(3):  # each position moves coordinates of its own
        changes[t, 1:, 4 * t : 4 * t + 4] = randn(4, 4, seed=t).float()
    table = SubstitutionTable(changes, torch.zeros(3, 5, dtype=torch.long), 15)
    known, joint = (substitution_hits(table, 1.0, 300, generator(), others_known=k) for k in (True, False))
    assert torch.equal(known, joint)
    assert 0.05 < known.double().mean() < 0.95


def test_coordinate_ascent_finds_the_likeliest_text_of_a_convex_pair():
    # Two positions, two candidates: where ascent from the truth stays, no single replacement is likelier.
    changes = torch.zeros(2, 2, 3)
    changes[0, 1], changes[1, 1] = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.9, -0.5, 0.2])
    table = SubstitutionTable(changes, torch.zeros(2, 2, dtype=torch.long), 4)
    hits = substitution_hits(table, 0.9, 400, generator(), others_known=False)
    noise = 0.9 * torch.randn(400, 3, generator=generator())
    for wrong, y in zip(~hits, noise, strict=True):
        at = sum(changes[t, 1] * wrong[t] for t in range(2))
        for t in range(2):
            flipped = at + changes[t, 1] * (1 - 2 * int(wrong[t]))
            assert (at - y).square().sum() <= (flipped - y).square().sum() + 1e-5
    assert 0 < (~hits).all(1).sum() < 400


def test_a_tie_with_the_truth_is_decided_by_lot():
    table = SubstitutionTable(torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.long), 4)
    hits = substitution_hits(table, 1.0, 8000, generator(), others_known=True)
    assert close(hits, 1 / 4, 8000)


# Real models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_problem_holds_the_private_block_of_the_dense_gram(problems, family):
    adapter, batch = problems.make(family, size=2)
    predictor = RecoveryPredictor(adapter, batch)
    dense = GradientJacobian(adapter, batch).to_dense()  # no special tokens here: all real tokens are private
    problem = predictor.problem
    rebuilt = problem.precision(1.0)
    assert torch.allclose(rebuilt, dense @ dense.T, rtol=1e-6, atol=1e-8 * rebuilt.abs().max())
    assert torch.equal(problem.table[problem.truth], problem.x)


@pytest.mark.parametrize("method", METHODS)
def test_prediction_has_one_probability_per_private_token(problems, method):
    adapter, batch = problems.make("bert")
    predictor = RecoveryPredictor(adapter, batch, candidates=12)
    rms = capture_gradient(adapter, batch).rms
    low, high = (predictor.predict(level * rms, method=method, draws=32) for level in (1e-6, 1e4))
    assert [len(p) for p in low.token_probability] == [len(t) for t in batch.token_ids]
    assert low.method == method
    assert (low.products, low.gradients) == ((240, 0) if METHODS[method].linear else (0, 15 * 12))
    assert low.assumes
    assert high.recall <= 0.4
    if method != "gaussian":  # the prior's mean has a nearest token too, and LayerNorm hides directions
        assert low.recall == 1.0
        assert low.recall_std_error == 0.0
    flat = torch.tensor([p for text in high.token_probability for p in text])
    assert flat.mean().item() == pytest.approx(high.recall, abs=1e-6)
    again = predict_recovery(adapter, batch, 1e4 * rms, method=method, candidates=12, draws=32)
    assert again == high


def test_the_last_token_shows_as_a_target_only(problems):
    adapter, batch = problems.make("gpt2", size=1)
    predictor = RecoveryPredictor(adapter, batch, candidates=60)
    small = 1e-6 * capture_gradient(adapter, batch).rms
    linear = predictor.predict(small, method="posterior-known", draws=64).token_probability[0]
    exact = predictor.predict(small, method="substitution", draws=64).token_probability[0]
    assert linear[:-1] == (1.0,) * 5
    assert linear[-1] < 0.2  # one guess among the vocabulary
    assert exact == (1.0,) * 6


def test_candidates_are_the_nearest_rows_and_the_truth_comes_first(problems):
    adapter, batch = problems.make("bert", size=1)
    nearest = RecoveryPredictor(adapter, batch, candidates=5).nearest()
    assert nearest[:, 0].tolist() == list(batch.token_ids[0])
    table = adapter.table()
    distance = (table - table[batch.token_ids[0][0]]).norm(dim=-1)
    distance[0] = math.inf  # the padding row is zero and no candidate
    assert set(nearest[0].tolist()) == set(distance.argsort()[:5].tolist())


def test_what_cannot_be_predicted_is_refused(problems, monkeypatch):
    adapter, batch = problems.make("bert", size=1)
    with pytest.raises(UnsupportedCombinationError, match="name the tokens outright"):
        RecoveryPredictor(adapter, batch, shared="all")
    with pytest.raises(ConfigError, match="at least 2 candidates"):
        RecoveryPredictor(adapter, batch, candidates=1)
    predictor = RecoveryPredictor(adapter, batch)
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite and positive"):
            predictor.predict(noise)
    with pytest.raises(ConfigError, match="draws >= 2"):
        predictor.predict(1.0, draws=1)
    with pytest.raises(ConfigError, match="substitution"):
        predictor.predict(1.0, method="substitutoin")
    monkeypatch.setattr(recovery, "COORDINATE_LIMIT", 10)
    with pytest.raises(UnsupportedCombinationError, match="dx = 96 exceeds 10"):
        predictor.predict(1.0, method="gaussian")
    monkeypatch.setattr(recovery, "TABLE_LIMIT", 10)
    with pytest.raises(UnsupportedCombinationError, match="fewer candidates"):
        predictor.predict(1.0, method="substitution")


def test_other_tasks_are_refused(problems):
    vision, images = problems.small_lenet()
    with pytest.raises(UnsupportedModelError, match="image-classification"):
        RecoveryPredictor(vision, images)
    from tests.families import IdTokenizer, build

    task, model = build("bert-mlm")
    adapter = adapt(model, tokenizer=IdTokenizer(), task=task)
    with pytest.raises(UnsupportedCombinationError, match="as a target only"):
        RecoveryPredictor(adapter, adapter.batch(["7 12 33"]))
