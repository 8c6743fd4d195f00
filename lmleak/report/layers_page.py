"""Writing the report of a layer-wise audit: one self-contained HTML page, figures as files, summary.json."""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure
from rich.console import RenderableType

from lmleak.errors import DataError
from lmleak.evaluation.layers_audit import LayersResult
from lmleak.report import layers_tables
from lmleak.report.layers_figures import agreement_matrix, layer_bars, residual_curves
from lmleak.report.page import embedded_figure, write_files
from lmleak.report.provenance import reproduce_section

ALTERNATIVES = {
    "layers": "Every metric as bars over the layers of the network",
    "agreement": "Rank correlation between every pair of metrics over the layers",
    "protection": "Information and attack success left after hiding layers, by order of hiding",
}
FIELDS = (
    "model", "task", "data", "examples", "attributes", "batch_size", "shared", "defense", "dropout", "local_steps",
    "families", "features", "noise", "parameters", "seed", "world_size", "device", "commit", "date", "seconds",
    "versions",
)  # fmt: skip


def write_layers_report(result: LayersResult) -> Path:
    """Write report.html, summary.json and figures/*.{png,pdf} into the folder of the result.

    Everything is rendered in memory first, then each file is put in place by a rename.

    Args:
        result: Of :func:`lmleak.evaluation.layers_audit.run_layers`, or :func:`read_layers_result`.

    Returns:
        Path of the page.
    """
    scores, left = result.scores, result.curves
    drawn = {
        "layers": layer_bars(scores, result.rows),
        "agreement": agreement_matrix(scores, result.agreement),
        "protection": residual_curves(left),
    }
    summary = {
        "meta": result.meta,
        "findings": layers_tables.findings(scores, result.rows, left),
        "orders": result.orders,
        "agreement": result.agreement,
        "protection": {
            name: [{"k": k, "hidden": list(hidden), "latent": row["latent"], "original": row["original"],
                    "attacks": row["attacks"]} for k, hidden, row in steps]
            for name, steps in left.items()
        },
    }  # fmt: skip
    return write_files(result.folder, summary, drawn, render(result, summary, drawn))


def render(result: LayersResult, summary: Mapping[str, Any], drawn: Mapping[str, Figure | None]) -> str:
    """Return the page as HTML, a complete document that refers to nothing outside itself."""
    meta, folder = result.meta, files("lmleak.report")
    scores, left = result.scores, result.curves
    figures = {
        name: embedded_figure(figure, ALTERNATIVES[name]) if figure else f'<p class="absent">{MISSING[name]}</p>'
        for name, figure in drawn.items()
    }
    lead = (meta["model"], meta["task"], meta["data"], f"{meta['examples']} examples", str(meta["date"]).split("T")[0])
    size = meta["batch_size"]
    return Template(folder.joinpath("layers_template.html").read_text(encoding="utf-8")).substitute(
        style=folder.joinpath("style.css").read_text(encoding="utf-8"),
        model=escape(str(meta["model"])),
        lead=" · ".join(escape(str(part)) for part in lead),
        findings="".join(f"<p>{escape(sentence)}</p>" for sentence in summary["findings"]),
        layers=_layers_section(figures["layers"], layers_tables.score_table(scores, result.rows, meta["layers"])),
        agreement=_agreement_section(figures["agreement"], len(meta["layers"])),
        protection=_protection_section(figures["protection"], layers_tables.protection_table(left), meta),
        families=escape(f"Here: {', '.join(meta['families'])}, on {meta['features']} features per layer."),
        gradients=f"{meta['gradients']:,}",
        attacks=escape(_attack_note(result.protection)),
        batch="one example" if size == 1 else f"{size} examples, of which it is after one",
        reproduce=reproduce_section(meta, FIELDS),
    )


def console_report(result: LayersResult) -> list[RenderableType]:
    """Return what the command prints: the metrics, what hiding leaves, and the findings in words."""
    scores, left = result.scores, result.curves
    tables = [layers_tables.layers_table(scores, result.meta["layers"])] if scores else []
    tables += [layers_tables.orders_table(left)] if len(result.meta["layers"]) > 1 else []
    return [*tables, *layers_tables.findings(scores, result.rows, left)]


MISSING = {
    "layers": "No metric was measured on every layer.",
    "agreement": "A rank correlation needs three layers and two metrics that differ between layers.",
    "protection": "Nothing was hidden: the network shares one layer only.",
}


def _layers_section(figure: str, table: str) -> str:
    return (
        "<p>Layers from the input on, top to bottom. Blue: about the input itself (original information). Purple: "
        "about a private attribute (latent information). Whiskers are 95 % intervals.</p>"
        f"{figure}{table}"
        '<p class="note">“≈” marks a solve that stopped before it converged. Intervals: of sensitivity and MAP error '
        "over examples, of information over gradients with the fitted predictors held fixed. p: permutation test.</p>"
    )


def _agreement_section(figure: str, layers: int) -> str:
    return (
        "<p>Each metric orders the layers, the one that leaks most first. Spearman’s rank correlation between these "
        f"orders, over {layers} layers; bold where a random order of the layers reaches it in less than one case in "
        "twenty (of four layers or fewer, none can be). 95 % bootstrap intervals over layers are in "
        f"<code>summary.json</code>.</p>{figure}"
    )


def _protection_section(figure: str, table: str, meta: Mapping[str, Any]) -> str:
    few = f"{meta['protection_gradients']:,} gradients"
    if meta["protection_gradients"] < meta["gradients"]:
        few += f" and not {meta['gradients']:,} as above, so that it is lower than there"
    return (
        "<p>Hiding a layer withholds its gradient. Below, layers are hidden one after another in the order of each "
        "metric, and what the others still tell is measured again: usable information of all remaining layers "
        "together, and attacks on the gradient that is left. Lower is better, except for the RMSE of an attack. "
        f"“{escape(layers_tables.FORWARD)}” is the baseline that looks at nothing; “greedy” hides next what leaves "
        f"the least information. Information is estimated from {few}; intervals of attacks are over examples.</p>"
        f"{figure}{table}"
    )


def _attack_note(protection: Sequence[Mapping[str, Any]]) -> str:
    reasons = {spec: scores["refused"] for row in protection for spec, scores in row["attacks"].items()
               if "refused" in scores}  # fmt: skip
    return " ".join(f"“{spec}” says: {reason}." for spec, reason in reasons.items())


def read_layers_result(folder: str | os.PathLike) -> LayersResult:
    """Read the result of an earlier layer-wise audit from its folder.

    Args:
        folder: The output folder.

    Returns:
        The result.

    Raises:
        DataError: If a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        lines = {
            name: [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
            for name in ("results.jsonl", "protection/results.jsonl")
        }
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        orders = {name: tuple(order) for name, order in summary["orders"].items()}
        return LayersResult(
            lines["results.jsonl"], summary["agreement"], orders, lines["protection/results.jsonl"], summary["meta"],
            folder,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} holds no finished layer-wise audit, or a damaged one: {error}") from error
