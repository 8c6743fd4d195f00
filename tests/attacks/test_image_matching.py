"""Gradient matching for images: recovery, the objective by hand, restarts, and what every attack promises."""

import gzip
import math
import random
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lmleak
from lmleak.adapters import LeNet, adapt
from lmleak.attacks import IMAGE_ATTACKS, make_attack
from lmleak.attacks.image_base import ImageProblem
from lmleak.attacks.image_matching import Attempt, ImageDLG, ImageGS, total_variation
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError, UnsupportedModelError
from lmleak.types import Aggregation, Batch, ImageReconstruction, Normalization, Observation
from tests.families import make

SIDE = 12
STEPS = Aggregation(steps_per_epoch=2, learning_rate=1e-2)


@pytest.fixture(params=["dlg", "gs"])
def name(request):
    return request.param


def pixels(size: int = 1, side: int = SIDE, seed: int = 0):
    return torch.rand(size, 1, side, side, generator=torch.Generator().manual_seed(seed)).double()


def case(size: int = 1, *, dtype=torch.float32, side: int = SIDE, **keywords):
    """Return an adapter, a batch with labels 3, 5, ..., and its gradient."""
    adapter = adapt(LeNet(size=side).to(dtype))
    batch = adapter.batch(pixels(size, side), [3, 5, 7, 9][:size])
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared="all", **keywords)


def smooth(size: int = 1, side: int = SIDE):
    """Blurred noise between 0 and 1, whose total variation is small."""
    x = F.avg_pool2d(pixels(size, side + 4, seed=5), 5, stride=1)
    return (x - x.min()) / (x.max() - x.min())


def psnr(recovered, truth, normalization=None):
    normalization = normalization or Normalization()
    error = normalization.pixels(recovered.double()) - normalization.pixels(truth.double())
    return -10 * math.log10(error.square().mean().item())


def problem_of(adapter, shared, **keywords):
    return ImageProblem(adapter, shared.observation(lengths=False, labels=True), shared.labels, **keywords)


# Recovery ---------------------------------------------------------------------------------------------------


def test_dlg_recovers_the_pixels():
    adapter, batch, shared = case(dtype=torch.float64)
    recovered = lmleak.run_attack("dlg", adapter, shared, iterations=600)
    assert recovered.objective < 1e-6
    assert psnr(recovered.images, batch.inputs["pixel_values"]) > 35
    (note,) = recovered.notes
    assert "the gradient was matched" in note


def test_gs_recovers_a_smooth_image():
    adapter = adapt(LeNet(size=SIDE))
    batch = adapter.batch(smooth(), [3])
    shared = lmleak.capture_gradient(adapter, batch, shared="all")
    recovered = lmleak.run_attack("gs", adapter, shared, iterations=400)
    assert psnr(recovered.images, batch.inputs["pixel_values"]) > 30
    assert recovered.images.min() >= 0
    assert recovered.images.max() <= 1
    assert recovered.labels.tolist() == [3]


def test_gs_stays_in_the_box_of_the_normalisation():
    normalization = Normalization((0.13,), (0.31,))
    adapter = adapt(LeNet(size=SIDE), normalization=normalization)
    batch = adapter.batch(normalization.normalize(smooth()), [3])
    shared = lmleak.capture_gradient(adapter, batch, shared="all")
    for iterations in (1, 20):
        recovered = lmleak.run_attack("gs", adapter, shared, iterations=iterations)
        shown = normalization.pixels(recovered.images)
        assert shown.min() == pytest.approx(0, abs=1e-6)
        assert 0.5 < shown.max() <= 1 + 1e-6


def test_idlg_needs_no_labels():
    adapter, batch, _ = case(dtype=torch.float64)
    silent = lmleak.capture_gradient(adapter, batch, shared="all", reveal_labels=False)
    recovered = lmleak.run_attack("lbfgs", adapter, silent, labels="inferred", iterations=300)
    assert recovered.labels.tolist() == [3]
    assert psnr(recovered.images, batch.inputs["pixel_values"]) > 35
    assert "class labels [3] were inferred (read off 'fc.bias')" in recovered.notes


