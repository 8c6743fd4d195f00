"""The command line as a user meets it: exit status, messages, files."""

import json

import pytest
import torch

from lmleak.cli import GATE_FAILED, REFUSED, main
from tests.launching import fate, python

QUICK = [
    "--samples", "1", "--noise-levels", "--attacks", "span", "--probes", "0", "--max-products", "20",
    "--device", "cpu", "--texts", "my blood test came back positive",
]  # fmt: skip


def test_help_and_unknown_command(capsys):
    assert main([]) == 0
    assert "audit" in capsys.readouterr().out
    assert main(["adit"]) == REFUSED
    assert "Did you mean 'audit'?" in capsys.readouterr().err


def test_a_refusal_ends_one_of_several_processes_at_once(tmp_path):
    """Not by returning: the interpreter's way out would wait for, or abort with, the others."""

    def refused():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        main(["audit", "--data", "absent.csv", "--output", str(tmp_path / "out")])

    assert fate(refused) == REFUSED


def test_audit_writes_a_report_and_prints_a_table(tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["audit", *QUICK, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "span" in printed
    assert str(folder / "report.html") in printed
    assert {"results.jsonl", "summary.json", "config.yaml", "report.html"} <= {p.name for p in folder.iterdir()}
    assert "my blood test came back positive" in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(("threshold", "status"), [("0.5", GATE_FAILED), ("1.0", 0)])
def test_gate(tmp_path, capsys, threshold, status):
    assert main(["audit", *QUICK, "--output", str(tmp_path / "out"), "--fail-above", threshold]) == status
    assert ("gate FAILED" if status else "gate passed") in capsys.readouterr().out


def test_gate_that_no_attack_can_judge_is_refused(tmp_path, capsys):
    arguments = ["audit", *QUICK, "--output", str(tmp_path / "out"), "--fail-above", "0.5"]
    assert main([*arguments, "--shared", "head"]) == REFUSED  # span needs the gradient of an attention input
    assert "no attack could run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modl", "x"], "Did you mean 'model'?"),
        (["--samples", "two"], "invalid int value"),
        (["--config", "absent.yaml"], "cannot read the configuration"),
        (["--texts", ""], "text 0 is empty"),
        (["--data", "absent.csv"], "no data file"),
    ],
)
def test_refusals_have_no_traceback(tmp_path, capsys, arguments, message):
    assert main(["audit", *arguments, "--output", str(tmp_path / "out")]) == REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_unknown_key_in_yaml(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: reference-gpt2\nnoise_level: [1]\n")
    assert main(["audit", "--config", str(path)]) == REFUSED
    assert "Did you mean 'noise_levels'?" in capsys.readouterr().err


def test_results_of_another_configuration_are_kept(tmp_path, capsys):
    folder = str(tmp_path / "out")
    assert main(["audit", *QUICK, "--output", folder]) == 0
    before = (tmp_path / "out/results.jsonl").read_bytes()
    assert main(["audit", *QUICK, "--output", folder, "--seed", "5"]) == REFUSED
    assert "different configuration (seed: 0 there, 5 now)" in capsys.readouterr().err
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


def test_report_of_no_audit(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == REFUSED
    (tmp_path / "results.jsonl").write_text("{")
    (tmp_path / "summary.json").write_text(json.dumps({"meta": {}}))
    assert main(["report", str(tmp_path)]) == REFUSED
    assert "damaged" in capsys.readouterr().err


def test_installed_command_answers():
    finished = python("-m", "lmleak.cli", "audit", "--help")
    assert finished.returncode == 0
    assert "--noise-levels" in finished.stdout
    assert "multiples of the gradient's root mean square" in " ".join(finished.stdout.split())
