"""The scaling recipes: power laws with known exponents, settings, one tiny study, one tiny race of two processes."""

import importlib
import json

import numpy as np
import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation.run import REFUSED
from tests.launching import ROOT

CONFIGS = sorted((ROOT / "configs" / "scaling_study").glob("*.yaml"))


@pytest.fixture(scope="module")
def fits():
    return importlib.import_module("scaling_fits")


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("scaling_study")


@pytest.fixture(scope="module")
def throughput():
    return importlib.import_module("scaling_throughput")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_read_by_the_real_parser(study, throughput, path):
    config_class = throughput.ThroughputConfig if "throughput" in path.stem else study.ScalingConfig
    assert parse_config(config_class, ["--config", str(path)]).output.startswith("runs/scaling_")


def test_wrong_settings_are_refused(study, throughput):
    for arguments in (
        ["--shapes", "5x128", "5x256"], ["--shapes", "5x100", "5x128", "5x256"], ["--shapes", "x", "5x128", "5x256"],
        ["--noise-levels", "0"], ["--attack", "spam"], ["--max-length", "1000"], ["--seeds", "0"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(study.ScalingConfig, arguments)
    for arguments in (["--processes", "2"], ["--scaling", "odd"], ["--hardware", "none.yaml"], ["--repeats", "0"]):
        with pytest.raises(ConfigError):
            parse_config(throughput.ThroughputConfig, arguments)


def test_an_exact_power_law_is_found(fits):
    sizes = [1e6, 4e6, 15e6, 40e6]
    cells = np.exp(np.random.default_rng(0).normal(size=(1, 3, 5)))  # a factor of each seed and text, at every size
    values = 0.3 * (np.array(sizes) / 1e6)[:, None, None] ** -0.4 * cells / np.exp(np.log(cells).mean())
    law = fits.power_law(sizes, values, seed=0)
    assert law["exponent"] == pytest.approx(-0.4)
    assert law["at_1M"] == pytest.approx(0.3)
    assert (law["low"], law["high"]) == pytest.approx((-0.4, -0.4))  # factors common to all sizes cost no certainty
    assert law["sizes"] == 4


def test_the_interval_covers_the_exponent_as_often_as_it_says(fits, monkeypatch):
    """Independent noise per cell: a 95 % interval; the pigeonhole bootstrap is known to be somewhat wide."""
    monkeypatch.setattr(fits, "RESAMPLES", 200)
    sizes, generator, hits = np.array([1e6, 4e6, 16e6]), np.random.default_rng(1), 0
    for trial in range(60):
        values = (sizes / 1e6)[:, None, None] ** 0.25 * np.exp(0.2 * generator.normal(size=(3, 4, 6)))
        law = fits.power_law(sizes, values, seed=trial)
        hits += law["low"] <= 0.25 <= law["high"]
    assert hits >= 54


def test_missing_cells_are_left_out_and_too_few_sizes_give_nothing(fits):
    values = np.array([1.0, 2.0, 4.0])[:, None, None] * np.ones((3, 2, 2))
    values[1, 0, 0] = np.nan
    assert fits.power_law([1, 2, 4], values, seed=0)["exponent"] == pytest.approx(1)
    values[1] = np.nan
    law = fits.power_law([1, 2, 4], values, seed=0)
    assert (law["exponent"], law["sizes"]) == (None, 2)


def test_the_noise_of_half_recall_follows_its_law(fits):
    """Recall falls from 1 to 0 over a decade around 2 N: the crossing is at 2 N, and its exponent 1."""
    sizes, levels = [1.0, 2.0, 4.0], np.geomspace(0.1, 100, 61)
    recall = np.array([np.clip(0.5 - np.log10(levels / (2 * n)), 0, 1) for n in sizes])
    assert [fits.crossing(levels, line) for line in recall] == pytest.approx([2, 4, 8])
    cells = np.broadcast_to(recall[:, None, None], (3, 2, 2, 61)).copy()
    law = fits.power_law(sizes, cells, seed=0, reduce=lambda r: fits.crossing(levels, r))
    assert law["exponent"] == pytest.approx(1)
    assert np.isnan(fits.crossing([1, 2], [0.9, 0.8]))
    assert np.isnan(fits.crossing([1, 2], [0.2, 0.1]))


def test_shapes_have_the_parameters_that_they_are_named_for(study):
    """12 L w^2 and the biases and norms, embeddings aside."""
    adapter = study.adapter_of("2x64", 0, "cpu")
    count = sum(p.numel() for n, p in adapter.parameters().items() if n not in study.EMBEDDINGS)
    assert count == 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    other = study.adapter_of("2x64", 1, "cpu")
    assert adapter.weights_digest() != other.weights_digest()


@pytest.mark.slow
def test_a_tiny_study_gives_rows_laws_and_a_figure(study, tmp_path):
    arguments = [
        "--shapes", "1x64", "2x64", "2x128", "--seeds", "1", "--samples", "2", "--max-length", "5",
        "--noise-levels", "0.1", "1000", "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert study.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["shape"] for row in rows] == ["1x64", "2x64", "2x128"] * 2
    for row in rows:
        assert 0 < row["lower_bound"] <= row["cg_bound"]
        assert row["clean_recall"] == 1.0
        assert row["recall"]["0.1"] >= row["recall"]["1000"]
    laws = (tmp_path / "out" / "laws.csv").read_text().splitlines()
    assert laws[0] == "quantity,unit,exponent,low,high,at_1M,sizes"
    assert any(line.startswith("I_lb at noise 1,embedding spread,-0.") for line in laws)  # larger models are riskier
    assert (tmp_path / "out" / "laws.png").stat().st_size > 10_000


WORK = ["--samples", "4", "--steps", "10", "--max-length", "5", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_race_and_agree_bit_for_bit(throughput, tmp_path, monkeypatch):
    """Of one process the results are there already, as of an interrupted race: two are launched."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    alone = tmp_path / "examples" / "strong-1-0"
    assert importlib.import_module("scaling_worker").main([*WORK, "--output", str(alone)]) == 0
    race = ["--scaling", "strong", "--repeats", "1", "--output", str(tmp_path)]
    assert throughput.main([*WORK, *race]) == 0
    lines = (tmp_path / "throughput-examples.csv").read_text().splitlines()
    entries = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [entry["processes"] for entry in entries] == ["1", "2"]
    assert all(entry["identical"] == "True" and float(entry["rate"]) > 0 for entry in entries)
    times = json.loads((tmp_path / "examples" / "strong-2-0" / "timing.json").read_text())
    assert all(process["done"] for process in times)  # both really worked
    assert throughput.main([*WORK, *race, "--seed", "9"]) == REFUSED  # what is there was measured at another seed


@pytest.mark.parametrize("split", ["examples", "probes", "restarts"])
def test_more_work_of_two_processes_is_compared_with_one_that_does_all_of_it(throughput, monkeypatch, split):
    """Examples each have a row; probes and restarts share one, which depends on how many there are."""
    asked, wrong = [], set()

    def launch(config, name, samples, processes):
        asked.append((samples, processes))
        rows = [f"example {i}" for i in range(samples)] if split == "examples" else [f"all {samples}"]
        times = [{"started": 0, "began": 1, "ended": 2, "worked": 1, "gathered": 2, "done": 1}] * processes
        return {
            "samples": samples,
            "times": times,
            "rows": [*rows[:-1], "wrong"] if (samples, processes) in wrong else rows,
        }

    monkeypatch.setattr(throughput, "launch", launch)
    config = throughput.ThroughputConfig(split=split, samples=4, repeats=2)
    assert [e["identical"] for e in throughput.entries_of(config)] == [True] * 4
    assert (8, 1) in asked
    for processes in ((4, 2), (8, 2)):
        wrong.add(processes)
    assert [e["identical"] for e in throughput.entries_of(config)] == [True, False, True, False]


@pytest.mark.parametrize("split", ["examples", "probes"])
def test_a_folder_of_other_settings_is_refused(tmp_path, split, capsys):
    worker = importlib.import_module("scaling_worker")
    arguments = [*WORK, "--samples", "2", "--split", split, "--output", str(tmp_path / "out")]
    assert worker.main(arguments) == 0
    kept = (tmp_path / "out" / "results.jsonl").read_text()
    for other in (["--seed", "7"], ["--steps", "5"], ["--max-length", "4"]):
        assert worker.main([*arguments, *other]) == REFUSED
        assert "different configuration" in capsys.readouterr().err
    assert worker.main([*arguments, "--threads", "1"]) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == kept


@pytest.mark.parametrize(
    ("split", "counted", "least"), [("probes", "products", 4 * 10), ("restarts", "gradients", 4 * 20)]
)
def test_work_on_one_text_says_what_it_did_and_when(tmp_path, split, counted, least):
    """That two processes give the numbers of one is shown in tests/evaluation/test_split.py."""
    assert importlib.import_module("scaling_worker").main([*WORK, "--split", split, "--output", str(tmp_path)]) == 0
    (found,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert found[counted] >= least
    assert found[counted] % 4 == 0
    assert all(np.all(np.isfinite(value)) for name, value in found.items() if name != "key")
    (times,) = json.loads((tmp_path / "timing.json").read_text())
    assert times["done"] == 1
    assert 0 < times["worked"] <= times["ended"] - times["began"] + 1e-6
    assert times["started"] <= times["began"] <= times["ended"] <= times["gathered"]
