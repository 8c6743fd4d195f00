"""How much of the measured leakage is the attacker's capacity, and how much his data?

V-information is a statement about a family of attackers. Here it is taken of one trained network's gradients for the
nested families constant < linear < forest < mlp < deep-mlp < conv-decoder (the last draws images, so it is for pixels
only), per layer; and for one family against the number of gradients it was fitted on. Beside the trained families
stands an attack that learns nothing from other gradients: Gauss-Newton on the gradient of one image, whose output is
judged by the same likelihood ("attack"), alone and joined with a trained family.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_capacity.py
        --config configs/layer_capacity/digits.yaml

(on one line). A killed run continues where it stopped.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from image_tables import publish
from layer_cases import LayerStudyConfig, Prepared, information, prepare_all, study_folder, training_cases, unit_of
from layer_models import MODELS
from matplotlib.figure import Figure

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import parse_config
from lmleak.defenses import derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.layers import ALL, Measure, Row
from lmleak.gradients import capture_gradient
from lmleak.leakage import VInformation, attack_information, learning_curve, v_information
from lmleak.leakage.cross_fitting import Folds, feature_matrix, make_target
from lmleak.leakage.families import DECODER, FAMILIES
from lmleak.leakage.vinformation import information_between
from lmleak.lookup import lookup
from lmleak.report.drawing import LINE_COLOURS, house_style, light_grid, whiskers

GROUPS = ("latent", "original")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig(LayerStudyConfig):
    """Information per layer against the family and against the number of gradients."""

    families: list[str] = field(default_factory=lambda: ["linear", "forest", "mlp", "deep-mlp", DECODER])
    """Families, smaller ones first."""
    layers: list[str] = field(default_factory=list)
    """Layers studied; all of them and all together if empty."""
    curve_family: str = "linear"
    """Family of the learning curve."""
    sizes: list[int] = field(default_factory=lambda: [50, 100, 200, 400])
    """Numbers of gradients of the learning curve."""
    attack: str = "gauss-newton(iterations=30)"
    """The attack on single images."""
    attacked: int = 32
    """Images it is run on; 0 leaves it out."""
    epochs: list[int] = field(default_factory=lambda: [10])
    """Trainings of the model."""
    output: str = "runs/layer_capacity"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""

    def __post_init__(self):
        super().__post_init__()
        for family in (*self.families, self.curve_family):
            lookup("family", family, FAMILIES)
        if self.attacked and self.attacked < 16:
            raise ConfigError(f"attacked must be 0 or at least 16, got {self.attacked}")
        if any(MODELS[case.partition(":")[2]].kind != "images" for case in self.cases):
            raise ConfigError(f"the families draw images, got cases={self.cases}")
        parse_attack(self.attack, task=IMAGE_TASK)


def row_of(case: Prepared, number: int, what: str, measure: Measure, found: VInformation) -> Row:
    """Return a measured information as a row."""
    return {
        "key": f"{number}|{what}|{measure.layer}|{measure.target}|{found.family}|{found.num_samples}", **case.columns,
        "what": what, "layer": measure.layer, "group": measure.group, "target": measure.target,
        "family": found.family, "gradients": found.num_samples, "nats": found.nats, "low": found.low,
        "high": found.high, "baseline_nats": found.baseline_nats, "num_coordinates": found.num_coordinates,
        "fraction_low": found.fraction_low, "fraction_high": found.fraction_high, "members": list(found.members),
    }  # fmt: skip


def inputs_of(case: Prepared, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Return features and target of one piece of work."""
    analysis, rows = case.analysis, case.analysis.chosen
    return analysis.features(analysis.members(measure.layer), rows), analysis.target(measure, rows)


def nested_information(
    features: np.ndarray, targets: np.ndarray, families: Sequence[str], *, folds: int, seed: int
) -> list[VInformation]:
    """Return ``v_information`` of nested families for the cost of the largest: its members hold those of the others.

    Args:
        features: X (n, p).
        targets: Y.
        families: Some of ``FAMILIES``.
        folds: K of the cross-fitting.
        seed: Seed of folds, members and bootstrap.

    Returns:
        One information per family, in the order given.
    """
    target, matrix = make_target(targets), feature_matrix(features, len(targets))
    division = Folds(target, folds, seed)
    constant = division.constant_candidates()
    fitted = division.candidates(matrix, max(families, key=FAMILIES.get))
    found = []
    for family in families:
        members = list(target.members)[: FAMILIES[family]]
        own = [[candidate for candidate in fold if candidate.member in members] for fold in fitted]
        found.append(information_between(
            target, division.choose(constant), division.choose(constant, own), family=family,
            num_features=matrix.shape[1], seed=seed,
        ))  # fmt: skip
    return found


