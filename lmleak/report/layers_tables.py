"""Tables and sentences of a layer-wise audit: for the page, and for the console."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from lmleak.evaluation.layers_order import LayerScores
from lmleak.evaluation.layers_protection import FORWARD, Curves
from lmleak.evaluation.layers_settings import Row
from lmleak.report.layers_figures import SHOWN_SCORES, interval_of, mean_of, whole_information
from lmleak.report.rows import bracketed, compact, percent

SIGNIFICANT = 0.05
WIDEST = 8  # layers that a console shows side by side


def findings(scores: Sequence[LayerScores], rows: Sequence[Row], curves: Curves) -> list[str]:
    """Return the main results, one sentence or two each.

    Args:
        scores: The metrics.
        rows: Their rows.
        curves: What is left when layers are hidden.

    Returns:
        Plain text, one entry per attribute, original and attack.
    """
    whole, found = whole_information(rows), []
    for score in scores:
        if score.metric.group not in ("latent", "original"):
            continue
        best = score.order()[0]
        low, high = interval_of(score, rows, best)
        row = whole.get((score.metric.group, score.target)) or score.row(rows, best)
        alone = f"{best} tells most by itself, {compact(score.values[best])} nats [{compact(low)}, {compact(high)}]"
        if score.metric.group == "latent":
            found.append(
                f"Attribute {score.target}: all layers together tell {compact(row['nats'])} of "
                f"{compact(row['baseline_nats'])} nats (accuracy {percent(row['accuracy'])}, guessing "
                f"{percent(row['majority_accuracy'])}); {alone}.{_chance(row)}"
            )
        else:
            found.append(
                f"Input ({score.target}): all layers together explain {percent(max(row['r_squared'], 0.0))} of its "
                f"variance to the decoder; {alone}.{_chance(row)}"
            )
    return found + _attack_findings(curves)


def _chance(row: Row) -> str:
    p = row.get("p_value")
    if p is None or p <= SIGNIFICANT:
        return ""
    smallest = 1 / (row["permutations"] + 1)
    if smallest > SIGNIFICANT:
        return (
            f" The linear test cannot reject chance: the smallest possible p is {smallest:.2f} "
            f"(permutations={row['permutations']}; write 19 or more)."
        )
    return f" The linear test does not tell it from chance (p = {p:.2f})."


def _attack_findings(curves: Curves) -> list[str]:
    """Return per attack what it recovers of the whole gradient, and the fewest hidden layers that stop it."""
    if not curves:
        return []
    rows = {tuple(sorted(hidden)): row for steps in curves.values() for _, hidden, row in steps}
    found = []
    for spec, clean in rows[()]["attacks"].items():
        if "refused" in clean:
            found.append(f"Attack {spec} cannot run here: {clean['refused']}")
            continue
        stopped = [row for row in rows.values() if "refused" in row["attacks"][spec]]
        sentence = f"Attack {spec} on the whole gradient: {attack_cell(clean)}."
        if stopped:
            fewest = min(stopped, key=lambda row: len(row["hidden"]))
            verb = "is" if len(fewest["hidden"]) == 1 else "are"
            sentence += f" It cannot run any more once {' and '.join(fewest['hidden'])} {verb} hidden."
        worst = [row for row in rows.values() if row["hidden"] and "refused" not in row["attacks"][spec]]
        if worst:
            last = max(worst, key=lambda row: len(row["hidden"]))
            sentence += f" With {', '.join(last['hidden'])} hidden: {attack_cell(last['attacks'][spec])}."
        found.append(sentence)
    return found


def attack_cell(scores: Mapping[str, Any]) -> str:
    """Return one attack's outcome in a few words."""
    if "refused" in scores:
        return "cannot run"
    name = _shown(scores)
    if name == "token_recall":
        return f"{percent(scores[name])} of tokens"
    return "no finite result" if name is None else f"RMSE {compact(scores[name])}"


def _shown(scores: Mapping[str, Any]) -> str | None:
    return next((score for score in SHOWN_SCORES if scores.get(score) is not None), None)


def _mean_of(curves: Curves, spec: str) -> str:
    return mean_of([row["attacks"][spec] for steps in curves.values() for _, _, row in steps])


def _spread(scores: Mapping[str, Any]) -> str:
    """Return the 95 % interval over the attacked examples, as HTML; nothing where there is none."""
    name = _shown(scores)
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    if low is None or high is None:
        return ""
    write = percent if name == "token_recall" else compact
    return bracketed(low, high, write)


