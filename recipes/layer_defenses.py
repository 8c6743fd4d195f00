"""What do dropout and DP-SGD hide, layer by layer, and what do they cost?

Dropout: the network is trained with dropout p and its private gradients are taken with dropout on. DP-SGD (Abadi et
al. 2016, arXiv:1607.00133): every example's gradient is clipped to norm C and carries noise of deviation z C per
coordinate, in training (on the sum over a batch) and in the release (of one example, the worst case: no batch hides
it). Per layer: V-information about the injected mark and about the pixels; sensitivity does not see either defense and
is left out. Beside them the accuracy of the network on the private half, which it was not trained on.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_defenses.py
        --config configs/layer_defenses/digits.yaml

(on one line). A killed run continues where it stopped. epsilon is that of the training (delta = 1e-4, Poisson
accounting of batches drawn by shuffling, hence indicative), not of the release of one example.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from image_tables import publish
from layer_cases import (
    Case,
    LayerStudyConfig,
    halves,
    information,
    measured_rows,
    prepare_all,
    study_folder,
    training_cases,
    unit_of,
)
from matplotlib.figure import Figure

from lmleak.config import parse_config
from lmleak.defenses.privacy import epsilon
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.layers import Row
from lmleak.report.drawing import INK, LINE_COLOURS, house_style, light_grid, whiskers

GROUPS = ("latent", "original")
DELTA = 1e-4


@dataclass(frozen=True, kw_only=True)
class DefensesConfig(LayerStudyConfig):
    """Leakage per layer under dropout and DP-SGD."""

    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.5, 0.8])
    """Probabilities of dropout."""
    clip: float = 1.0
    """C of DP-SGD."""
    noise_multipliers: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.1, 1.0])
    """z of DP-SGD; 0 clips only."""
    epochs: list[int] = field(default_factory=lambda: [10])
    """Trainings of the model."""
    output: str = "runs/layer_defenses"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""

    def __post_init__(self):
        super().__post_init__()
        if any(not 0 <= p < 1 for p in self.dropouts) or any(z < 0 for z in self.noise_multipliers):
            raise ConfigError("dropouts lie in [0, 1), noise multipliers are at least 0")
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"clip must be a positive number, got {self.clip}")
        if any(not case.endswith(":cnn") for case in self.cases):
            raise ConfigError(f"dropout and private training are of the model cnn here, got cases={self.cases}")


def defense_cases(config: DefensesConfig) -> list[Case]:
    """Return every defense: dropout first (0 is no defense), then DP-SGD."""
    found = []
    for plain in training_cases(config):
        found += [replace(plain, dropout=p) for p in config.dropouts]
        for z in config.noise_multipliers:
            noise = f"+gaussian(std={z * config.clip!r})" if z else ""
            found.append(replace(plain, defense=f"clip(max_norm={config.clip!r}){noise}", private=(config.clip, z)))
    return found


def defense_name(row: Row) -> str:
    """Return what a defense is called in tables."""
    if row["noise_multiplier"] is not None:
        return f"DP-SGD z = {row['noise_multiplier']:g}"
    return f"dropout {row['dropout']:g}" if row["dropout"] else "none"


def privacy_of(config: DefensesConfig, row: Row) -> float | None:
    """Return epsilon of the training of a DP-SGD case; None without noise or without DP-SGD."""
    z, size = row["noise_multiplier"], len(halves(config, row["source"])[1])
    if not z:
        return None
    steps = row["epochs"] * math.ceil(size / config.train_batch_size)
    return epsilon(z, min(1.0, config.train_batch_size / size), steps, DELTA)


def entries_of(config: DefensesConfig, rows: Sequence[Row]) -> list[Row]:
    """Return one line per defense and layer."""
    found = {}
    for row in rows:
        key = (row["source"], row["model"], row["epochs"], defense_name(row), row["layer"])
        if key not in found:
            found[key] = dict(zip(("source", "model", "epochs", "defense", "layer"), key, strict=True)) | {
                "model accuracy": row["model_accuracy"], "epsilon": privacy_of(config, row)
            }  # fmt: skip
        names = (row["target"], f"{row['target']} low", f"{row['target']} high")
        found[key] |= dict(zip(names, information(row), strict=True))
        if row.get("p_value") is not None:
            found[key][f"{row['target']} p"] = row["p_value"]
    return list(found.values())


def figure(entries: Sequence[Row]) -> Figure:
    """Draw information per layer, and accuracy, against the defense."""
    defenses, layers = (list(dict.fromkeys(e[k] for e in entries)) for k in ("defense", "layer"))
    targets = [t for t in entries[0] if f"{t} low" in entries[0] and t != "coin"]
    with house_style():
        drawing = Figure(figsize=(4.3 * (len(targets) + 1), 4.6), layout="constrained")
        panels = drawing.subplots(1, len(targets) + 1)
        for layer, colour in zip(layers, LINE_COLOURS, strict=False):
            own = [e for e in entries if e["layer"] == layer]
            x = [defenses.index(e["defense"]) for e in own]
            for axes, target in zip(panels, targets, strict=False):
                y, low, high = ([e[name] for e in own] for name in (target, f"{target} low", f"{target} high"))
                axes.errorbar(x, y, whiskers(y, low, high), fmt="o-", ms=4, lw=1, capsize=2, color=colour, label=layer)
        first = [e for e in entries if e["layer"] == layers[0]]
        panels[-1].plot(
            [defenses.index(e["defense"]) for e in first], [e["model accuracy"] for e in first], "o-", color=INK
        )
        panels[-1].set_ylabel("accuracy on the private half")
        panels[-1].set_ylim(0, 1.03)
        for axes, target in zip(panels, targets, strict=False):
            axes.set_ylabel(f"{target}: {unit_of(target)}")
        for axes in panels:
            axes.set_xticks(range(len(defenses)), defenses, rotation=50, ha="right")
            axes.set_xlabel("defense")
            light_grid(axes)
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return drawing


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(DefensesConfig, argv, prog="layer_defenses.py")
    state = process_state(config.processes)
    cases = prepare_all(config, defense_cases(config), GROUPS, state)
    items = [(i, measure) for i, case in enumerate(cases) for measure in case.analysis.measures()]
    work = lambda _, item: measured_rows(cases[item[0]], item[1], str(item[0]))
    folder = study_folder(config, cases)
    rows = run_items(items, work, folder, state, label="measuring defenses")
    if state.is_main_process:
        publish(folder.path, "layer_defenses", entries_of(config, rows), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