def family_rows(config: CapacityConfig, case: Prepared, number: int, measure: Measure) -> list[Row]:
    """Return the information of every family about one target in one layer, and the learning curve of one."""
    features, target = inputs_of(case, measure)
    families = case.analysis.families(measure.group)
    options = {"folds": config.folds, "seed": config.seed}
    found = nested_information(features, target, families, **options)
    rows = [row_of(case, number, "family", measure, each) for each in found]
    sizes = [size for size in config.sizes if size <= len(target)]
    curve = learning_curve(features, target, sizes, family=config.curve_family, **options)
    return rows + [row_of(case, number, "curve", measure, each) for each in curve.values()]


def attack_rows(config: CapacityConfig, case: Prepared, number: int) -> list[Row]:
    """Return what the attack tells of the pixels, alone and beside the linear family, on the attacked images."""
    analysis, shared = case.analysis, MODELS[case.case.model].shared
    adapter, attack = analysis.adapter, parse_attack(config.attack, task=IMAGE_TASK)
    chosen = analysis.chosen[: config.attacked]
    recovered = []
    for example in chosen:
        batch = analysis.examples.batch([int(example)])
        released = capture_gradient(adapter, batch, shared=shared)
        images = attack.run(adapter, released, seed=derived_seed(config.seed, int(example))).images
        recovered.append(torch.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0).clamp(-10, 10).flatten())
    measure = Measure("original", ALL, "pixels", "attack")
    truth = analysis.target(measure, chosen)
    features = analysis.features(list(analysis.layers), chosen)
    options = {"folds": config.folds, "seed": config.seed}
    reconstructions = torch.stack(recovered).numpy()
    flat = truth.reshape(len(truth), -1)
    linear = v_information(features, flat, family="linear", **options)
    found = [
        attack_information(reconstructions, flat, **options),
        attack_information(reconstructions, flat, features=features, family="linear", **options), linear,
    ]  # fmt: skip
    return [row_of(case, number, "attack", measure, each) for each in found]


def entries_of(rows: Sequence[Row]) -> list[Row]:
    """Return one line per information."""
    found = []
    for row in rows:
        value, low, high = information(row)
        found.append({
            "source": row["source"], "model": row["model"], "epochs": row["epochs"], "what": row["what"],
            "layer": row["layer"], "target": row["target"], "family": row["family"], "gradients": row["gradients"],
            "information": value, "low": low, "high": high, "nats": row["nats"],
            "members": " ".join(row["members"]),
        })  # fmt: skip
    return found


def figure(entries: Sequence[Row]) -> Figure:
    """Draw information against the family (above) and against the number of gradients (below), a line per layer."""
    targets = [t for t in dict.fromkeys(e["target"] for e in entries) if t != "coin"]
    layers = list(dict.fromkeys(e["layer"] for e in entries))
    with house_style():
        drawing = Figure(figsize=(4.8 * len(targets), 7.6), layout="constrained")
        panels = drawing.subplots(2, len(targets), squeeze=False)
        for place, target in enumerate(targets):
            for axes, what, key in ((panels[0, place], "family", "family"), (panels[1, place], "curve", "gradients")):
                own = [e for e in entries if e["target"] == target and e["what"] == what]
                ticks = list(dict.fromkeys(e[key] for e in own))
                for layer, colour in zip(layers, LINE_COLOURS, strict=False):
                    line = [e for e in own if e["layer"] == layer]
                    y, low, high = ([e[name] for e in line] for name in ("information", "low", "high"))
                    axes.errorbar([ticks.index(e[key]) for e in line], y, whiskers(y, low, high), fmt="o-", ms=4, lw=1,
                                  capsize=2, color=colour, label=layer)  # fmt: skip
                axes.set_xticks(range(len(ticks)), ticks, rotation=30 if what == "family" else 0)
                axes.set_xlabel(
                    "predictive family" if what == "family" else "gradients in the estimate (two thirds fit)"
                )
                axes.set_ylabel(unit_of(target))
                light_grid(axes)
            panels[0, place].set_title(target)
        drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return drawing


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(CapacityConfig, argv, prog="layer_capacity.py")
    state = process_state(config.processes)
    cases = prepare_all(config, training_cases(config), GROUPS, state)
    items: list[tuple] = []
    for i, case in enumerate(cases):
        for layer in config.layers:
            lookup("layer", layer, dict.fromkeys([*case.analysis.layers, ALL]))
        items += [
            (i, m) for m in case.analysis.measures()
            if (not config.layers or m.layer in config.layers) and m.family == case.analysis.families(m.group)[0]
        ]  # fmt: skip
        items += [(i, None)] if config.attacked else []

    def work(_: int, item: tuple) -> list[Row]:
        number, measure = item
        if measure is None:
            return attack_rows(config, cases[number], number)
        return family_rows(config, cases[number], number, measure)

    folder = study_folder(config, cases)
    rows = run_items(items, work, folder, state, label="fitting families")
    if state.is_main_process:
        publish(folder.path, "layer_capacity", entries_of(rows), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