def test_a_batch_is_recovered_jointly_in_some_order():
    adapter, batch, shared = case(2, dtype=torch.float64)
    recovered = lmleak.run_attack("lbfgs", adapter, shared, labels="inferred", iterations=600)
    truth = batch.inputs["pixel_values"]
    assert recovered.labels.tolist() == [3, 5]
    assert max(psnr(recovered.images, truth), psnr(recovered.images, truth.flip(0))) > 30


@pytest.mark.parametrize("name", ["gs", "lbfgs"])
def test_the_update_of_two_local_steps_is_matched(name):
    adapter, batch, shared = case(2, dtype=torch.float64, aggregation=STEPS)
    recovered = lmleak.run_attack(name, adapter, shared, iterations=200 if name == "lbfgs" else 30)
    guess = lmleak.run_attack(name, adapter, shared, iterations=1)
    assert recovered.objective < 0.1 * guess.objective
    if name == "lbfgs":
        assert psnr(recovered.images, batch.inputs["pixel_values"]) > 25


def test_noisy_gradients_are_accepted_and_said_to_be_unmatched():
    adapter, _, shared = case()
    noisy = lmleak.defenses.GaussianNoise(std=10 * shared.rms, seed=1)(shared)
    recovered = lmleak.run_attack("dlg", adapter, noisy, iterations=20)
    assert any("was not matched" in note for note in recovered.notes)


def test_a_small_objective_that_any_image_reaches_is_said_to_be_unmatched():
    """The gradient of a sigmoid LeNet depends little on the image: a grey one already has an objective below 0.1."""
    adapter, batch, shared = case(dtype=torch.float64)
    stuck = lmleak.run_attack("gs", adapter, shared, iterations=5)
    assert stuck.objective < 0.1
    assert any("was not matched" in note for note in stuck.notes)
    found = lmleak.run_attack("lbfgs", adapter, shared, iterations=300)
    assert psnr(found.images, batch.inputs["pixel_values"]) > 40
    (note,) = found.notes
    assert "the gradient was matched" in note
    assert "does not prove" in note


def test_what_is_left_of_a_guess_s_error_is_that_of_the_formula():
    adapter, _, shared = case(dtype=torch.float64)
    problem, x = problem_of(adapter, shared), pixels(seed=5)
    a = torch.cat([g.flatten() for g in lmleak.capture_gradient(adapter, adapter.batch(x, [3])).gradient.values()])
    b = torch.cat([g.flatten() for g in shared.gradient.values()])
    before = problem.evaluations
    assert problem.distance(x.double()) == pytest.approx(1 - float(a @ b / (a.norm() * b.norm())), rel=1e-9)
    guesses = problem.guesses()
    assert all(((g >= problem.low) & (g <= problem.high)).all() for g in guesses)
    best = min(guesses, key=problem.distance)
    (note,) = problem.match_notes(best)
    assert "not matched: 1 of a guess's error" in note
    assert problem.evaluations == before  # what is said of a result is no part of the attack's cost


def test_a_gradient_that_tells_nothing_is_said_to_be_unmatched():
    adapter, _, shared = case()
    nothing = replace(shared, gradient={n: torch.zeros_like(g) for n, g in shared.gradient.items()})
    problem = problem_of(adapter, nothing)
    assert problem.distance(pixels().float()) == 1
    assert problem.distance(pixels().float() * math.nan) == math.inf
    assert "was not matched" in problem.match_notes(pixels().float())[0]


def test_pruned_gradients_are_compared_where_they_say_something():
    adapter, batch, shared = case(dtype=torch.float64)
    pruned = lmleak.defenses.parse_defense("prune(ratio=0.5)")(shared)
    problem = problem_of(adapter, pruned)
    assert sum(int(k.sum()) for k in problem.kept.values()) <= 0.51 * shared.num_coordinates
    truth = problem.gradient(batch.inputs["pixel_values"])
    assert ImageDLG().make_objective(problem)(truth).item() < 1e-24
    assert ImageDLG().make_objective(problem_of(adapter, pruned, mask_zeros=False))(truth).item() > 1e-6
    aware = lmleak.run_attack("lbfgs", adapter, pruned, iterations=300)
    naive = lmleak.run_attack("lbfgs", adapter, pruned, iterations=300, mask_zeros=False)
    truth = batch.inputs["pixel_values"]
    assert psnr(aware.images, truth) > psnr(naive.images, truth)