def score_table(scores: Sequence[LayerScores], rows: Sequence[Row], layers: Mapping[str, int]) -> str:
    """Return every metric of every layer with its interval, and p-values where there is a test, as HTML."""
    head = "".join(f"<th>{escape(_heading(score))}</th>" for score in scores)
    body = []
    for layer, count in layers.items():
        cells = "".join(f"<td>{_score_cell(score, rows, layer)}</td>" for score in scores)
        body.append(f'<tr><td class="name">{escape(layer)}</td><td>{count:,}</td>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr><th class="name">layer</th><th>parameters</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _heading(score: LayerScores) -> str:
    unit = f" ({score.metric.unit})" if score.metric.unit else ""
    return f"{score.metric.title}{f', {score.target}' if score.target else ''}{unit}"


def _score_cell(score: LayerScores, rows: Sequence[Row], layer: str) -> str:
    low, high = interval_of(score, rows, layer)
    row = score.row(rows, layer)
    text = compact(score.values[layer])
    if low is not None:
        text += bracketed(low, high)
    if row.get("p_value") is not None:
        text += f" <small>p = {row['p_value']:.3f}</small>"
    if row.get("converged") is False:
        text = f"≈ {text}"
    return text


def hidden_rows(curves: Curves) -> list[tuple[tuple[str, ...], Row, list[str]]]:
    """Return every set of hidden layers once: the layers in the network's order, its row, the orders that begin so."""
    found: dict[tuple[str, ...], tuple[Row, list[str]]] = {}
    for name, steps in curves.items():
        for _, _, row in steps:
            found.setdefault(tuple(row["hidden"]), (row, []))[1].append(name)
    return [(hidden, *found[hidden]) for hidden in sorted(found, key=len)]


def protection_table(curves: Curves) -> str:
    """Return what is left for every set of hidden layers, with the orders that hide it first, as HTML."""
    if not curves:
        return ""
    first = next(iter(curves.values()))[0][2]
    head = "".join(f"<th>{escape(name)} (nats)</th>" for name in [*first["latent"], *first["original"]])
    head += "".join(f"<th>{escape(spec)}, {_mean_of(curves, spec)}</th>" for spec in first["attacks"])
    body = []
    for hidden, row, orders in hidden_rows(curves):
        cells = [_left(part) for group in ("latent", "original") for part in row[group].values()]
        cells += [attack_cell(scores) + _spread(scores) for scores in row["attacks"].values()]
        chosen = "all" if len(orders) == len(curves) else ", ".join(orders)
        body.append(
            f'<tr><td class="name">{_together(hidden) or "nothing"}</td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="name"><small>{escape(chosen)}</small></td></tr>'
        )
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr><th class="name">hidden</th>'
        f'{head}<th class="name">orders that hide these first</th></tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div>"
    )


def _together(layers: Sequence[str]) -> str:
    """Return names of layers as HTML, each kept on one line."""
    return ", ".join(escape(layer).replace(" ", "&nbsp;") for layer in layers)


def _left(information: Mapping[str, Any]) -> str:
    return compact(information["nats"]) + bracketed(information["low"], information["high"])


def layers_table(scores: Sequence[LayerScores], layers: Mapping[str, int]) -> Table:
    """Return the table for the console: metrics down; across, the layers, or of many the three that leak most."""
    table = Table(title="Leakage per layer (* leaks most)")
    table.add_column("metric")
    table.add_column("unit")
    few = len(layers) <= WIDEST
    for name in layers if few else ("first", "second", "third"):
        table.add_column(name, justify="right")
    for score in scores:
        order = score.order()
        if few:
            cells = [("*" if layer == order[0] else "") + compact(score.values[layer]) for layer in layers]
        else:
            cells = [f"{layer} {compact(score.values[layer])}" for layer in order[:3]]
        table.add_row(score.name, score.metric.unit or "–", *cells)
    return table


def orders_table(curves: Curves) -> Table:
    """Return the table for the console: what is left when half of the layers are hidden, which, and by whose choice.

    Sets of hidden layers that several orders choose are shown once.
    """
    steps = curves[FORWARD]
    half = steps[len(steps) // 2][0]
    first = steps[0][2]
    table = Table(title=f"What is left with {half} layer(s) hidden")
    table.add_column("hidden", overflow="fold")
    for name in [*first["latent"], *first["original"]]:
        table.add_column(f"{name}\nnats", justify="right")
    for spec in first["attacks"]:
        table.add_column(f"{spec}\n{_mean_of(curves, spec)}", justify="right")
    table.add_column("hidden first by", overflow="fold")
    for hidden, row, orders in hidden_rows(curves):
        if len(hidden) in (0, half):
            cells = [compact(part["nats"]) for group in ("latent", "original") for part in row[group].values()]
            cells += [attack_cell(scores) for scores in row["attacks"].values()]
            table.add_row(", ".join(hidden) or "nothing", *cells, ", ".join(orders) if hidden else "")
    return table
