"""Writing the report: one self-contained HTML page, its figures as files, and summary.json."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from lmleak.files import write_bytes_atomically
from lmleak.report import figures, listings, provenance, sections
from lmleak.report.drawing import encode
from lmleak.report.rows import Row
from lmleak.report.tables import summarise

ALTERNATIVES = {  # what a reader who cannot see the figure should know it shows
    "risk_versus_noise": "Predicted error and text recovered by the attacks, against the amount of noise",
    "layers": "Share of the information about the input held by each layer",
    "agreement": "Predicted error of each row against what the attack reached",
}


def write_report(rows: Sequence[Row], meta: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write report.html, summary.json and figures/*.{png,pdf} into a folder.

    Everything is drawn and rendered in memory first, then each file is put in place by a rename, so that a
    failure leaves neither a partial file nor a page that disagrees with its figures.

    Args:
        rows: Result rows, as parsed from results.jsonl.
        meta: Description of the run.
        folder: Where to write; created if absent.

    Returns:
        Path of the page.
    """
    summary = summarise(rows, meta)
    drawn = {name: draw(rows) for name, draw in figures.FIGURES.items()}
    return write_files(Path(folder), summary, drawn, render(rows, summary, drawn))


def write_files(folder: Path, summary: Mapping[str, Any], drawn: Mapping[str, Figure | None], page: str) -> Path:
    """Write the parts of a report; all are rendered before the first is put in place.

    Args:
        folder: Where to write; created if absent.
        summary: Content of summary.json.
        drawn: Figures by name, None where there is nothing to draw.
        page: Content of report.html.

    Returns:
        Path of the page.
    """
    contents: dict[str, bytes | None] = {"summary.json": strict_json(summary).encode()}
    for name, figure in drawn.items():
        for kind in ("png", "pdf"):
            contents[f"figures/{name}.{kind}"] = encode(figure, kind) if figure else None
    contents["report.html"] = page.encode()  # last: it refers to all the others
    for name, content in contents.items():
        if content is None:  # nothing to draw: leave no figure of an earlier run beside this page
            (folder / name).unlink(missing_ok=True)
        else:
            write_bytes_atomically(folder / name, content)
    return folder / "report.html"


def render(rows: Sequence[Row], summary: Mapping[str, Any], drawn: Mapping[str, Figure | None]) -> str:
    """Return the page as HTML.

    Args:
        rows: Result rows.
        summary: What ``tables.summarise`` returned for them.
        drawn: The figures, None where there is nothing to draw.

    Returns:
        A complete document that refers to nothing outside itself.
    """
    meta, folder = summary["meta"], files("lmleak.report")
    images = {name: _image(name, figure, rows) for name, figure in drawn.items()}
    return Template(folder.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        style=folder.joinpath("style.css").read_text(encoding="utf-8"),
        model=escape(str(meta.get("model", "a model"))),
        lead=provenance.lead(rows, meta),
        verdict=sections.verdict_section(rows, summary),
        noise=sections.noise_section(images["risk_versus_noise"], rows, summary),
        agreement=sections.agreement_section(images["agreement"], summary),
        tokens=sections.token_section(rows),
        layers=sections.layer_section(images["layers"], rows),
        table=listings.table_section(rows, summary),
        damping=escape(provenance.damping_note(rows)),
        batch=escape(provenance.batch_note(meta)),
        products=provenance.products_items(rows, meta),
        reproduce=provenance.reproduce_section(meta),
    )


def _image(name: str, figure: Figure | None, rows: Sequence[Row]) -> str:
    if figure is None:
        return f'<p class="absent">{escape(figures.missing(name, rows))}</p>'
    return embedded_figure(figure, ALTERNATIVES[name])


def embedded_figure(figure: Figure, alternative: str) -> str:
    """Return a figure as HTML that holds it: an SVG inside an img element, whose ids clash with no other figure's.

    Args:
        figure: The figure.
        alternative: What a reader who cannot see it should know it shows.

    Returns:
        The element.
    """
    content = base64.b64encode(encode(figure, "svg")).decode()
    width = "narrow" if figure.get_figwidth() < 7 else "wide"
    return (
        f'<figure class="scroll" tabindex="0"><img class="{width}" alt="{escape(alternative)}" '
        f'src="data:image/svg+xml;base64,{content}"></figure>'
    )


def strict_json(value: Any) -> str:
    """Return a value as JSON that every parser accepts: NaN and infinity become null.

    Args:
        value: Plain Python values.

    Returns:
        Indented JSON with a final newline.
    """

    def finite(item: Any) -> Any:
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        if isinstance(item, Mapping):
            return {str(key): finite(entry) for key, entry in item.items()}
        return [finite(entry) for entry in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
