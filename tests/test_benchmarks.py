"""The benchmarks' own arithmetic: resumption, slopes, and the published algorithm they compare with."""

import argparse
import importlib
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import cases, product
from benchmarks.influence import PIECES, by_shape_and_length, cases_of, turned
from benchmarks.influence_scaling import log_log_slope
from benchmarks.reference import ParameterSpace, descent_step, parameter_space_lambda_max, plain_gradient
from lmleak import GradientJacobian, capture_gradient, load_adapter
from lmleak.adapters.load import MODEL_CLASSES
from tests.families import make

ROOT = cases.ROOT


def test_slopes_are_those_of_a_power_law_with_students_interval():
    sizes = [16, 32, 64, 128]
    assert log_log_slope(sizes, [3 * n**1.5 for n in sizes])[0] == pytest.approx(1.5)
    generator, hits = np.random.default_rng(0), 0
    for _ in range(400):
        costs = np.array(sizes) ** 0.7 * np.exp(0.1 * generator.normal(size=4))
        _, low, high = log_log_slope(sizes, costs)
        hits += low <= 0.7 <= high
    assert 0.92 <= hits / 400 <= 0.98


def options(**given):
    default = {"shapes": None, "lengths": None, "pieces": None, "all": False, "device": "cpu", "threads": 1}
    return argparse.Namespace(**default | given)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_of_a_plan_names_a_shape_that_exists(device):
    planned = cases_of(options(device=device))
    assert planned
    for case in planned:
        assert (ROOT / case["shape"]).is_file() or case["shape"].startswith("reference-")
        assert set(case["pieces"]) <= set(PIECES)
        assert device == "cuda" or len(case["tokens"]) == 1  # a process and a peak of its own
    everything = cases_of(options(all=True))
    assert {piece for case in everything for piece in case["pieces"]} == set(PIECES) - {"agreement"}