@pytest.mark.slow
def test_gs_beats_the_public_implementation_on_mnist(real_data):
    raw = gzip.decompress((real_data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((real_data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    adapter, found = adapt(LeNet()), []
    for i in range(2):
        start = 16 + 784 * i
        digit = torch.tensor(list(raw[start : start + 784])).reshape(1, 1, 28, 28).double() / 255
        shared = lmleak.capture_gradient(adapter, adapter.batch(digit, [labels[8 + i]]), shared="all")
        recovered = lmleak.run_attack("gs", adapter, shared, iterations=500)
        found.append(psnr(recovered.images, digit))
    assert min(found) >= 23.4  # reached: 53.5 and 50.9


# The pieces -------------------------------------------------------------------------------------------------


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]]])
    assert total_variation(x).item() == (1 + 4) / 2 + (3 + 6) / 2


def test_objectives_by_hand():
    adapter, _, shared = case(dtype=torch.float64)
    problem = problem_of(adapter, shared)
    x = pixels(seed=9)
    flat, target = (
        torch.cat([g.flatten() for g in part.values()]) for part in (problem.gradient(x), problem.observed)
    )
    gradient = problem.gradient(x)
    assert ImageDLG().make_objective(problem)(gradient).item() == pytest.approx(
        ((flat - target).norm() / target.norm()).item() ** 2
    )
    assert ImageGS().make_objective(problem)(gradient).item() == pytest.approx(
        1 - F.cosine_similarity(flat, target, 0).item()
    )
    assert problem.evaluations == 2


def test_gradient_is_that_of_the_captured_batch():
    adapter, batch, shared = case(4, dtype=torch.float64)
    problem = problem_of(adapter, shared)
    gradient = problem.gradient(batch.inputs["pixel_values"])
    assert all(torch.allclose(gradient[n], g, rtol=1e-10, atol=1e-14) for n, g in shared.gradient.items())


def test_slopes_are_the_derivatives_alone_and_together(name):
    adapter, _, shared = case(dtype=torch.float64)
    problem = problem_of(adapter, shared)
    objective = IMAGE_ATTACKS[name]().make_objective(problem)

    def distance(gradient, x):
        return objective(gradient) + 0.1 * total_variation(x)

    guesses = torch.stack([pixels(seed=s) for s in (7, 8)])
    values, slopes = problem.slopes(guesses, distance)
    assert problem.evaluations == 6
    problem.together = 1
    alone = problem.slopes(guesses, distance)
    assert torch.allclose(values, alone[0], rtol=1e-12)
    assert torch.allclose(slopes, alone[1], rtol=1e-9, atol=1e-12)
    direction, step = torch.randn(guesses.shape, generator=torch.Generator().manual_seed(0)).double(), 1e-6
    ahead, behind = (problem.slopes(guesses + sign * step * direction, distance)[0] for sign in (1, -1))
    along = (slopes * direction).flatten(1).sum(1)
    assert torch.allclose(along, (ahead - behind) / (2 * step), rtol=1e-5)


def test_restarts_together_equal_one_by_one(name, monkeypatch):
    adapter, _, shared = case(2, dtype=torch.float64)
    together = lmleak.run_attack(name, adapter, shared, iterations=15, restarts=3)
    monkeypatch.setattr("lmleak.attacks.image_base.GRADIENT_NUMBERS", 1)
    one_by_one = lmleak.run_attack(name, adapter, shared, iterations=15, restarts=3)
    assert torch.allclose(together.images, one_by_one.images, rtol=1e-6, atol=1e-8)
    assert together.objective == pytest.approx(one_by_one.objective)
    assert together.cost.gradient_evaluations == one_by_one.cost.gradient_evaluations == 3 * 3 * 15
    assert together.cost.iterations == 3 * 15


