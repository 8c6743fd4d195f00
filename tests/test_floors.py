"""The one-way flow: a file imports only from its own floor or below, and keeps to its size."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lmleak"
SIZE_LIMIT = 350
FLOORS = {
    "errors": 0, "types": 0, "lookup": 0, "config": 0, "files": 0, "specification": 0,
    "linops": 1, "adapters": 1, "data": 1,
    "gradients": 2, "defenses": 2,
    "influence": 3, "leakage": 3, "attacks": 3,
    "metrics": 4, "evaluation": 4,
    "report": 5, "cli": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
APART = {"influence", "leakage", "attacks"}  # never import one another
LINOPS_MAY_IMPORT = {"torch", "numpy", "scipy"}
TEXT_SPECIFIC = {"transformers", "tokenizers", "peft", "datasets"}
TEXT_MODULES = ("lmleak.adapters.text", "lmleak.adapters.families", "lmleak.adapters.load", "lmleak.types.TextBatch")
TRUTH = ("lmleak.types.Batch", "lmleak.types.TextBatch")


def imported_modules(source: str, package: str) -> set[str]:
    """Every dotted name that a file imports, also inside functions and under TYPE_CHECKING.

    ``from a import b`` gives "a" and "a.b"; relative imports are resolved against ``package``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1])
                module = f"{base}.{module}" if module else base
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _callee(node) in ("import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _callee(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def violations(relative_path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file of the package, as sentences."""
    path = Path(relative_path)
    part = path.parts[0].removesuffix(".py")
    if part not in FLOORS:
        return [f"{relative_path}: {part!r} is on no floor"]
    imports = imported_modules(source, ".".join(["lmleak", *path.parent.parts]))
    inside = {name for name in imports if name == "lmleak" or name.startswith("lmleak.")}
    third_party = {name.split(".")[0] for name in imports - inside} - set(sys.stdlib_module_names)
    parts = {name.split(".")[1] for name in inside if "." in name}
    found = [f"{relative_path} (floor {FLOORS[part]}) imports lmleak.{p} (floor {FLOORS.get(p, '?')})"
             for p in sorted(parts) if p in FLOORS and FLOORS[p] > FLOORS[part]]  # fmt: skip
    if part != "__init__" and part in FLOORS and any(name == "lmleak" for name in inside) and FLOORS[part] < 5:
        # ``import lmleak`` or ``from lmleak import name`` may reach any floor; ``from lmleak import errors`` may not.
        unknown = {name for name in inside if name.count(".") == 1 and name.split(".")[1] not in FLOORS}
        if unknown or inside == {"lmleak"}:
            found.append(f"{relative_path} imports the top of the package: {sorted(unknown) or 'lmleak'}")
    if part in APART:
        found += [f"{relative_path} imports lmleak.{p}; {part} stands apart" for p in sorted(parts & (APART - {part}))]
    if part == "linops":
        found += [f"linops knows torch only, {relative_path} imports {m}"
                  for m in sorted(third_party - LINOPS_MAY_IMPORT)]  # fmt: skip
        found += [f"linops stands alone, {relative_path} imports lmleak.{p}"
                  for p in sorted(parts - {"linops", "errors", "lookup"})]  # fmt: skip
    if "accelerate" in third_party and part != "evaluation":
        found.append(f"{relative_path} imports accelerate; only lmleak/evaluation knows it")
    if relative_path == "adapters/base.py":
        found += [f"adapters/base.py imports the text-specific {m}" for m in sorted(third_party & TEXT_SPECIFIC)]
        found += [f"adapters/base.py imports the text-specific {m}" for m in TEXT_MODULES if m in imports]
    if part == "attacks":
        found += [f"{relative_path} imports {m}, which holds the truth" for m in TRUTH if m in imports]
    if path.name == "utils.py":
        found.append(f"{relative_path}: there is no utils.py")
    return found


def files() -> list[str]:
    return sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def test_the_package_is_where_the_test_looks():
    assert "adapters/base.py" in files()
    assert "influence/i2f.py" in files()


@pytest.mark.parametrize("path", files())
def test_imports_flow_one_way(path):
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", files())
def test_no_file_outgrows_its_limit(path):
    lines = (PACKAGE / path).read_text(encoding="utf-8").count("\n")
    assert lines <= SIZE_LIMIT, f"{path} has {lines} lines; cut it in two"


VIOLATIONS = {
    "upwards": ("adapters/x.py", "from lmleak.influence import GradientJacobian", "floor 3"),
    "upwards by import": ("errors.py", "import lmleak.types, lmleak.linops.base", "linops"),
    "upwards by from": ("gradients/x.py", "from lmleak import influence", "influence"),
    "upwards, relative": ("gradients/x.py", "from ..influence import i2f", "influence"),
    "relative, two levels": ("data/embedded/x.py", "from ...attacks.base import Attack", "attacks"),
    "upwards in a function": ("linops/x.py", "def f():\n    from lmleak.adapters import adapt", "adapters"),
    "upwards for types": (
        "gradients/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lmleak.attacks.base import Attack",
        "attacks",
    ),
    "upwards by name": ("data/x.py", "import importlib\nimportlib.import_module('lmleak.report')", "report"),
    "the top of the package": ("influence/x.py", "from lmleak import load_adapter", "top of the package"),
    "the package itself": ("influence/x.py", "import lmleak", "top of the package"),
    "apart": ("attacks/x.py", "from lmleak.influence.jacobian import GradientJacobian", "stands apart"),
    "linops on types": ("linops/x.py", "from lmleak.types import Batch", "stands alone"),
    "linops on transformers": ("linops/x.py", "import transformers.models", "torch only"),
    "accelerate": ("adapters/x.py", "from accelerate import PartialState", "accelerate"),
    "text in the base": ("adapters/base.py", "from lmleak.types import TextBatch", "text-specific"),
    "transformers in the base": ("adapters/base.py", "from transformers import AutoModel", "text-specific"),
    "truth in an attack": ("attacks/x.py", "from lmleak.types import Observation, Batch", "holds the truth"),
    "utils": ("metrics/utils.py", "", "utils.py"),
    "a new folder": ("misc/x.py", "", "no floor"),
}


@pytest.mark.parametrize(("path", "source", "message"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_violation_is_detected(path, source, message):
    found = violations(path, source)
    assert len(found) >= 1
    assert any(message in sentence for sentence in found), found


ALLOWED = {
    "own floor": ("influence/x.py", "from lmleak.influence.jacobian import GradientJacobian"),
    "below": ("attacks/x.py", "from lmleak.adapters.base import ModelAdapter\nfrom lmleak.types import Observation"),
    "linops": ("linops/x.py", "import math\nimport torch\nfrom scipy.linalg import eigh\nimport lmleak.errors"),
    "accelerate in its place": ("evaluation/x.py", "import accelerate"),
    "a word in a string": ("linops/x.py", "'import transformers'"),
    "a module by from": ("linops/x.py", "from lmleak import errors"),
}


@pytest.mark.parametrize(("path", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []
