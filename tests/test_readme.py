"""What the README says is run: its code, its commands, its pictures, its extension examples."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import lmleak
from lmleak.adapters import ARCHITECTURES
from lmleak.attacks import ATTACKS, Attack
from lmleak.attacks.base import Assumptions, reconstruction
from lmleak.config import parse_config
from lmleak.defenses import DEFENSES, Defense
from lmleak.evaluation import AuditConfig
from lmleak.types import AttackCost

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_first_example_runs_and_gives_a_number(capsys):
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0


def namespace() -> dict:
    from dataclasses import dataclass
    from typing import ClassVar

    return {"dataclass": dataclass, "ClassVar": ClassVar, "Defense": Defense, "Attack": Attack,
            "AttackCost": AttackCost, "Assumptions": Assumptions, "reconstruction": reconstruction,
            "__name__": "readme"}  # fmt: skip


def example(start: str) -> str:
    return next(block for block in blocks("python") if start in block)


def test_defense_example_works(monkeypatch):
    scope = namespace()
    exec(example("class Halve"), scope)
    monkeypatch.setitem(DEFENSES, "halve", scope["Halve"])
    adapter = lmleak.load_adapter("reference-gpt2")
    shared = lmleak.capture_gradient(adapter, adapter.batch(["the rent is due"]))
    released = lmleak.parse_defense("halve")(shared)
    name = next(iter(shared.gradient))
    assert torch.equal(released.gradient[name], shared.gradient[name] / 2)


def test_attack_example_works(monkeypatch):
    scope = namespace()
    exec(example("class FirstToken"), scope)
    monkeypatch.setitem(ATTACKS, "first-token", scope["FirstToken"])
    adapter = lmleak.load_adapter("reference-gpt2")
    shared = lmleak.capture_gradient(adapter, adapter.batch(["the rent is due", "call me"]))
    assert lmleak.run_attack("first-token", adapter, shared).token_ids == ((42,), (42,))


def test_two_commands_stand_after_their_markers():
    for marker, word in (("audit", "lmleak audit"), ("tests", "-m pytest")):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*)\n```", README)
        assert word in command
        assert "venv" in command


def test_audit_commands_parse():
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    audits = [c.partition("#")[0] for c in commands if c.startswith("lmleak audit")]
    assert audits
    for command in audits:
        arguments = [a for a in shlex.split(command)[2:] if a != "..."]
        if "run.yaml" not in arguments:
            parse_config(AuditConfig, arguments)


def test_files_that_are_named_exist():
    for path in re.findall(
        r"(?:configs|recipes|lmleak|tests|benchmarks|docs)/[\w./-]+\.(?:py|yaml|md|png|jsonl)", README
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_configs_never_use_half_precision(path):
    config = yaml.safe_load(path.read_text())
    assert config["mixed_precision"] == "no"
    if config["use_cpu"] and config["num_processes"] > 1:
        assert config["distributed_type"] == "MULTI_GPU"  # what really starts several CPU processes


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_shapes_name_a_known_model_type(path):
    from transformers import AutoConfig

    shape = yaml.safe_load(path.read_text())
    if "architecture" in shape:
        assert shape["architecture"] in ARCHITECTURES
        return
    config = AutoConfig.for_model(shape["model_type"], **(shape.get("config") or {}))
    assert all(hasattr(config, key) for key in shape.get("config") or {})
    if shape["task"] != "image-classification":
        assert config.num_hidden_layers == {"gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}.get(path.stem, 12)


def test_every_name_in_the_public_interface_exists():
    for name in lmleak.__all__:
        assert getattr(lmleak, name) is not None