def test_more_restarts_never_end_higher(name):
    adapter, _, shared = case(dtype=torch.float64)
    one, many = (lmleak.run_attack(name, adapter, shared, iterations=15, restarts=r) for r in (1, 4))
    assert many.objective <= one.objective * (1 + 1e-9)


def test_the_best_iterate_is_kept_and_the_reason_said():
    options = ImageDLG(iterations=50, patience=3, loss_tolerance=1e-3)
    attempt, x = Attempt(torch.zeros(1)), torch.arange(9.0)
    for i, value in enumerate([3.0, 1.0, 2.0, 2.0, 2.0]):
        attempt.see(value, x[i : i + 1], options)
    assert (attempt.images.item(), attempt.objective) == (1.0, 1.0)
    assert attempt.stopped == "no improvement for 3 iterations"
    matched = Attempt(torch.zeros(1))
    matched.see(1e-4, x[:1], options)
    assert matched.stopped == "objective below tolerance"
    broken = Attempt(torch.zeros(1))
    broken.see(math.nan, x[:1], options)
    assert broken.stopped == "objective became nan at iteration 0"


def test_patience_is_counted_from_the_last_fall_of_the_learning_rate():
    adapter, _, shared = case()
    steps = lmleak.run_attack("gs", adapter, shared, iterations=16, patience=1)
    assert 14 < steps.cost.iterations <= 16  # 7/8 of 16, and one more at least


def test_signs_are_followed_always_late_or_never():
    """One step of Adam on a sign moves every pixel by the learning rate; before the switch, late is never."""
    adapter, _, shared = case()

    def images(signs, iterations):
        found = lmleak.run_attack("gs", adapter, shared, iterations=iterations, signs=signs, init_scale=0.0)
        return found.images

    always, late, never = (images(signs, 8) for signs in ("always", "late", "never"))
    assert not torch.equal(always, never)
    assert not torch.equal(late, never)
    assert torch.equal(images("late", 1), images("never", 1))
    with pytest.raises(ConfigError, match="Did you mean 'always'"):
        make_attack("gs", task="image-classification", signs="alway")


def test_adam_starts_anew_where_signs_begin(monkeypatch):
    """Derivatives of 1e-6 leave averages that would make the first steps on signs several times too long."""
    adapter, batch, shared = case(dtype=torch.float64)
    problem = ImageGS().problem(adapter, shared.observation(lengths=False, labels=True), seed=0)
    seen = []

    def slopes(guesses, distance):
        seen.append(guesses.clone())
        return torch.zeros(1, dtype=torch.float64), torch.full_like(guesses, 1e-6)

    monkeypatch.setattr(problem, "slopes", slopes)
    attack = ImageDLG(iterations=8, learning_rate=0.1)
    attack._adam(problem, None, [Attempt(torch.zeros_like(batch.inputs["pixel_values"]))], signs_from=0.5)
    steps = torch.stack(seen).diff(dim=0).abs()
    assert torch.allclose(steps[4:], torch.full_like(steps[4:], 0.1), rtol=1e-5)


# Promises ---------------------------------------------------------------------------------------------------


def test_names_agree_and_a_paper_is_cited(name):
    attack = IMAGE_ATTACKS[name]
    assert attack.name == name
    assert "arXiv" in attack.paper
    assert attack.assumes.tasks == ("image-classification",)
    assert not make_attack(name, task="image-classification", labels="inferred").assumes.labels


def test_same_seed_same_images_and_global_randomness_untouched(name):
    adapter, _, shared = case()
    before = torch.get_rng_state(), random.getstate()
    first, second, other = (lmleak.run_attack(name, adapter, shared, iterations=5, seed=s) for s in (3, 3, 4))
    assert isinstance(first, ImageReconstruction)
    assert first.images.shape == (1, 1, SIDE, SIDE)
    assert first.cost.seconds > 0
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_model_and_gradient_are_left_alone(name):
    model = LeNet(size=SIDE).train()
    adapter = adapt(model)
    shared = lmleak.capture_gradient(adapter, adapter.batch(pixels(), [3]), shared="all")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradient = {n: g.clone() for n, g in shared.gradient.items()}
    lmleak.run_attack(name, adapter, shared, iterations=5, restarts=2, labels="inferred")
    assert model.training
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n])
        assert p.grad is None
        assert p.requires_grad
    assert all(torch.equal(shared.gradient[n], g) for n, g in gradient.items())
    assert not any(m._forward_hooks for m in adapter.model.modules())


