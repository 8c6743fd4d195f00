"""Numbers of the report: the summary dictionary and the console table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lmleak.metrics.agreement import bootstrap_mean
from lmleak.report.correlation import around, best_predictors, correlations
from lmleak.report.rows import (
    CONVERGED,
    METRICS,
    PREDICTORS,
    Row,
    attack_names,
    by_defense,
    by_noise,
    compact,
    display_name,
    is_undefended,
    noise_level,
    numbers,
    percent,
    quartiles,
    refusal,
    risk_metric,
    score,
)
from lmleak.report.verdict import LEVELS, LITTLE, NOT_ATTACKED, best_prediction, verdict

PREDICTIONS = (*PREDICTORS, "bayes_rms", "perturbation_rms")
SMALLEST_LEAK = LEVELS[-1][0]
NOTHING_LEFT = 0.9
"""An error of this share of the inputs' spread counts as knowing no more than the prior."""


def summarise(rows: Sequence[Row], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Condense the rows of a run into the numbers of its summary.json.

    Means over examples carry a 95 % bootstrap interval (None where there is one example only). Influence and
    its relatives are in RMS units (per free coordinate of the input) and summarised by median and quartiles.

    Args:
        rows: Result rows, one per example and defense.
        meta: Description of the run; ``metric_of_risk`` (a share of the text, else ConfigError) and ``seed`` are
            used, the rest is passed through.

    Returns:
        ``verdict``, ``defenses`` (one entry each), ``correlations``, ``noise`` (where the sweep crosses the
        marks a reader asks for) and ``meta``; plain Python values only.
    """
    metric, seed = risk_metric(meta), int(meta.get("seed") or 0)
    defenses = [_defense_entry(name, group, metric, seed) for name, group in by_defense(rows).items()]
    return {
        "verdict": verdict(rows, defenses, metric),
        "defenses": defenses,
        "correlations": correlations(rows, seed),
        "best_predictors": best_predictors(rows, seed),
        "noise": _crossings(rows, defenses, metric),
        "meta": dict(meta),
    }


def _defense_entry(name: str, rows: Sequence[Row], metric: str, seed: int) -> dict[str, Any]:
    attacks = {attack: _attack_entry(rows, attack, seed) for attack in attack_names(rows)}
    upper = numbers(rows, "influence_upper_rms")
    ran = {attack: entry for attack, entry in attacks.items() if metric in entry}
    strongest = max(ran, key=lambda attack: (ran[attack][metric]["mean"], ran[attack][metric]["worst"]), default=None)
    return {
        "defense": name,
        "undefended": is_undefended(rows[0]),
        "sweep": bool(rows[0].get("sweep")),
        "noise_rms": noise_level(rows[0]),
        "examples": len(rows),
        "unconverged": {field: sum(row.get(flag) is False for row in rows) for field, flag in CONVERGED.items()},
        **{field: _spread(numbers(rows, field)) for field in PREDICTIONS},
        "influence_upper_rms": _spread(upper) if len(upper) == len(rows) else None,
        "strongest_attack": strongest,
        "attacks": ran,
        "refused": {attack: refused for attack in attacks if (refused := _refusals(rows, attack))},
    }


def _refusals(rows: Sequence[Row], attack: str) -> dict[str, Any]:
    """Return on how many examples an attack was refused, with the first reason (others differ in details)."""
    reasons = [reason for row in rows if (reason := refusal(row, attack))]
    return {"count": len(reasons), "reason": reasons[0]} if reasons else {}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = quartiles(values)
    return {"median": middle, "low_quartile": low, "high_quartile": high, "smallest": min(values)}


def _attack_entry(rows: Sequence[Row], attack: str, seed: int) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, metric in METRICS.items():
        scored = [(row["example"], value) for row in rows if (value := score(row, attack, name)) is not None]
        if scored:
            entry[name] = _interval(scored, metric.leaks_upward, seed)
    seconds = [value for row in rows if (value := score(row, attack, "seconds")) is not None]
    return entry | ({"seconds": sum(seconds) / len(seconds)} if entry and seconds else {})


def _interval(scored: Sequence[tuple[int, float]], leaks_upward: bool, seed: int) -> dict[str, Any]:
    values = [value for _, value in scored]
    worst_example, worst = (max if leaks_upward else min)(scored, key=lambda pair: pair[1])
    mean = bootstrap_mean(values, seed=seed)
    ends = {"low": None, "high": None} if mean.low is None else around(mean.value, mean.low, mean.high)
    return {"mean": mean.value, **ends, "worst": worst, "worst_example": worst_example, "count": len(values)}


def _crossings(rows: Sequence[Row], defenses: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """Smallest noise tested from which on a mark is passed at every larger level too."""
    sweep = [entry for entry in defenses if entry["noise_rms"] is not None]
    spreads = numbers(rows, "prior_std")

    def attacks_fail(entry: Mapping[str, Any]) -> bool:
        attack = entry["strongest_attack"]
        return attack is not None and entry["attacks"][attack][metric]["mean"] < SMALLEST_LEAK

    def nothing_left(entry: Mapping[str, Any]) -> bool:
        predicted = best_prediction(entry)
        return bool(spreads) and predicted is not None and predicted >= NOTHING_LEFT * min(spreads)

    def first(passed: Any) -> float | None:
        level = None
        for entry in reversed(sweep):  # largest noise first
            if not passed(entry):
                break
            level = entry["noise_rms"]
        return level

    return {
        "largest_tested": max(by_noise(rows), default=None),
        "attacks_below_a_tenth_from": first(attacks_fail),
        "predicted_nothing_left_from": first(nothing_left),
    }


STYLES = {
    LEVELS[0][1]: "bold red",
    LEVELS[1][1]: "bold red",
    LEVELS[2][1]: "yellow",
    LITTLE: "cyan",
    NOT_ATTACKED: "dim",
}


def console_table(rows: Sequence[Row], meta: Mapping[str, Any]) -> Table:
    """Build the table that ends a run on the console: one line per defense and attack.

    Args:
        rows: Result rows.
        meta: Description of the run.

    Returns:
        A rich table with the verdict as its caption.
    """
    return summary_table(summarise(rows, meta))


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Build the console table from a summary that is already there (see ``console_table``).

    Args:
        summary: What ``summarise`` returned.

    Returns:
        A rich table with the verdict as its caption.
    """
    metric, judged = summary["verdict"]["metric"], summary["verdict"]
    caption = Text(judged["level"], style=STYLES[judged["level"]]).append(f": {judged['sentence']}", style="default")
    title = f"What the gradients of {summary['meta'].get('model', 'the model')} leak"
    table = Table(title=Text(title), caption=caption, caption_justify="left", title_justify="left")
    table.add_column("defense", overflow="fold")
    table.add_column("I2F (rms)", justify="right", no_wrap=True)
    table.add_column("attack")
    shown = list(dict.fromkeys([metric, "rouge1", "rougeL", "exact_match"]))
    for name in shown:
        table.add_column(METRICS[name].label, justify="right")
    for entry in summary["defenses"]:
        name, influence = (
            Text(display_name(entry["defense"], entry["noise_rms"])),
            Text(prediction_cell(entry, "influence_rms")),
        )
        for attack, scores in entry["attacks"].items():
            cells = [percent(scores[name]["mean"]) if name in scores else "–" for name in shown]
            table.add_row(name, influence, Text(attack), *cells)
            name = influence = Text("")
        for attack in entry["refused"].keys() - entry["attacks"].keys():
            table.add_row(name, influence, Text(attack), "refused", *["–"] * (len(shown) - 1))
            name = influence = Text("")
        if not entry["attacks"] and not entry["refused"]:
            table.add_row(name, influence, "–", *["–"] * len(shown))
    return table


def prediction_cell(entry: Mapping[str, Any], field: str) -> str:
    """Return a defense's median of a prediction, marked where an iteration behind it stopped short of convergence.

    "≥" marks I2F: it is then the norm of a conjugate-gradient iterate, a lower bound on the solution's, and the
    median of lower bounds is a lower bound on the median; "≤" follows likewise. "≈" marks
    the others, which are bounded on neither side.

    Args:
        entry: One entry of ``summary["defenses"]``.
        field: Which prediction.

    Returns:
        The number, or a dash.
    """
    if entry[field] is None:
        return "–"
    median = entry[field]["median"]
    early = entry["unconverged"].get(field) and median > 0
    if not early or field != "influence_rms":
        return "≈ " * bool(early) + compact(median)
    upper = entry.get("influence_upper_rms")
    return f"≥ {compact(median)}" + (f", ≤ {compact(upper['median'])}" if upper else "")
