"""The sections of the report page; each returns HTML for one placeholder of template.html."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmleak.report.heatmap import HeatScale, heat_passage, reached_errors
from lmleak.report.passages import comparison, fold, legend
from lmleak.report.rows import (
    METRICS,
    PREDICTORS,
    Row,
    bracketed,
    by_defense,
    by_noise,
    display_name,
    noise_level,
    numbers,
    percent,
    quartiles,
    score,
)
from lmleak.report.tables import NOTHING_LEFT, SMALLEST_LEAK
from lmleak.report.verdict import LEVELS, LITTLE, ONE_VICTIM, best_prediction

SHOWN = 12
"""Examples shown at once; more are folded away, and beyond ``KEPT`` left to results.jsonl."""
KEPT = 200
TONES = {
    LEVELS[0][1]: "tone-high",
    LEVELS[1][1]: "tone-high",
    LEVELS[2][1]: "tone-middle",
    LITTLE: "tone-low",
}


def verdict_section(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Return the verdict on every defense and the texts that carry it, worst and median example."""
    metric, judged = summary["verdict"]["metric"], summary["verdict"]["per_defense"]
    if not judged:
        return '<p class="absent">There are no results.</p>'
    groups = by_defense(rows)
    html = [_banner(judged[0], ""), *(_rank_pair(judged[0], groups, metric))]
    html += [
        part
        for entry in judged[1:]
        for part in (_banner(entry, "defense"), *_rank_pair(entry, groups, metric, only_worst=True))
    ]
    if not any(entry["attack"] for entry in judged):
        return "\n".join(html)
    html.append(
        f'<p class="note">The level is the strongest attack\'s mean {METRICS[metric].label}: '
        + ", ".join(f"{level} from {percent(smallest)}" for smallest, level in LEVELS)
        + f"; one example recovered to {percent(ONE_VICTIM)} or more is never called little.</p>"
    )
    html.append(_other_examples(judged[0], groups, metric))
    return "\n".join(html)


def _banner(entry: Mapping[str, Any], kind: str) -> str:
    tone = TONES.get(entry["level"], "tone-none")
    of = f' <span class="of">with {escape(display_name(entry["defense"]))}</span>' if kind else ""
    return (
        f'<div class="verdict {kind} {tone}"><p class="level">{escape(entry["level"])}{of}</p>'
        f"<p>{escape(entry['sentence'])}</p></div>"
    )


def _scored(entry: Mapping[str, Any], groups: Mapping[str, Sequence[Row]], metric: str) -> list[Row]:
    """Return the rows the strongest attack was scored on, worst first."""
    attack = entry["attack"]
    rows = [row for row in groups[entry["defense"]] if attack and score(row, attack, metric) is not None]
    return sorted(rows, key=lambda row: -(score(row, attack, metric) or 0.0))


