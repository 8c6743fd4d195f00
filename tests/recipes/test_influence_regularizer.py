"""The study of the penalty on leakage: the penalty, the clients' releases, its report, and one tiny run."""

import csv
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from lmleak.adapters import adapt, image_model
from lmleak.config import parse_config
from lmleak.data.images import load_images
from lmleak.defenses.privacy import epsilon
from lmleak.errors import ConfigError
from lmleak.influence import GradientJacobian

ROOT = Path(__file__).resolve().parents[2]
recipe, report, training = map(
    importlib.import_module, ("influence_regularizer", "regularizer_report", "private_training")
)


def small(model="lenet", count=6):
    data = load_images("digits", limit=20)
    network = image_model(model, data.image_shape, 10, seed=0).double()
    adapter = adapt(network, image_shape=data.image_shape, normalization=data.normalization())
    (part,) = training.splits(adapter, data, 0, [count], 0)
    return adapter, part


# The penalty ------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_log_of_the_mean_square_of_j_v():
    adapter, public = small(count=3)
    flat = training.FlatGradients(adapter)
    probe = torch.randn(flat.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, value = recipe.penalty_gradient(flat, public, probe)
    squares = []
    for i in range(3):
        batch = adapter.batch(public.images[i : i + 1], public.labels[i : i + 1])
        squares.append((GradientJacobian(adapter, batch, shared="all").to_dense() @ probe).square().sum().item())
    assert value == pytest.approx(math.log(sum(squares) / 3), rel=1e-10)


def test_its_gradient_is_that_of_finite_differences():
    adapter, public = small(count=3)
    flat = training.FlatGradients(adapter)
    generator = torch.Generator().manual_seed(1)
    probe, direction = (torch.randn(flat.size, generator=generator, dtype=torch.float64) for _ in range(2))
    slope, _ = recipe.penalty_gradient(flat, public, probe)

    def value_at(step):
        parts = direction.split([p.numel() for p in flat.parameters.values()])
        with torch.no_grad():
            for p, part in zip(flat.parameters.values(), parts, strict=True):
                p.add_(step * part.reshape(p.shape))
        found = recipe.penalty_gradient(flat, public, probe)[1]
        with torch.no_grad():
            for p, part in zip(flat.parameters.values(), parts, strict=True):
                p.sub_(step * part.reshape(p.shape))
        return found

    measured = (value_at(1e-6) - value_at(-1e-6)) / 2e-6
    assert measured == pytest.approx(torch.dot(slope, direction).item(), rel=1e-5)


def test_the_penalty_lowers_the_trace_down_to_its_budget():
    """Training by the penalty alone, on its own images."""
    adapter, public = small(count=6)
    flat = training.FlatGradients(adapter)
    generator = torch.Generator().manual_seed(2)
    trace = lambda: flat.jacobians(public.images, public.labels).square().sum((1, 2)).mean().log().item()
    before = trace()
    probe = lambda: torch.randn(flat.size, generator=generator, dtype=torch.float64)
    training.train(adapter, lambda f, _: recipe.penalty_gradient(f, public, probe())[0], steps=30, learning_rate=0.01)
    assert trace() < before - 1


# Releases ---------------------------------------------------------------------------------------------------


def test_the_mean_release_is_that_of_poisson_draws():
    """No noise to speak of: the sum of the drawn gradients, clipped in the arm of DP-SGD, over the clients."""
    config = recipe.RegularizerConfig(training_images=6, clients=2, public_images=2, public_batch=1, max_norm=0.5)
    adapter, private = small(count=6)
    flat = training.FlatGradients(adapter)
    each = flat(private.images, private.labels)
    drawn = torch.rand(6, generator=training.generator_of(4, recipe.DRAWS)) < 1 / 3
    assert 0 < drawn.sum() < 6
    plain = recipe.server_update(config, "noise", 1e-12, private, private, 4)(flat, 0)
    assert torch.allclose(plain, each[drawn].sum(0) / 2, atol=1e-9)
    clipped = recipe.server_update(config, "dp", 1e-12, private, private, 4)(flat, 0)
    scaled = each[drawn] * (0.5 / each[drawn].norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(clipped, scaled.sum(0) / 2, atol=1e-9)
    assert (clipped - plain).norm() > 0.1


def test_the_penalty_acts_above_its_budget_only():
    config = recipe.RegularizerConfig(training_images=6, clients=2, public_images=2, public_batch=2)
    adapter, private = small(count=6)
    flat = training.FlatGradients(adapter)
    step = lambda arm, strength: recipe.server_update(config, arm, strength, private, private, 4)(flat, 0)
    noise = step("noise", config.regularized_std)
    assert torch.equal(step("regularizer", 100.0), noise)
    assert (step("regularizer", -100.0) - noise).norm() > 1e-3


def test_epsilon_is_that_of_every_release_of_a_training():
    pytest.importorskip("opacus")
    config = recipe.RegularizerConfig()
    assert config.epsilon("noise", 0.1) == math.inf
    expected = epsilon(1.0, sample_rate=1 / 62, steps=config.steps, delta=config.delta)
    assert config.epsilon("dp", 1.0) == expected


# The report -------------------------------------------------------------------------------------------------


def test_gain_is_paired_with_noise_at_equal_accuracy():
    row = lambda arm, strength, number, accuracy, error: {
        "arm": arm, "strength": strength, "number": number, "accuracy": accuracy, "predicted": [error]
    }  # fmt: skip
    rows = []
    for number, shift in ((0, 0.0), (1, 0.1)):
        rows += [row("noise", 0.1, number, 0.9, 0.1), row("noise", 1.0, number, 0.7, 0.5)]
        rows += [row("regularizer", 0.0, number, 0.8, 0.4 + shift)]
    rows += [row("regularizer", 9.0, 0, 0.95, 0.2)]  # noise never was so accurate
    (gain,) = report.paired_gain(rows)
    assert (gain["budget"], gain["trainings"]) == (0.0, 2)
    assert gain["gain"] == pytest.approx(0.15)
    assert gain["low"] < 0.15 < gain["high"]


def test_each_image_is_judged_by_its_strongest_attack():
    attacks = {"gs": [0.2, None], "gauss-newton": [0.3, 0.4], "lost": [None, None]}
    row = {"arm": "noise", "strength": 1.0, "std": 1.0, "accuracy": 0.5, "predicted": [0.1], "relative": [0.1],
           "gradient_rms": [1.0], "attacks": attacks}  # fmt: skip
    (entry,) = report.entries_of([row, row], {("noise", 1.0): math.inf})
    assert entry["rmse"] == pytest.approx(0.3)


# The recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "influence_regularizer").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_configuration_is_read_by_the_real_parser(path):
    config = parse_config(recipe.RegularizerConfig, ["--config", str(path)])
    assert config.output == f"runs/influence_regularizer/{path.stem}"
    assert config.regularized_std in config.noise_stds  # what the regulariser adds is seen against the same noise


@pytest.mark.parametrize("arguments", [
    ["--noise-stds", "0"], ["--budgets", "inf"], ["--penalty", "0"], ["--batch-size", "2"], ["--public-batch", "900"]
])  # fmt: skip
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.RegularizerConfig, arguments)


def test_a_tiny_run_gives_rows_table_and_figure(tmp_path):
    pytest.importorskip("opacus")
    arguments = [
        "--samples", "1", "--noise-stds", "0.01", "--budgets", "1", "--noise-multipliers", "0.01", "0.1",
        "--attack-iterations", "2", "--newton-iterations", "2", "--training-images", "20", "--test-images", "20",
        "--public-images", "4", "--public-batch", "2", "--clients", "2", "--steps", "2", "--training-seeds", "1",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["noise", "regularizer", "dp", "dp"]
    table = list(csv.DictReader((tmp_path / "out" / "influence_regularizer.csv").open()))
    assert [line["epsilon"] == "inf" for line in table] == [True, True, False, False]
    assert (tmp_path / "out" / "influence_regularizer.png").stat().st_size > 10_000