def test_measured_cases_are_not_measured_again(tmp_path, monkeypatch):
    """Only those of this commit and machine count; a torn line is passed over, a failed case said and left out."""
    output, case = tmp_path / "out.jsonl", {"tokens": 1}
    here = cases.provenance()
    row = {"figure": 1.0, "case": case, "provenance": here}
    other = row | {"provenance": here | {"commit": "other"}, "figure": 2.0}
    output.write_text(json.dumps(other) + "\n" + json.dumps(row) + "\n" + json.dumps(row)[:20])
    with cases.run_cases("no.such.module", [case], str(output)) as rows:
        assert rows == [row]
    shown = []
    with (
        pytest.raises(SystemExit, match="failed with status 1: tokens 2"),
        cases.run_cases("no.such.module", [case, {"tokens": 2}], str(output)) as rows,
    ):
        shown += rows
    assert shown == [row]  # before the program ends with status 1
    with cases.run_cases("no.such.module", [{"tokens": 2}], str(output), budget=-1) as rows:
        assert rows == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["influence", "--threads", "0"], ["influence", "--device", "tpu"], ["influence", "--shapes", "nope"],
        ["influence", "--lengths", "0"], ["product", "--shapes", "nope"], ["product", "--tokens", "0"],
        ["product", "--implementation", "foo"], ["product", "--repeats", "0"], ["block_products", "--counts", "0"],
        ["sensitivity", "--probes", "x"], ["descent_solve", "--scales", "0"], ["span", "--threads", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(arguments, monkeypatch, capsys):
    name, *rest = arguments
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 2
    assert rest[0] in capsys.readouterr().err


def test_the_page_marks_what_did_not_converge():
    rows = [
        {"shape": "a", "tokens": 8, "device": "cpu", "threads": 1, "damped_gradients": 80.0, "converged": False,
         "bound_seconds": 1.0, "bound_peak_gib": 1.0},
        {"shape": "a", "tokens": 8, "device": "cpu", "threads": 1, "eigsh_seconds": 60.0, "eigsh_peak_gib": 6.0},
        {"shape": "a", "tokens": 512, "device": "cpu", "threads": 1, "skipped": "at most 64 positions"},
    ]  # fmt: skip
    (merged,) = by_shape_and_length(rows)
    assert (merged["damped_cost"], merged["eigsh_speedup"], merged["eigsh_memory"]) == ("80*", 60, 6)
    titles, lines = turned([merged])
    assert titles == ["", "a, 8"]
    page = cases.markdown("Title", titles, lines, {"commit": "abc"}, "Notes.")
    assert "Generated: commit abc." in page
    assert "| damped I2F | 80* |" in page


def test_a_measure_that_failed_leaves_a_gap_in_its_own_row_only():
    def result(tokens, measure, **figures):
        return figures | {"case": {"measure": measure, "shape": "configs/models/a.yaml", "tokens": tokens}}

    gradient = {"gradient_allocated_mib": 10.0, "model_mib": 30.0}
    rows = product.by_shape_and_length([
        result(32, "gradient memory", **gradient), result(32, "memory", allocated_mib=20.0),  # its time failed
        result(128, "time", shape="a", gradient_seconds=2.0), result(128, "gradient memory", **gradient),
    ])  # fmt: skip
    first, second = ({key: value for key, value in row.items() if key != "case"} for row in rows)
    assert first == {"shape": "a", "tokens": 32, "allocated_mib": 20, "allocated_ratio": 1.25} | gradient
    assert second == {"shape": "a", "tokens": 128, "gradient_seconds": 2.0} | gradient


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_published_algorithm_is_written_right(family):
    adapter, batch = make(family)
    dense = GradientJacobian(adapter, batch, implementation="dense")
    space = ParameterSpace(adapter, batch)
    v = torch.randn(space.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = v * adapter.free(batch)
    gram = lambda b: space.matvec(space.rmatvec(b))
    torch.testing.assert_close(gram(v) * adapter.free(batch), dense.gram(v))
    matrix = dense.to_dense()
    top = torch.linalg.eigvalsh(matrix @ matrix.T)[-1].item()
    assert parameter_space_lambda_max(space) == pytest.approx(top, rel=1e-3)
    assert space.calls > 0
    flat = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float32)
    np.testing.assert_array_equal(space.gram(flat, grown=True), space.gram(flat))
    delta = [torch.ones_like(p) for p in space.parameters.values()]
    next_b, residual, misfit = descent_step(space, v, delta, 0.5)
    expected = gram(v) + 0.5 * v - space.matvec(delta)
    torch.testing.assert_close(next_b, v - 0.01 * expected)
    assert residual == pytest.approx(expected.norm().item())
    left = [p - 1 for p in space.rmatvec(next_b)]
    assert misfit == pytest.approx(torch.cat([p.flatten() for p in left]).norm().item())
    flat = torch.cat([g.flatten() for g in plain_gradient(adapter, batch)])
    captured = capture_gradient(adapter, batch).gradient
    norm = math.sqrt(sum(g.square().sum().item() for g in captured.values()))
    assert flat.norm().item() == pytest.approx(norm)


@pytest.mark.parametrize("name", ["gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_larger_shapes_are_gpt2s(name):
    import yaml
    from transformers import AutoConfig

    shape = yaml.safe_load((ROOT / "configs" / "models" / f"{name}.yaml").read_text())
    with torch.device("meta"):
        model = MODEL_CLASSES[shape["task"]].from_config(AutoConfig.for_model("gpt2", **shape["config"]))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx({"gpt2-medium": 354.8, "gpt2-large": 774.0, "gpt2-xl": 1557.6}[name], abs=0.1)


def test_another_width_and_depth_is_taken_from_the_shape():
    from benchmarks.influence_measures import load, random_batch

    adapter = load("configs/models/bert-base.yaml", 1, 64, "cpu")
    assert (adapter.config.num_hidden_layers, adapter.config.hidden_size) == (1, 64)
    batch = random_batch(load_adapter("reference-gpt2"), 2, 5)
    assert batch.inputs["input_ids"].shape == (2, 5)