def _rank_pair(
    entry: Mapping[str, Any], groups: Mapping[str, Sequence[Row]], metric: str, only_worst: bool = False
) -> list[str]:
    ranked = _scored(entry, groups, metric)
    if not ranked:
        return []
    shown = {0: "Worst example" if len(ranked) > 1 else "The example"}
    if not only_worst and len(ranked) > 2:
        shown[len(ranked) // 2] = "Median example"
    articles = [_article(ranked[place], entry["attack"], metric, name) for place, name in shown.items()]
    return articles if only_worst else [legend(), *articles]


def _article(row: Row, attack: str, metric: str, name: str) -> str:
    scores = ", ".join(
        f"{METRICS[key].label} {percent(value)}"
        for key in dict.fromkeys([metric, "position_accuracy", "rouge1"])
        if (value := score(row, attack, key)) is not None
    )
    return comparison(row, attack, f'{name} <span class="note">(no. {row["example"]}): {scores}</span>')


def _other_examples(entry: Mapping[str, Any], groups: Mapping[str, Sequence[Row]], metric: str) -> str:
    ranked = _scored(entry, groups, metric)
    already = {0, len(ranked) // 2}
    others = [row for place, row in enumerate(ranked) if place not in already or (len(ranked) < 3 and place)]
    articles = [_article(row, entry["attack"], metric, "Example") for row in others[:KEPT]]
    return fold(articles, f"All other examples, worst first ({len(others)}{_left_out(len(others))})")


def _left_out(count: int) -> str:
    return f", the first {KEPT} shown; results.jsonl has them all" if count > KEPT else ""


def noise_section(figure: str, rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Return the figure of risk against noise and the two noise levels a reader looks for."""
    if not by_noise(rows):
        return figure
    marks, metric = summary["noise"], summary["verdict"]["metric"]
    largest, sentences = marks["largest_tested"], []
    caption = (
        "Left axis, logarithmic: median predicted error over the examples, with the band between the quartiles; the "
        "attacker with a Gaussian prior cannot do worse than the spread of the inputs."
    )
    swept = [entry for entry in summary["defenses"] if entry["noise_rms"] is not None]
    if any(entry["strongest_attack"] for entry in summary["defenses"] if entry["undefended"] or entry in swept):
        caption += (
            " Right axis: mean share of the text that each attack recovered. “no noise” is the undefended gradient, "
            "whose predicted error is zero."
        )
    failing, filled = marks["attacks_below_a_tenth_from"], marks["predicted_nothing_left_from"]
    tenth, loudest = f"{percent(SMALLEST_LEAK)} ({METRICS[metric].label})", f"{largest:g} times the gradient's RMS"
    if failing is not None:
        sentences.append(
            f"The attacks recover less than {tenth} from noise of <b>{failing:g} times</b> the gradient's RMS on."
        )
    elif swept[-1]["strongest_attack"]:
        sentences.append(f"Even at {loudest}, the largest noise tested, an attack recovers {tenth} or more.")
    else:
        sentences.append(f"At {loudest}, the largest noise tested, no attack ran.")
    if filled is not None:
        sentences.append(
            "An attacker with a Gaussian prior is predicted to learn almost nothing (an error of "
            f"{percent(NOTHING_LEFT)} of the spread of the inputs or more) from <b>{filled:g} times</b> on."
        )
    elif numbers(rows, "prior_std") and best_prediction(swept[-1]) is not None:
        sentences.append(f"Even at {loudest}, an attacker with a Gaussian prior is predicted to learn something.")
    return f"<p>{' '.join(sentences)}</p>{figure}<p class='note'>{caption}</p>"


def agreement_section(figure: str, summary: Mapping[str, Any]) -> str:
    """Return the table of rank correlations with intervals, one per attack, and the scatter below it."""
    found = summary["correlations"]
    if not any(entry["value"] is not None for entry in found):
        notes = sorted({entry["note"] for entry in found})
        return figure + (f'<p class="absent">No rank correlation exists: {"; ".join(notes)}.</p>' if notes else "")
    swept = any(entry["noise_rms"] is not None for entry in summary["defenses"])
    basis = "every example at every level of the noise sweep" if swept else "every example and defense"
    intro = (
        f"<p>Spearman's rank correlation over {basis}, with a 95 % bootstrap interval over examples. The more text "
        "is recovered, the smaller a useful prediction of the error: −1 is perfect for every score except the "
        "embedding RMSE, itself an error, for which +1 is.</p>"
    )
    if any(entry["scope"] == "same noise" for entry in found):
        intro += (
            "<p>Much of that is the noise level itself, which moves both sides. The last column asks the harder "
            "question: among examples under the same noise, does I2F rank the riskier texts first?</p>"
        )
    tables = [_correlation_table(attack, found) for attack in dict.fromkeys(entry["attack"] for entry in found)]
    return intro + "".join(tables) + figure


def _correlation_table(attack: str, found: Sequence[Mapping[str, Any]]) -> str:
    cells = {
        (entry["metric"], entry["predictor"], entry["scope"]): entry for entry in found if entry["attack"] == attack
    }
    columns = {(predictor, "all"): title for predictor, title in PREDICTORS.items()}
    columns["influence_rms", "same noise"] = "I2F, same noise"
    columns = {key: title for key, title in columns.items() if any(key == found[1:] for found in cells)}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    body = "".join(
        f'<tr><td class="name">{escape(METRICS[metric].label)}</td>'
        + "".join(f"<td>{_correlation_cell(cells.get((metric, *key)))}</td>" for key in columns)
        + "</tr>"
        for metric in dict.fromkeys(metric for metric, *_ in cells)
    )
    first = next(iter(cells.values()))
    caption = f"{attack} attack, {first['points']} points from {first['examples']} examples"
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f'<thead><tr><th class="name">score</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _correlation_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return f"– <small>{escape(entry['note'])}</small>" if entry else "–"
    if entry["low"] is None:
        return f"{_signed(entry['value'])} <small>{escape(entry['note'])}</small>"
    return _signed(entry["value"]) + bracketed(entry["low"], entry["high"], _signed)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def token_section(rows: Sequence[Row]) -> str:
    """Return the heat map of risk on the text, at the noise level that tells tokens apart best."""
    chosen = heat_rows(rows)
    if not chosen:
        return '<p class="absent">No row has an error per token: it needs a perturbed gradient.</p>'
    scale, level = HeatScale(chosen), noise_level(chosen[0])
    condition = f"noise of {level:g} times the gradient's RMS" if level else display_name(chosen[0]["defense"])
    passages = [
        f'<p class="passage line"><span class="number">{row["example"]}</span>{heat_passage(row, place, scale)}</p>'
        for row in chosen
        for place in range(len(row["token_influence"]))
    ]
    rest = passages[SHOWN:KEPT]
    return (
        f"<p>Predicted error (RMS per coordinate) at each token under {escape(condition)}. Where the noise causes "
        "little error, the token is exposed: darker means higher risk.</p>"
        f"{scale.legend()}{''.join(passages[:SHOWN])}"
        + fold(rest, f"{len(passages) - SHOWN} more texts{_left_out(len(passages))}")
    )


def heat_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one defense for the heat map: the sweep's level nearest to a third of the input's spread.

    Args:
        rows: Result rows.

    Returns:
        Rows with a positive error per token; without a sweep, those of the first defense that has any.
    """
    usable = [row for row in rows if reached_errors(row)]
    levels = {
        level: numbers(group, "predicted_rms") or numbers(group, "bayes_rms") or numbers(group, "influence_rms")
        for level, group in by_noise(usable).items()
    }
    levels = {level: quartiles(values)[1] for level, values in levels.items() if values}
    if levels:
        target = quartiles(numbers(usable, "prior_std") or [1.0])[1] / 3
        level = min(levels, key=lambda level: max(levels[level], 1e-30) / target + target / max(levels[level], 1e-30))
        return by_noise(usable)[level]
    return next(iter(by_defense(usable).values()), [])


def layer_section(figure: str, rows: Sequence[Row]) -> str:
    """Return the per-layer bars with their reading."""
    examples = len({row["example"] for row in rows if row.get("layer_share")})
    if not examples:
        return figure
    whiskers = (
        f"Bars are means over {examples} examples, whiskers their 95 % bootstrap interval."
        if examples > 1
        else "One example; whiskers are two standard errors of the estimate."
    )
    return (
        "<p>Each layer's share of the information that the whole gradient holds about the input. A layer with a "
        "large share is the first candidate for protection, but the layers together often say the same thing "
        f"several times: hiding one need not hide the text.</p>{figure}<p class='note'>{whiskers}</p>"
    )
