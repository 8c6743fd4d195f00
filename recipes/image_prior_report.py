"""Tables, figure and grid of the recipe image_prior."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from image_tables import Entry, drawable, in_few_colours, publish
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lmleak.evaluation.image_attack import images_of
from lmleak.files import write_bytes_atomically
from lmleak.metrics.agreement import bootstrap_mean
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, SKY, VERMILION, encode, house_style, light_grid
from lmleak.report.image_grid import image_grid

PLAIN, PRIORS = ("gs", "gauss-newton", "gaussian prior"), ("latents", "gias")
LOOKS = dict(
    zip((*PLAIN, *PRIORS), ((GREY, "s"), (SKY, "D"), (BLUE, "o"), (ORANGE, "^"), (VERMILION, "v")), strict=True)
)
RANGE = "decoder's nearest image"
SHOWN = 3  # images per kind in the grid


def interval(values: Iterable[float | None], digits: int) -> str:
    """Return a mean with its 95 % interval by bootstrap over images; "" if a number is missing."""
    values = list(values)
    if not values or None in values:
        return ""
    found = bootstrap_mean(values)
    bounds = "" if found.low is None else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.value:.{digits}f}{bounds}"


def chosen(rows: Sequence[dict], **facts: object) -> list[dict]:
    """Return the rows with these facts, in the order of their images."""
    found = [row for row in rows if all(row.get(key) == value for key, value in facts.items())]
    return sorted(found, key=lambda row: row["sample"])


def levels_of(rows: Sequence[dict]) -> list[tuple[str, float]]:
    """Return what was done to gradients, with strengths."""
    return list(dict.fromkeys((row["what"], row["strength"]) for row in rows if row["what"] != "range"))


def summary(rows: Sequence[dict]) -> list[Entry]:
    """Return one line per kind of images, level and attacker: means over images with 95 % intervals."""
    entries: list[Entry] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for what, strength in levels_of(rows):
            for attack in LOOKS:
                own = chosen(rows, kind=kind, what=what, strength=strength, attack=attack)
                entries.append({
                    "images": kind, "release": release(what, strength), "attack": attack, "number": len(own),
                    "RMSE_pixel": interval((row["rmse_pixel"] for row in own), 3),
                    "PSNR_dB": interval((row["psnr"] for row in own), 1),
                    "SSIM": interval((row["ssim"] for row in own), 2),
                })  # fmt: skip
        own = chosen(rows, kind=kind, what="range")
        entries.append({
            "images": kind, "release": "", "attack": RANGE, "number": len(own),
            "RMSE_pixel": interval((row["rmse_pixel"] for row in own), 3),
            "PSNR_dB": interval((row["psnr"] for row in own), 1), "SSIM": "",
        })  # fmt: skip
    return entries


def gains(rows: Sequence[dict]) -> list[Entry]:
    """Return what each generative attacker gains in PSNR over the strongest of the plain ones, image by image.

    The strongest plain attacker is that of the largest mean PSNR at the kind and level; differences are paired.
    """
    entries: list[Entry] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for what, strength in levels_of(rows):
            own = {
                a: [r["psnr"] for r in chosen(rows, kind=kind, what=what, strength=strength, attack=a)] for a in LOOKS
            }
            if any(None in values for values in own.values()):
                continue
            best = max(PLAIN, key=lambda name: sum(own[name]))
            entry = {"images": kind, "release": release(what, strength), "strongest_without_decoder": best,
                     "its_PSNR_dB": interval(own[best], 1)}  # fmt: skip
            for attack in PRIORS:
                differences = [a - b for a, b in zip(own[attack], own[best], strict=True)]
                entry[f"{attack}_gains_dB"] = interval(differences, 1)
            entries.append(entry)
    return entries


def release(what: str, strength: float) -> str:
    """Return a level in words."""
    if what == "pruned":
        return f"{strength:.3g} pruned"
    return f"noise {strength:g}x" if strength else "clean"


def figure(rows: Sequence[dict]) -> Figure:
    """Draw the RMSE of every attacker over noise and pruning, one column per kind of images."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    whats = [what for what in ("noise", "pruned") if any(row["what"] == what for row in rows)]
    with house_style():
        drawing = Figure(figsize=(0.6 + 3.9 * len(kinds), 0.9 + 3.3 * len(whats)), layout="constrained")
        axes = drawing.subplots(len(whats), len(kinds), sharey=True, squeeze=False)
        for line, what in zip(axes, whats, strict=True):
            for place, kind in zip(line, kinds, strict=True):
                _panel(place, rows, kind, what)
            line[0].set_ylabel("RMSE, pixel values (white - black = 1)")
        for place, kind in zip(axes[0], kinds, strict=True):
            place.set_title(f"private images: {kind}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawing


def _panel(axes: Axes, rows: Sequence[dict], kind: str, what: str) -> None:
    """Draw one kind of images under noise or pruning; levels are evenly spaced, since zero has no logarithm."""
    strengths = [strength for name, strength in levels_of(rows) if name == what]
    axes.set_yscale("log")
    for shift, (attack, (colour, marker)) in enumerate(LOOKS.items()):
        means, low, high = [], [], []
        for strength in strengths:
            own = [r["rmse_pixel"] for r in chosen(rows, kind=kind, what=what, strength=strength, attack=attack)]
            found = None if None in own else bootstrap_mean(own)
            means.append(None if found is None else found.value)
            low.append(0.0 if found is None or found.low is None else found.value - found.low)
            high.append(0.0 if found is None or found.high is None else found.high - found.value)
        places = [i + 0.09 * (shift - 2) for i in range(len(strengths))]
        axes.errorbar(
            places, drawable(means), yerr=[low, high], color=colour, marker=marker, markersize=5, linewidth=1.2,
            elinewidth=1, label=attack,
        )  # fmt: skip
    nearest = [row["rmse_pixel"] for row in chosen(rows, kind=kind, what="range")]
    axes.axhline(sum(nearest) / len(nearest), color=INK, linewidth=1, linestyle=":", label=RANGE)
    axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.set_xlabel("noise, multiples of the gradient's rms" if what == "noise" else "share of the coordinates pruned")
    light_grid(axes)


def picture(rows: Sequence[dict], originals: Mapping[str, Tensor], what: str, strength: float) -> Figure:
    """Draw the first images of every kind and what every attacker recovered of them."""
    true, titles, recovered = [], [], {attack: [] for attack in LOOKS}
    for kind, pixels in originals.items():
        first = pixels[:SHOWN]
        true.append(first)
        titles += [kind] * len(first)
        for attack, found in recovered.items():
            own = chosen(rows, kind=kind, what=what, strength=strength, attack=attack)[: len(first)]
            found += [images_of(row, first[:1]) for row in own]
    return image_grid(
        torch.cat(true), {attack: torch.cat(found) for attack, found in recovered.items()}, column_titles=titles,
        differences=False,
    )  # fmt: skip


def write_results(rows: Sequence[dict], originals: Mapping[str, Tensor], folder: Path) -> None:
    """Write tables, figure and grids of a finished run, and print the tables.

    Args:
        rows: All rows.
        originals: Private pixel values (N, C, H, W) by kind.
        folder: Where to.
    """
    publish(folder, "image_prior", summary(rows), lambda _: figure(rows))
    publish(folder, "image_prior_gains", gains(rows))
    for what, strength in levels_of(rows):
        image = in_few_colours(encode(picture(rows, originals, what, strength), "png"))
        name = f"image_prior-{release(what, strength).replace(' ', '-')}.png"
        write_bytes_atomically(folder / name, image)
