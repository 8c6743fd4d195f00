"""The study of shaped noise: its noise, the attacker who removes it, its report, and one tiny run."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from lmleak.adapters import adapt, image_model
from lmleak.config import parse_config
from lmleak.data.images import load_images
from lmleak.errors import ConfigError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, eigen_directions, spectral_noise
from lmleak.metrics import score_images

ROOT = Path(__file__).resolve().parents[2]
recipe, report, training, attackers = map(
    importlib.import_module, ("spectral_defense", "spectral_report", "private_training", "spectral_attackers")
)


@pytest.fixture(scope="module")
def problem():
    """An adapter in float64, its first digit, the true gradient, the directions, and ||g||."""
    data = load_images("digits", limit=20)
    normalization = data.normalization()
    model = image_model("lenet", data.image_shape, 10, seed=0).double()
    adapter = adapt(model, image_shape=data.image_shape, normalization=normalization)
    batch = adapter.batch(normalization.normalize(data.pixels[:1].double()), data.labels[:1])
    true = capture_gradient(adapter, batch, shared="all")
    directions = eigen_directions(GradientJacobian(adapter, batch, shared="all"))
    return adapter, batch, true, directions, true.rms * true.num_coordinates**0.5


def flat_of(gradient):
    return torch.cat([g.reshape(-1) for g in gradient.values()])


# Noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", ["isotropic", "spectral", "spectral-floor"])
def test_every_defense_has_the_same_expected_norm(problem, defense):
    _, _, true, directions, norm = problem
    shaped, std = recipe.noise_levels(directions.values, defense, 0.3 * norm, true.num_coordinates)
    assert shaped.square().sum() + true.num_coordinates * std**2 == pytest.approx((0.3 * norm) ** 2)


def test_gradients_and_jacobians_of_examples_are_those_of_the_toolkit(problem):
    adapter, batch, true, _, _ = problem
    flat = training.FlatGradients(adapter)
    x, y = adapter.input(batch), batch.targets
    assert torch.allclose(flat(x, y)[0], flat_of(true.gradient), rtol=1e-9, atol=1e-14)
    dense = GradientJacobian(adapter, batch, shared="all").to_dense()
    assert torch.allclose(flat.jacobians(x, y)[0], dense, rtol=1e-9, atol=1e-14)


def test_noise_in_training_has_the_levels_of_the_toolkit_along_each_direction(problem):
    adapter, batch, true, directions, norm = problem
    jacobian = training.FlatGradients(adapter).jacobians(adapter.input(batch), batch.targets)
    draws, generator = 400, torch.Generator().manual_seed(0)
    delta = torch.cat([
        recipe.shaped_noise(jacobian.expand(20, -1, -1), torch.full((20,), 0.02 * norm), "spectral",
                            true.num_coordinates, generator) for _ in range(draws // 20)
    ])  # fmt: skip
    expected = spectral_noise(directions, norm=0.02 * norm, prior_std=1.0).stds
    # J delta = U S c z, so that u_i^T J delta / s_i = c_i z_i
    along = (delta @ jacobian[0].T) @ directions.vectors / directions.singular_values
    measured = along.square().mean(0).sqrt()
    active = expected > 0
    assert 5 < active.sum() < len(expected)
    assert (measured[active] / expected[active] - 1).abs().max() < 0.2
    assert measured[~active].max() < 1e-6 * expected.max()
    assert delta.square().sum(1).mean().sqrt() == pytest.approx(0.02 * norm, rel=0.1)


# The attacker who knows where noise lies ----------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.01, 0.1])
def test_noise_in_the_row_space_is_removed_exactly(problem, level):
    """Whatever the first-order prediction says; in float32 releases, too."""
    adapter, batch, true, directions, norm = problem
    release = recipe.defended(directions, true, "spectral", level * norm, seed=3)
    assert spectral_noise(directions, norm=level * norm, prior_std=1.0).predicted_error.rms > 0.29
    found = attackers.RowSpaceAttack(iterations=30, restarts=2).run(adapter, release.shared, seed=5)
    assert found.stopped == "objective below tolerance"
    assert score_images(found, batch, adapter, release.shared).rmse < 1e-4


def test_isotropic_noise_is_not_removed(problem):
    adapter, batch, true, directions, norm = problem
    release = recipe.defended(directions, true, "isotropic", norm, seed=3)
    attack = attackers.RowSpaceAttack(iterations=10, restarts=1, prior_weight=norm**2 / true.num_coordinates)
    found = attack.run(adapter, release.shared, seed=5)
    assert score_images(found, batch, adapter, release.shared).rmse > 0.2


# The report -------------------------------------------------------------------------------------------------


def test_error_at_equal_accuracy_is_the_largest_that_costs_no_more():
    entry = lambda lost, rmse: {"lost": lost, "rmse": rmse}
    chosen = [entry(-0.01, 0.1), entry(0.02, 0.5), entry(0.06, 0.3), entry(0.1, 0.9)]
    assert report.at_equal_loss(chosen, 0.01) == pytest.approx(0.3)
    assert report.at_equal_loss(chosen, 0.06) == pytest.approx(0.5)
    assert report.at_equal_loss(chosen, 0.2) == pytest.approx(0.9)
    assert report.at_equal_loss(chosen[1:], 0.01) is None


def test_interval_is_students():
    mean, low, high = training.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.302652729911275 / 3**0.5))
    assert mean - low == pytest.approx(high - mean)


# The recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "spectral_defense").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(path):
    config = parse_config(recipe.SpectralDefenseConfig, ["--config", str(path)])
    assert config.output == f"runs/spectral_defense/{path.stem}"


@pytest.mark.parametrize(
    "arguments", [["--levels", "0"], ["--batch-size", "2"], ["--steps", "0"], ["--shared", "head"]]
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.SpectralDefenseConfig, arguments)


def test_a_tiny_run_gives_rows_tables_and_figures(tmp_path):
    arguments = [
        "--samples", "1", "--levels", "0.03", "--attack-iterations", "2", "--newton-iterations", "2",
        "--row-space-iterations", "1", "--row-space-restarts", "1", "--training-images", "20", "--test-images", "20",
        "--clients", "2", "--steps", "2", "--training-seeds", "1", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len([r for r in rows if r["kind"] == "leakage"]) == 4 + 2 * 6
    assert len([r for r in rows if r["kind"] == "utility"]) == 4
    table = list(csv.DictReader((tmp_path / "out" / "spectral_defense.csv").open()))
    assert {line["defense"] for line in table} == set(recipe.DEFENSES)
    assert {line["norm"] for line in table} == {table[0]["norm"]}
    for name in ("spectral_defense", "spectral_defense_images"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
