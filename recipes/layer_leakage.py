"""Which layer's gradient leaks the input, and which a private attribute?

The questions of Mo, Borovykh, Malekzadeh, Haddadi and Demetriou (arXiv:2105.13929), with our definitions: per layer,
the V-information of its gradient about the input ("original") and about an attribute ("latent"), its sensitivity, and
the subspace distance and mean difference between the gradients of the attribute's values; for several networks and
data sets, untrained and trained on public examples; gradients of private examples that no network was trained on. The
two headline findings are put to the test per case, by intervals over the private examples:
  first layers hold most original information        is any later layer's interval above that of the first?
  the fully connected layers hold most latent        is any layer before them above the best of them?
"coin" is an attribute that no gradient can know: the false alarms of the whole procedure.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_leakage.py
        --config configs/layer_leakage/images.yaml
    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_leakage.py
        --config configs/layer_leakage/texts.yaml

(each on one line). A killed run continues where it stopped; trained models and gradient stores lie beside the output
folder and hold private data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from image_tables import publish
from layer_cases import (
    LayerStudyConfig,
    information,
    measured_rows,
    of_layers,
    prepare_all,
    study_folder,
    training_cases,
)
from layer_models import MODELS
from matplotlib.figure import Figure

from lmleak.config import parse_config
from lmleak.data.attributes import COIN
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.layers import Row
from lmleak.evaluation.layers_order import layer_scores, rank_agreement
from lmleak.files import write_csv_atomically
from lmleak.report.drawing import GREY, LINE_COLOURS, house_style, light_grid, whiskers

GROUPS = ("sensitivity", "subspace", "mean-difference", "latent", "original")


@dataclass(frozen=True, kw_only=True)
class LeakageConfig(LayerStudyConfig):
    """Information per layer of several models and data sets."""

    output: str = "runs/layer_leakage"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""


def case_of(row: Row) -> tuple:
    """Return what tells cases apart."""
    return row["source"], row["model"], row["epochs"]


def verdict(rows: Sequence[Row], favourites: Sequence[str]) -> dict[str, object]:
    """Compare the best of some layers with the best of the others, by their 95 % intervals.

    Args:
        rows: One per layer, of one target.
        favourites: The layers that a finding names.

    Returns:
        Both best layers with their information in [0, 1], and "confirmed" (no other layer's interval reaches that
        of the best favourite), "refuted" (another layer's interval lies above it), or "open".
    """
    named = [r for r in rows if r["layer"] in favourites]
    others = [r for r in rows if r["layer"] not in favourites]
    best, rival = (max(some, key=lambda r: r["nats"]) for some in (named, others))
    (value, low, high), (other, other_low, other_high) = information(best), information(rival)
    decision = "confirmed" if low > other_high else "refuted" if other_low > high else "open"
    return {
        "named": best["layer"], "information": value, "low": low, "high": high,
        "rival": rival["layer"], "rival_information": other, "rival_low": other_low, "rival_high": other_high,
        "verdict": decision,
    }  # fmt: skip


def headlines(rows: Sequence[Row]) -> list[Row]:
    """Return both findings, put to the test in every case and for every target."""
    found = []
    for case in dict.fromkeys(map(case_of, rows)):
        for group in ("original", "latent"):
            own = [r for r in rows if case_of(r) == case and r["group"] == group]
            for target, family in dict.fromkeys((r["target"], r["family"]) for r in own):
                layers = of_layers(r for r in own if (r["target"], r["family"]) == (target, family))
                classifier = MODELS[case[1]].classifier
                favourites = [layers[0]["layer"]] if group == "original" else list(classifier)
                if target == COIN or not favourites or len(favourites) == len(layers):
                    continue
                entry = {"finding": "first layer" if group == "original" else "fully connected", "source": case[0],
                         "model": case[1], "epochs": case[2], "target": target, "family": family,
                         "from_label": layers[0]["follows_from_label"]}  # fmt: skip
                found.append(entry | verdict(layers, favourites))
    return found


def layer_entries(rows: Sequence[Row]) -> list[Row]:
    """Return one line per case and layer: every metric."""
    found = []
    for case in dict.fromkeys(map(case_of, rows)):
        own = [r for r in rows if case_of(r) == case]
        for layer in dict.fromkeys(r["layer"] for r in own):
            here = [r for r in own if r["layer"] == layer]
            entry = {"source": case[0], "model": case[1], "epochs": case[2], "layer": layer,
                     "parameters": here[0]["parameters"], "model_loss": here[0]["model_loss"],
                     "model_accuracy": here[0]["model_accuracy"]}  # fmt: skip
            for row in here:
                if row["group"] in ("latent", "original"):
                    name = f"{row['target']} {row['family']}"
                    entry |= dict(zip((name, f"{name} low", f"{name} high"), information(row), strict=True))
                    if "p_value" in row:
                        entry[f"{row['target']} p"] = row["p_value"]
                elif row["group"] == "sensitivity":
                    entry |= {"sensitivity": row["frobenius"], "trace share": row["share"]}
                else:
                    entry[f"{row['target']} {row['group']} z"] = row["z"]
            found.append(entry)
    return found


def wide(entries: Sequence[Row]) -> list[Row]:
    """Return entries that all have the same columns, in order of first appearance."""
    columns = list(dict.fromkeys(column for entry in entries for column in entry))
    return [{column: entry.get(column) for column in columns} for entry in entries]


def agreement(rows: Sequence[Row]) -> list[Row]:
    """Return, per case, how the attack-free metrics order the layers beside V-information."""
    found = []
    for case in dict.fromkeys(map(case_of, rows)):
        scores = [s for s in layer_scores([r for r in rows if case_of(r) == case]) if s.target != COIN]
        for entry in rank_agreement(scores):
            pair = {entry["first"].partition(":")[0], entry["second"].partition(":")[0]}
            targets = [entry[k].partition(":")[2] for k in ("first", "second")]
            attack_free = (
                pair & {"sensitivity", "sensitivity-relative", "sensitivity-per-element"} and "original" in pair
            )
            latent = "latent" in pair and pair & {"subspace", "mean-difference"} and targets[0] == targets[1]
            if attack_free or latent:
                found.append({"source": case[0], "model": case[1], "epochs": case[2]} | entry)
    return found


def figure(rows: Sequence[Row]) -> Figure:
    """Draw original information above, latent below, against the layers, one column per data set and model."""
    columns = list(dict.fromkeys((r["source"], r["model"]) for r in rows))
    stages = sorted({r["epochs"] for r in rows})
    with house_style():
        drawing = Figure(figsize=(0.8 + 2.5 * len(columns), 7.2), layout="constrained")
        panels = drawing.subplots(2, len(columns), squeeze=False, sharey="row")
        for place, (source, model) in enumerate(columns):
            for axes, group in zip(panels[:, place], ("original", "latent"), strict=True):
                own = [r for r in rows if (r["source"], r["model"], r["group"]) == (source, model, group)]
                family = own[-1]["family"]
                targets = list(dict.fromkeys(r["target"] for r in own))
                for target, colour in zip(targets, LINE_COLOURS, strict=False):
                    for epochs in stages:
                        layers = of_layers(r for r in own if (r["target"], r["epochs"], r["family"]) ==
                                           (target, epochs, family))  # fmt: skip
                        values = np.array([information(r) for r in layers]).T
                        axes.errorbar(
                            range(len(layers)), values[0], whiskers(*values), fmt="o-" if epochs else "o:", ms=3.5,
                            lw=1.2, color=GREY if target == COIN else colour, capsize=2,
                            label=f"{target}, {f'{epochs} epochs' if epochs else 'untrained'}",
                        )  # fmt: skip
                axes.set_xticks(range(len(layers)), [r["layer"] for r in layers], rotation=70, fontsize=8)
                axes.axhline(0, color=GREY, lw=0.6)
                light_grid(axes)
                axes.legend(fontsize=6.5)
            panels[0, place].set_title(f"{source} / {model}")
            panels[1, place].set_xlabel("layer, input to output")
        panels[0, 0].set_ylabel("original information\n(R² of the input)")
        panels[1, 0].set_ylabel("latent information\n(share of the entropy told)")
    return drawing


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(LeakageConfig, argv, prog="layer_leakage.py")
    state = process_state(config.processes)
    cases = prepare_all(config, training_cases(config), GROUPS, state, sensitivity_examples=6, probes=8, subspace=4)
    items = [(i, measure) for i, case in enumerate(cases) for measure in case.analysis.measures()]
    work = lambda _, item: measured_rows(cases[item[0]], item[1], str(item[0]))
    folder = study_folder(config, cases)
    rows = run_items(items, work, folder, state, label="measuring layers")
    if state.is_main_process:
        entries = wide(layer_entries(rows))
        write_csv_atomically(folder.path / "layer_leakage_intervals.csv", entries)
        short = [{k: v for k, v in entry.items() if not k.endswith((" low", " high"))} for entry in entries]
        publish(folder.path, "layer_leakage", short, lambda _: figure(rows))
        publish(folder.path, "layer_leakage_findings", wide(headlines(rows)))
        publish(folder.path, "layer_leakage_agreement", wide(agreement(rows)))
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
