"""Does aggregation hide an example, layer by layer, and does an attacker who knows of it undo that?

Release i holds the gradient of example i, the victim, and of B - 1 others at random: their mean (batch 1 to 256), or
the update of several local steps or epochs on them. Per layer and for all layers together: V-information about the
victim's attribute and input, and the sensitivity of the released gradient to the victim alone. Two attackers:
  adaptive   trains his decoder on aggregated gradients of the kind he attacks
  naive      trains it on gradients of single examples, and reads aggregated ones by it
Both are cross-fitted on the same folds. The naive one chooses and calibrates on single gradients too, so aggregation
can leave him with less than nothing.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_aggregation.py
        --config configs/layer_aggregation/digits.yaml

(on one line). A killed run continues where it stopped.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from image_tables import publish
from layer_cases import (
    Case,
    LayerStudyConfig,
    Prepared,
    information,
    measured_rows,
    prepare_all,
    study_folder,
    training_cases,
    unit_of,
)
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.layers import Measure, Row
from lmleak.leakage.cross_fitting import Candidate, Candidates, Folds, make_target
from lmleak.leakage.families import FAMILIES
from lmleak.leakage.vinformation import VInformation, information_between
from lmleak.report.drawing import LINE_COLOURS, house_style, light_grid, whiskers
from lmleak.types import Aggregation

GROUPS = ("sensitivity", "latent", "original")
LOCAL_EXAMPLES = 8  # of an update of local steps, over which the steps divide


@dataclass(frozen=True, kw_only=True)
class AggregationConfig(LayerStudyConfig):
    """Leakage per layer against the size of the aggregate."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256])
    """Examples whose mean gradient is released; 1 must be among them."""
    local_steps: list[int] = field(default_factory=lambda: [2, 8])
    """Steps per local epoch on 8 examples; divisors of 8."""
    local_epochs: list[int] = field(default_factory=lambda: [4])
    """Local epochs of two steps on 8 examples."""
    local_rate: float = 0.05
    """Learning rate of the local steps."""
    epochs: list[int] = field(default_factory=lambda: [10])
    """Trainings of the model before the release."""
    output: str = "runs/layer_aggregation"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""

    def __post_init__(self):
        super().__post_init__()
        if 1 not in self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes must hold 1, which the naive attacker trains on; got {self.batch_sizes}")
        if any(LOCAL_EXAMPLES % steps for steps in self.local_steps):
            raise ConfigError(f"local_steps must divide {LOCAL_EXAMPLES} examples, got {self.local_steps}")


def aggregation_cases(config: AggregationConfig) -> list[Case]:
    """Return every release: single first, then batches, then local training."""
    found = []
    for single in training_cases(config):
        found += [replace(single, batch_size=size) for size in sorted(config.batch_sizes)]
        local = [(1, steps) for steps in config.local_steps] + [(epochs, 2) for epochs in config.local_epochs]
        found += [
            replace(single, batch_size=LOCAL_EXAMPLES, aggregation=Aggregation(1, epochs, steps, config.local_rate))
            for epochs, steps in local
        ]
    return found


def release_name(case: Case) -> str:
    """Return what a release is called in tables."""
    epochs, steps = case.aggregation.epochs, case.aggregation.steps_per_epoch
    local = f", {epochs} x {steps} local steps" if epochs > 1 else f", {steps} local steps" if steps > 1 else ""
    return f"{case.batch_size} example{'s' if case.batch_size > 1 else ''}{local}"


def transferred_information(
    single: NDArray, aggregated: NDArray, targets: NDArray, *, family: str, folds: int, seed: int
) -> VInformation:
    """Estimate what a decoder that was fitted, chosen and calibrated on other features tells of these.

    Args:
        single: (n, p) features the attacker trains on.
        aggregated: (n, p) features he reads, of the same samples in the same order.
        targets: As in ``v_information``.
        family: One of ``FAMILIES``.
        folds: K of the cross-fitting; the test part of one kind of features is predicted from the rest of the other.
        seed: Seed of folds and members.

    Returns:
        The information, negative where the decoder is misled.
    """
    target = make_target(targets)
    division = Folds(target, folds, seed)
    constant = division.constant_candidates()
    members = list(target.members.items())[: FAMILIES[family]]
    candidates: Candidates = []
    for (train, held, test), base in zip(division.parts, division.constants, strict=True):
        candidates.append([])
        for name, fit in ((name, fit) for name, fits in members for fit in fits):
            predictor = fit(single[train], target.values[train], seed)
            calibrate = target.calibrated(predictor(single[held]), held, base)
            loss = target.loss(calibrate(predictor(single[held])), held).mean()
            read = lambda predictor=predictor, calibrate=calibrate, test=test: calibrate(predictor(aggregated[test]))
            candidates[-1].append(Candidate(name, float(loss), read))
    return information_between(
        target, division.choose(constant), division.choose(constant, candidates), family=family,
        num_features=single.shape[1], seed=seed,
    )  # fmt: skip