def test_only_what_is_assumed_is_handed_over(name, monkeypatch):
    adapter, _, shared = case()
    seen = []

    def spy(self, adapter, observation, *, seed):
        seen.append(observation)
        return ImageReconstruction(name, pixels(), None, lmleak.types.AttackCost(0.0), stopped="spied")

    monkeypatch.setattr(IMAGE_ATTACKS[name], "recover", spy)
    for labels in ("given", "inferred"):
        lmleak.run_attack(name, adapter, shared, labels=labels)
    given, inferred = seen
    assert type(given) is type(inferred) is Observation
    assert not isinstance(given, Batch)
    assert given.labels.tolist() == [3]
    assert inferred.labels is None


def test_poisoned_truth_changes_nothing(name):
    adapter, _, shared = case()
    honest = lmleak.run_attack(name, adapter, shared, iterations=5, labels="inferred")
    fresh, _, _ = case()
    fresh.batch(pixels(seed=99), [0])  # what it saw last is a lie
    told = replace(shared, labels=torch.tensor([0]))
    assert torch.equal(lmleak.run_attack(name, fresh, told, iterations=5, labels="inferred").images, honest.images)


def test_a_part_of_the_parameters_is_enough_to_run(name):
    adapter, batch, _ = case()
    head = lmleak.capture_gradient(adapter, batch, shared="^fc")
    assert lmleak.run_attack(name, adapter, head, iterations=3).images.isfinite().all()


# Refusals ---------------------------------------------------------------------------------------------------


def test_labels_neither_given_nor_inferable(name):
    adapter, batch, _ = case()
    silent = lmleak.capture_gradient(adapter, batch, shared="^body", reveal_labels=False)
    with pytest.raises(UnsupportedCombinationError, match="write labels='inferred'"):
        lmleak.run_attack(name, adapter, silent)
    with pytest.raises(UnsupportedCombinationError, match="cannot infer the class labels: the gradient of the last"):
        lmleak.run_attack(name, adapter, silent, labels="inferred")
    adapter, _, mixed = case(2, aggregation=STEPS, reveal_labels=False)
    with pytest.raises(UnsupportedCombinationError, match="which image of which local step"):
        lmleak.run_attack(name, adapter, mixed, labels="inferred")


def test_a_text_model_is_refused(name):
    adapter, batch = make("bert", size=1, dtype=torch.float32)
    shared = lmleak.capture_gradient(adapter, batch)
    with pytest.raises(UnsupportedCombinationError, match="works on image-classification"):
        IMAGE_ATTACKS[name]().run(adapter, shared)


def test_a_model_of_unknown_images_is_refused(name):
    adapter = adapt(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))
    shared = lmleak.capture_gradient(adapter, adapter.batch(pixels(), [1]), shared="all")
    with pytest.raises(UnsupportedModelError, match="image_shape="):
        lmleak.run_attack(name, adapter, shared)


def test_the_gradient_of_another_model_is_refused(name):
    _, _, shared = case()
    with pytest.raises(DataError):
        lmleak.run_attack(name, adapt(LeNet(size=SIDE, num_classes=3)), shared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be an integer of at least 1"),
        ({"restarts": True}, "restarts must be"),
        ({"tv": -1.0}, "tv must be a number from 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"labels": "guessed"}, "unknown labels 'guessed'"),
        ({"mask_zeros": "yes"}, "mask_zeros must be True, False or 'auto'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        IMAGE_ATTACKS[name](**options)


def test_unknown_option():
    option = fields(ImageGS)[0].name
    with pytest.raises(ConfigError, match=f"Did you mean '{option}'"):
        make_attack("gs", task="image-classification", **{option[:-1] + "_": 1})
