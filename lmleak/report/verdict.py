"""The verdict: what the attackers got back, in words that never claim more than was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmleak.report.rows import METRICS, Row, by_defense, compact, display_name, number, percent, score

LEVELS = ((0.9, "everything leaks"), (0.5, "most leaks"), (0.1, "some leaks"))
"""Smallest mean share of the text recovered for each level, worst first."""

LITTLE = "little was recovered by these attacks"
NOT_ATTACKED = "not attacked"
ONE_VICTIM = 0.5
"""One example recovered to this share is a leak, however small the mean over all of them."""

CLEARLY_LESS = 0.5
"""A predicted error below this share of the inputs' spread means that the gradient still tells a lot."""

WORDS = {
    "token_recall": "{share} of the tokens",
    "token_precision": "tokens of which {share} were right",
    "exact_match": "{share} of the texts word for word",
    "position_accuracy": "{share} of the tokens in their places",
}


def risk_level(mean: float | None, worst: float | None) -> str:
    """Return the level of a defense from the strongest attack's mean and worst score.

    The mean decides, except that a single badly hit example is never called "little".
    There is no level "safe": an attack that failed proves nothing about the next one.

    Args:
        mean: Mean share of the text recovered, or None if no attack ran.
        worst: The share recovered from the worst example.

    Returns:
        One of the names in ``LEVELS``, ``LITTLE`` or ``NOT_ATTACKED``.
    """
    if mean is None:
        return NOT_ATTACKED
    for smallest, level in LEVELS:
        if mean >= smallest:
            return level
    return LEVELS[-1][1] if worst is not None and worst >= ONE_VICTIM else LITTLE


def verdict(rows: Sequence[Row], defenses: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Judge the undefended gradient and every defense the owner asked for.

    Args:
        rows: Result rows.
        defenses: The per-defense part of the summary, as ``tables.summarise`` builds it.
        metric: The score the verdict is spoken in.

    Returns:
        ``level`` and ``sentence`` of the first defense judged (the undefended gradient where it was measured),
        ``metric``, and ``per_defense`` with the same for each.
    """
    groups = by_defense(rows)
    asked = [entry for entry in defenses if entry["undefended"] or not entry["sweep"]] or list(defenses[:1])
    judged = [_judge(entry, groups[entry["defense"]], metric) for entry in asked]
    if not judged:
        return {
            "level": NOT_ATTACKED,
            "sentence": "There are no results.",
            "metric": metric,
            "per_defense": [],
        }
    return {
        "level": judged[0]["level"],
        "sentence": judged[0]["sentence"],
        "metric": metric,
        "per_defense": judged,
    }


def _judge(entry: Mapping[str, Any], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    attack = entry["strongest_attack"]
    measured = entry["attacks"][attack][metric] if attack else {"mean": None, "worst": None}
    level = risk_level(measured["mean"], measured["worst"])
    clauses = [_measured(entry, rows, attack, measured, metric) if attack else _unattacked(entry)]
    if level in {LITTLE, LEVELS[-1][1]}:
        clauses.append(_caution(entry, rows))
    return {
        "defense": entry["defense"],
        "level": level,
        "sentence": " ".join(clause for clause in clauses if clause),
        "attack": attack,
        **{key: measured.get(key) for key in ("mean", "low", "high", "worst", "worst_example")},
    }


def _subject(entry: Mapping[str, Any]) -> str:
    return "From the undefended gradient" if entry["undefended"] else f"With {display_name(entry['defense'])}"


def _measured(
    entry: Mapping[str, Any], rows: Sequence[Row], attack: str, measured: Mapping[str, Any], metric: str
) -> str:
    words = WORDS.get(metric, "text with " + METRICS[metric].label + " {share}")
    recovered = words.format(share=percent(measured["mean"]))
    sentence = f"{_subject(entry)}, the {attack} attack got back {recovered}"
    if measured["count"] == 1:
        sentence += " (one example, so no interval)"
    else:
        interval = _interval(measured["low"], measured["high"])
        sentence += f" on average over {measured['count']} examples"
        sentence += f" ({interval}worst example {percent(measured['worst'])})"
    texts = sum(len(row["texts"]) for row in rows if score(row, attack, "exact_match") is not None)
    exact = sum((score(row, attack, "exact_match") or 0.0) * len(row["texts"]) for row in rows)
    if metric != "exact_match" and texts:
        sentence += f", and {round(exact)} of {texts} texts word for word"
    if refused := entry["refused"].get(attack):
        sentence += f"; on {refused['count']} more of the {entry['examples']} examples it could not run"
    return sentence + "."


def _interval(low: float | None, high: float | None) -> str:
    return "" if low == high else f"95% interval {percent(low)} to {percent(high)}, "


def _unattacked(entry: Mapping[str, Any]) -> str:
    reasons = list(dict.fromkeys(refused["reason"] for refused in entry["refused"].values()))
    target = "the undefended gradient" if entry["undefended"] else f"gradients with {display_name(entry['defense'])}"
    why = (
        f"Every attack on {target} was refused ({'; '.join(reasons)})" if reasons else f"No attack was run on {target}"
    )
    theory = (
        "In theory an undefended gradient is inverted exactly wherever it determines the input."
        if entry["undefended"]
        else _predicted(entry)
    )
    return f"{why}, so nothing is known about recovered text. {theory}".strip()


def best_prediction(entry: Mapping[str, Any]) -> float | None:
    """Return the median error predicted for an attacker who knows noise and prior.

    Args:
        entry: The summary of one defense.

    Returns:
        RMS per coordinate, or None.
    """
    field = _best_field(entry)
    return entry[field]["median"] if field else None


def _best_field(entry: Mapping[str, Any]) -> str | None:
    # I2F is no such prediction: it assumes an attacker who takes what was released for the clean gradient.
    return next((field for field in ("predicted_rms", "bayes_rms") if entry[field]), None)


def _about(entry: Mapping[str, Any]) -> str:
    return "about " if entry["unconverged"].get(_best_field(entry)) else ""


def _predicted(entry: Mapping[str, Any]) -> str:
    error = best_prediction(entry)
    if error is None:
        return ""
    return (
        "An attacker who knows the noise and the inputs' spread is predicted to miss by "
        f"{_about(entry)}{compact(error)} (RMS per coordinate)."
    )


def _caution(entry: Mapping[str, Any], rows: Sequence[Row]) -> str:
    spreads = [spread for row in rows if (spread := number(row.get("prior_std")))]
    error = best_prediction(entry)
    if entry["undefended"] or error is None or not spreads or error >= CLEARLY_LESS * min(spreads):
        return "That is no proof of safety: a stronger attacker may recover more."
    return (
        "A stronger attacker may recover more: one who knows the noise and the inputs' spread is predicted to miss by "
        f"{_about(entry)}{compact(error)} per coordinate, {_about(entry)}{percent(error / min(spreads))} "
        "of the inputs' spread."
    )
