"""``lmleak layers``: what it reads, writes, resumes and refuses."""

import csv
import json
import os
import signal

import pytest
import yaml

from lmleak.cli import main
from lmleak.config import parse_config
from lmleak.evaluation.layers import LayerAnalysis
from lmleak.evaluation.layers_audit import LayersConfig, run_layers
from lmleak.evaluation.layers_data import load_labelled
from lmleak.evaluation.layers_protection import Protection
from lmleak.evaluation.run import process_state
from lmleak.report.layers_page import read_layers_result, write_layers_report
from tests.launching import ROOT, fate

CONFIGS = sorted((ROOT / "configs" / "layers").glob("*.yaml"))
QUICK = [
    "--samples", "48", "--features", "16", "--folds", "2", "--permutations", "9", "--subspace", "2", "--steps", "2",
    "--sensitivity-examples", "1", "--probes", "2", "--influence-examples", "1", "--max-products", "4",
    "--attack-examples", "1", "--no-greedy",
]  # fmt: skip
IMAGES = [
    "--model", "lenet", "--attribute", "mark", "--metrics", "sensitivity", "mean-difference", "latent", "original",
    "--attacks", "gs(iterations=2)", *QUICK,
]  # fmt: skip


def run_until_killed(kind, name, argv):
    """Run the command line until SIGKILL at its fourth piece of work, a call of this method."""
    work, left = getattr(kind, name), 3

    def killed(self, item):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(self, item)

    setattr(kind, name, killed)
    main(argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "out"
    argv = [*IMAGES, "--no-resume", "--output", str(folder)]  # which a folder that the run made itself does not refuse
    return run_layers(parse_config(LayersConfig, argv), command="lmleak layers ...")


def test_rows_orders_and_circumstances_are_written(finished):
    lines = (finished.folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(finished.rows))
    hidden = [tuple(row["hidden"]) for row in finished.protection]
    assert hidden[0] == ()
    assert len(set(hidden)) == len(hidden) > 2
    assert finished.meta["attributes"]["mark"] == {"False": 24, "True": 24}
    assert finished.meta["layers"] == {"body.0": 312, "body.2": 3612, "body.4": 3612, "body.6": 3612, "fc": 490}
    assert (finished.folder / "gradients" / "store.json").exists()


def test_the_same_command_goes_on_from_what_is_there_and_config_yaml_replays(finished, tmp_path, monkeypatch):
    config = parse_config(LayersConfig, ["--config", str(finished.folder / "config.yaml"), "--output", str(tmp_path)])
    assert run_layers(config).rows == finished.rows
    # nothing is measured again: a measure would fail now
    monkeypatch.setattr("lmleak.evaluation.layers.LayerAnalysis.rows", None)
    monkeypatch.setattr("lmleak.evaluation.layers_protection.Protection.row", None)
    again = run_layers(parse_config(LayersConfig, [*IMAGES, "--output", str(finished.folder)]))
    assert again.rows == json.loads(json.dumps(finished.rows))
    assert again.agreement == finished.agreement


def test_killed_while_measuring_and_while_hiding_it_gives_the_rows_of_an_uninterrupted_run(finished, tmp_path):
    argv = ["layers", *IMAGES, "--output", str(tmp_path / "out")]
    for kind, name, kept in ((LayerAnalysis, "rows", "shards"), (Protection, "row", "protection/shards")):
        assert fate(lambda kind=kind, name=name: run_until_killed(kind, name, argv)) == -signal.SIGKILL
        (shard,) = (tmp_path / "out" / kept).glob("*.jsonl")
        assert len(shard.read_text().splitlines()) == 3
        assert not (tmp_path / "out" / "report.html").exists()
    again = run_layers(parse_config(LayersConfig, argv[1:]))
    assert again.rows == json.loads(json.dumps(finished.rows))
    assert again.orders == finished.orders
    assert untimed(again.protection) == untimed(json.loads(json.dumps(finished.protection)))


def untimed(protection):
    return [row | {"attacks": {spec: {name: value for name, value in scores.items() if name != "seconds"}
                               for spec, scores in row["attacks"].items()}} for row in protection]  # fmt: skip


def test_the_report_is_one_page_with_its_figures_and_can_be_written_again(finished, capsys):
    page = write_layers_report(finished)
    html = page.read_text()
    for word in (
        "mark", "body.0", "greedy", "Gaussian decoder", "lmleak layers ...", "gs(iterations=2), mean of 1 example",
        "estimated from 48 gradients;",
    ):  # fmt: skip
        assert word in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html
    for name in ("layers", "agreement", "protection"):
        assert (finished.folder / "figures" / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["orders"]["first layers first"] == list(finished.meta["layers"])
    assert any("mark" in sentence for sentence in summary["findings"])
    read = read_layers_result(finished.folder)
    assert read.rows == json.loads(json.dumps(finished.rows))
    assert main(["report", str(finished.folder)]) == 0
    assert page.read_text() == html
    assert "Leakage per layer" in capsys.readouterr().out
    (finished.folder / "summary.json").write_text("{")
    assert main(["report", str(finished.folder)]) == 2


def test_texts_of_a_table_with_attribute_columns(tmp_path, capsys):
    path = tmp_path / "messages.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "topic", "author", "kind"])
        for i in range(32):
            topic = ("tea", "rain")[i % 2]
            writer.writerow([f"the {topic} was {'good' if i % 4 else 'bad'} on day {i}", topic, f"a{i}", i % 4])
    argv = ["layers", "--data", str(path), "--text-column", "body", "--label-column", "kind", *QUICK,
            "--attribute-column", "topic", "--metrics", "mean-difference", "latent", "original", "--attacks",
            "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Attribute topic" in out
    assert "report:" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["target"] for row in rows} == {"topic", "bag-of-tokens", "mean-embedding"}
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["attribute_column"] == ["topic"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metrics", "sensitivty"], "sensitivity"),
        (["--families", "linaer"], "linear"),
        (["--model", "lenet", "--text-column", "body"], "text_column belongs to texts"),
        (["--model", "lenet", "--attribute", "smile"], "attribute 'smile'|unknown attribute"),
        (["--image-size", "8"], "image_size belongs to images"),
        (["--attribute", "numbr"], "number"),
        (["--attribute-column", "topic"], "data="),
        (["--data", "absent.csv"], "absent.csv"),
        (["--defense", "clip"], "max_norm"),
        (["--attacks", "spam"], "span"),
        (["--local-steps", "2"], "learning_rate"),
        (["--samples", "1"], "samples must be"),
        (["--device", "cuda:7"], "CUDA|device"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(argv, message, tmp_path, capsys):
    import re

    assert main(["layers", *argv, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_results_is_refused(finished, capsys):
    before = (finished.folder / "results.jsonl").read_bytes()
    assert main(["layers", *IMAGES, "--seed", "1", "--output", str(finished.folder)]) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert main(["layers", *IMAGES, "--no-resume", "--output", str(finished.folder)]) == 2
    assert "holds results already" in capsys.readouterr().err
    assert (finished.folder / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_configuration_parses(path):
    config = parse_config(LayersConfig, ["--config", str(path)])
    assert config.layer_settings(images=config.model == "lenet").families == tuple(config.families)
    config.protection_settings("image-classification" if config.model == "lenet" else "causal-lm")


@pytest.mark.parametrize("mark", ["tint", "stroke"])
def test_a_mark_is_put_into_half_of_the_images(mark):
    marked = load_labelled(parse_config(LayersConfig, [*IMAGES, "--mark", mark]), process_state())[1]
    plain = load_labelled(parse_config(LayersConfig, [*IMAGES, "--attribute", "coin"]), process_state())[1]
    difference = (marked.originals["pixels"](marked.batch(range(48))) - plain.originals["pixels"](
        plain.batch(range(48)))).flatten(1).abs().sum(1)  # fmt: skip
    assert ((difference > 0).numpy() == marked.attributes["mark"]).all()
    assert marked.attributes["mark"].sum() == 24