def naive_rows(cases: Sequence[Prepared], number: int, measure: Measure) -> list[Row]:
    """Return what the attacker trained on single gradients reads from a case, as a row like the adaptive one's."""
    case = cases[number]
    single = next(c for c in cases if c.case.batch_size == 1 and c.case.epochs == case.case.epochs
                  and (c.case.source, c.case.model) == (case.case.source, case.case.model))  # fmt: skip
    analysis, rows = case.analysis, case.analysis.chosen
    layers = analysis.members(measure.layer)
    found = transferred_information(
        single.analysis.features(layers, rows), analysis.features(layers, rows), analysis.target(measure, rows),
        family=measure.family, folds=analysis.settings.folds, seed=analysis.settings.seed,
    )  # fmt: skip
    return [{
        "key": f"{number}|naive|{measure.layer}|{measure.target}|{measure.family}", **case.columns,
        "layer": measure.layer, "group": f"naive {measure.group}", "target": measure.target, "family": measure.family,
        "nats": found.nats, "low": found.low, "high": found.high, "baseline_nats": found.baseline_nats,
        "fraction_low": found.fraction_low, "fraction_high": found.fraction_high,
        "num_coordinates": found.num_coordinates, "members": list(found.members),
    }]  # fmt: skip


def entries_of(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """Return one line per release and layer: both attackers and the sensitivity; rows' keys begin with the case."""
    found = {}
    for row in rows:
        release = release_name(cases[int(row["key"].partition("|")[0])])
        key = (row["source"], row["model"], row["epochs"], release, row["layer"])
        entry = found.setdefault(key, dict(zip(("source", "model", "epochs", "release", "layer"), key, strict=True)))
        if row["group"] == "sensitivity":
            entry |= {"sensitivity": row["frobenius"], "sensitivity low": row["frobenius_low"],
                      "sensitivity high": row["frobenius_high"]}  # fmt: skip
            continue
        who = "naive" if row["group"].startswith("naive") else "adaptive"
        name = f"{row['target']}, {who}"
        value = information(row | {"group": row["group"].removeprefix("naive ")})
        entry |= dict(zip((name, f"{name} low", f"{name} high"), value, strict=True))
    columns = list(dict.fromkeys(c for e in found.values() for c in e))
    return [{c: e.get(c) for c in columns} for e in found.values()]


def figure(entries: Sequence[Row]) -> Figure:
    """Draw information of both attackers and sensitivity against the release, one line per layer."""
    names = [n for n in entries[0] if n.endswith(("adaptive", "naive"))]
    names = [*dict.fromkeys(n for e in entries for n in e if n.endswith(("adaptive", "naive")))] or names
    targets = list(dict.fromkeys(n.rpartition(", ")[0] for n in names if not n.startswith("coin")))
    releases = list(dict.fromkeys(e["release"] for e in entries))
    layers = list(dict.fromkeys(e["layer"] for e in entries))
    with house_style():
        drawing = Figure(figsize=(4.2 * (len(targets) + 1), 4.8), layout="constrained")
        panels = drawing.subplots(1, len(targets) + 1)
        for layer, colour in zip(layers, LINE_COLOURS, strict=False):
            own = {e["release"]: e for e in entries if e["layer"] == layer}
            for axes, target in zip(panels, targets, strict=False):
                for who, style in (("adaptive", "o-"), ("naive", "x:")):
                    name = f"{target}, {who}"
                    shown = [r for r in releases if own.get(r, {}).get(name) is not None]
                    x, y = [releases.index(r) for r in shown], [own[r][name] for r in shown]
                    low, high = ([own[r][f"{name} {end}"] for r in shown] for end in ("low", "high"))
                    axes.errorbar(x, y, whiskers(y, low, high), fmt=style, ms=4, lw=1.0, capsize=2, color=colour,
                                  label=f"{layer}, {who}")  # fmt: skip
            shown = [r for r in releases if own.get(r, {}).get("sensitivity") is not None]
            if shown:
                panels[-1].plot([releases.index(r) for r in shown], [own[r]["sensitivity"] for r in shown], "o-", ms=4,
                                color=colour, label=layer)  # fmt: skip
        for axes, target in zip(panels, targets, strict=False):
            axes.set_title(target)
            axes.set_ylim(-0.55, 0.8)
            axes.set_ylabel(unit_of(target))
        panels[-1].set_title("sensitivity to the victim")
        panels[-1].set_ylabel("||J||, gradient per normalised pixel")
        panels[-1].set_yscale("log")
        for axes in panels:
            axes.set_xticks(range(len(releases)), releases, rotation=60, ha="right", fontsize=8)
            axes.set_xlabel("release")
            light_grid(axes)
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7.5)
    return drawing


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(AggregationConfig, argv, prog="layer_aggregation.py")
    state = process_state(config.processes)
    cases = prepare_all(config, aggregation_cases(config), GROUPS, state, sensitivity_examples=3, probes=8)
    adaptive = [(i, m, "adaptive") for i, case in enumerate(cases) for m in case.analysis.measures()]
    naive = [(i, m, "naive") for i, m, _ in adaptive if m.group != "sensitivity" and cases[i].case.batch_size > 1]

    def work(_: int, item: tuple) -> list[Row]:
        number, measure, who = item
        return (
            measured_rows(cases[number], measure, str(number)) if who == "adaptive" else naive_rows(cases, *item[:2])
        )

    folder = study_folder(config, cases)
    rows = run_items(adaptive + naive, work, folder, state, label="measuring releases")
    if state.is_main_process:
        publish(folder.path, "layer_aggregation", entries_of(rows, [c.case for c in cases]), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
