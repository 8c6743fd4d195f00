"""What the numbers rest on: the words about input, damping, batch and how to run it again, as HTML or plain text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmleak.report.rows import Row, compact, number, numbers, quartiles


def lead(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """Return the line under the title: what was audited."""
    size = int(meta.get("batch_size") or 1)
    examples = len({row["example"] for row in rows})
    what = f"{examples} gradient{'s' * (examples != 1)} of {size} text{'s' * (size != 1)} each"
    parts = [meta.get("model"), meta.get("task"), meta.get("data"), what, str(meta.get("date") or "").split("T")[0]]
    return " · ".join(escape(str(part)) for part in parts if part)


def damping_note(rows: Sequence[Row]) -> str:
    """Return which damping and prior spread the rows used."""
    dampings, spreads = numbers(rows, "damping"), numbers(rows, "prior_std")
    if not dampings:
        return "The rows do not record a damping."
    low, high = min(dampings), max(dampings)
    span = compact(low) if low == high else f"{compact(low)} to {compact(high)}"
    prior = f" The inputs' spread is taken as {compact(quartiles(spreads)[1])} per coordinate." if spreads else ""
    return f"Here it is {span}{_damping_meaning(rows)}.{prior}"


def _damping_meaning(rows: Sequence[Row]) -> str:
    """Say what share of the largest eigenvalue the damping is, if it is the same share everywhere."""
    pairs = [(number(row.get("damping")), number(row.get("lambda_max"))) for row in rows]
    shares = [damping / largest for damping, largest in pairs if damping and largest]
    if not shares or max(shares) > 1.05 * min(shares):
        return ""
    return f" ({compact(min(shares))} times the largest eigenvalue of J Jᵀ)"


NAMED = 5  # parameters that a page names


def products_items(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """Return the list items, as HTML, about how products with J were made and checked; nothing if nothing is known."""
    if meta.get("implementation") == "autodiff":
        return "<li><b>All products with the derivatives went by double backward,</b> as was asked for.</li>"
    items = []
    names = list(dict.fromkeys(name for row in rows for name in row.get("by_autodiff", ())))
    if names:
        listed = ", ".join(f"<code>{escape(name)}</code>" for name in names[:NAMED])
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        items.append(
            "<li><b>Some layers are of a kind that lmleak has no short formula for.</b> Products with the derivatives "
            f"of {listed}{more} went by double backward: as exact as the others, but slower and larger in memory.</li>"
        )
    if (difference := number(meta.get("product_difference"))) is not None:
        items.append(
            "<li><b>Short formulas were checked on the first example only.</b> There products with the derivatives "
            f"differed by at most {compact(difference)} (relative) from double backward, which knows no formulas.</li>"
        )
    return "\n".join(items)


def batch_note(meta: Mapping[str, Any]) -> str:
    """Return what the batch size means for the numbers."""
    size = int(meta.get("batch_size") or 1)
    if size == 1:
        return (
            "Here every gradient is of one text, the riskiest case. Larger batches mix their texts, "
            "which makes recovery harder but, for the span attack on decoders, rarely impossible."
        )
    return (
        f"Here each gradient is the mean over {size} texts; recovered texts are matched to the originals after "
        "the attack. Fewer texts in a batch usually leak more."
    )


FIELDS = (
    "model", "task", "data", "samples", "batch_size", "shared", "defenses", "noise_levels", "attacks",
    "parameters", "seed", "world_size", "device", "commit", "date", "seconds", "versions",
)  # fmt: skip
"""What a report says of the circumstances of an audit, in this order."""


def reproduce_section(meta: Mapping[str, Any], fields: Sequence[str] = FIELDS) -> str:
    """Return the command, the configuration, the versions, the seed and the commit."""
    command = meta.get("command")
    html = f"<pre>{escape(str(command))}</pre>" if command else ""
    html += (
        "<p>The resolved configuration is in <code>config.yaml</code>, every row in <code>results.jsonl</code>.</p>"
    )
    facts = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_fact(meta[name]))}</dd>"
        for name in fields
        if meta.get(name) not in (None, "")
    )
    return f'{html}<dl class="facts">{facts}</dl>'


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
