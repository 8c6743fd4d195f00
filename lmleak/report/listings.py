"""The two full tables of the report page, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmleak.report.rows import METRICS, PREDICTORS, Row, attack_names, compact, display_name, number, percent
from lmleak.report.tables import prediction_cell


def table_section(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Return the two full tables: what was predicted per defense, what each attack measured."""
    defenses = summary["defenses"]
    note = (
        "The perturbation is the RMS per entry of the gradient; the other columns are errors of the input. I2F counts "
        "what the perturbation does; the predicted RMSE and its average over the noise are those of an attacker who "
        "knows the noise level and the spread of the inputs."
    )
    if any(entry["noise_rms"] for entry in defenses):
        note += " “noise 0.1×” is Gaussian noise of 0.1 times the gradient's RMS."
    return f"{_predicted_table(defenses)}<p class='note'>{note}</p>{_measured_table(defenses, attack_names(rows))}"


def _predicted_table(defenses: Sequence[Mapping[str, Any]]) -> str:
    columns = {"perturbation_rms": "perturbation"} | PREDICTORS | {"bayes_rms": "Gaussian-prior attacker, on average"}
    columns = {field: title for field, title in columns.items() if any(entry[field] for entry in defenses)}
    early = any(entry["unconverged"]["influence_rms"] for entry in defenses)
    head = "".join(f"<th>{title}</th>" for title in [*columns.values(), *["I2F unconverged"] * early])
    body = "".join(
        f'<tr><td class="name">{escape(display_name(entry["defense"], entry["noise_rms"]))}</td>'
        f"<td>{entry['examples']}</td>"
        + "".join(f"<td>{prediction_cell(entry, field)}{_quartile_note(entry[field])}</td>" for field in columns)
        + (f"<td>{entry['unconverged']['influence_rms']}</td></tr>" if early else "</tr>")
        for entry in defenses
    )
    return (
        '<div class="scroll" tabindex="0"><table class="dense">'
        "<caption>Predicted error of an ideal attacker, RMS per coordinate: median over examples, quartiles</caption>"
        "<thead><tr>"
        f'<th class="name">defense</th><th>examples</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _quartile_note(spread: Mapping[str, float] | None) -> str:
    if spread is None or spread["low_quartile"] == spread["high_quartile"]:
        return ""
    return f"<br><small>{compact(spread['low_quartile'])}–{compact(spread['high_quartile'])}</small>"


def _measured_table(defenses: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> str:
    if not attacks:
        return '<p class="absent">No attack was run, so nothing was measured.</p>'
    shown = [name for name in METRICS if any(name in e for entry in defenses for e in entry["attacks"].values())]
    head = "".join(f"<th>{METRICS[name].label}</th>" for name in shown)
    body = "".join(
        _measured_line(entry, attack, shown, first=attack == attacks[0]) for entry in defenses for attack in attacks
    )
    return (
        '<div class="scroll" tabindex="0"><table class="dense">'
        "<caption>Measured: mean over examples, its 95 % interval, the worst example</caption>"
        f'<thead><tr><th class="name">defense</th><th class="name">attack</th>{head}<th>seconds</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _measured_line(entry: Mapping[str, Any], attack: str, shown: Sequence[str], first: bool) -> str:
    name = escape(display_name(entry["defense"], entry["noise_rms"])) if first else ""
    scores, refused = entry["attacks"].get(attack), entry["refused"].get(attack)
    part = f"<br><small>refused on {refused['count']} of {entry['examples']}</small>" if scores and refused else ""
    head = f'<tr{" class=first" * first}><td class="name">{name}</td><td class="name">{escape(attack)}{part}</td>'
    if scores is None:
        why = f"refused: {refused['reason']}" if refused else "not run"
        return f'{head}<td class="refused" colspan="{len(shown) + 1}">{escape(why)}</td></tr>'
    cells = "".join(f"<td>{_score_cell(scores.get(metric), metric)}</td>" for metric in shown)
    return f"{head}{cells}<td>{compact(number(scores.get('seconds')))}</td></tr>"


def _score_cell(interval: Mapping[str, Any] | None, metric: str) -> str:
    if interval is None:
        return "–"
    share = METRICS[metric].leaks_upward
    mean, worst, low, high = (
        (percent if share else compact)(interval[key]) for key in ("mean", "worst", "low", "high")
    )
    span = "" if interval["low"] in {None, interval["high"]} else f"<br><small>{low.rstrip('%')}–{high}</small>"
    return f"{mean}{span}<br><small>worst {worst}</small>"
