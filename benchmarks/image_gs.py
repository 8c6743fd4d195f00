"""GS on images: signs of the derivative always (as published), late (the default) or never, over draws of everything.

    python -m benchmarks.image_gs                     # MNIST of $LMLEAK_DATA or ../shared/data, scikit-learn's digits
    python -m benchmarks.image_gs --draws 4 --mnist FOLDER

Draw d has LeNet weights U(-0.5, 0.5) of seed d // 4, test image d % 4, and of the attack seed (d // 4 + d % 4) % 3;
pixels in [0, 1] without normalisation, clean gradient, labels given, one restart, float32. The aim of 23.4 dB is what
the public implementation of GS reaches on this network in 1,000 iterations.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

import lmleak
from lmleak.adapters import adapt, image_model
from lmleak.attacks.image_matching import SIGNS
from lmleak.data.images import ImageData, load_images
from lmleak.files import write_text_atomically

AIM = 23.4  # dB
SIZE = 28
IMAGES, SEEDS = 4, 3
HERE = Path(__file__).resolve().parent


def draw(data: ImageData, number: int, iterations: int) -> dict:
    """Return the place of one draw and the PSNR in dB of every variant of GS on it."""
    weights, image = divmod(number, IMAGES)
    seed = (weights + image) % SEEDS
    adapter = adapt(image_model("lenet", seed=weights), name="lenet")
    batch = adapter.batch(data.pixels[image : image + 1], data.labels[image : image + 1])
    shared = lmleak.capture_gradient(adapter, batch)
    row = {"data": data.name, "weights": weights, "image": image, "seed": seed}
    for signs in SIGNS:
        found = lmleak.run_attack("gs", adapter, shared, seed=seed, iterations=iterations, signs=signs)
        row[signs] = lmleak.score_images(found, batch, adapter).psnr
    return row


def table(rows: Sequence[dict]) -> str:
    """Return the draws and what they say of each variant, in markdown."""
    lines = [f"| data | weights, image, seed | {' | '.join(SIGNS)} |", f"|---|---|{'---|' * len(SIGNS)}"]
    for row in rows:
        cells = (f"{row[s]:.1f}" if row[s] >= AIM else f"**{row[s]:.1f}**" for s in SIGNS)
        lines.append(f"| {row['data']} | {row['weights']}, {row['image']}, {row['seed']} | {' | '.join(cells)} |")
    for name in dict.fromkeys(row["data"] for row in rows):
        own = {s: [row[s] for row in rows if row["data"] == name] for s in SIGNS}
        for what, number in (
            ("lowest", lambda values: f"{min(values):.1f}"),
            ("median", lambda values: f"{median(values):.1f}"),
            (f"at least {AIM} dB", lambda values: f"{sum(v >= AIM for v in values)} of {len(values)}"),
        ):
            lines.append(f"| {name} | {what} | {' | '.join(number(own[s]) for s in SIGNS)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every draw and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    data = Path(os.environ.get("LMLEAK_DATA", HERE.parents[1] / "shared" / "data"))
    parser.add_argument("--mnist", default=str(data / "mnist"), help="folder of the idx files")
    parser.add_argument("--draws", type=int, default=24, help="draws on MNIST")
    parser.add_argument("--digits", type=int, default=8, help="draws on scikit-learn's digits, resized to 28x28")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--output", default=str(HERE / "results" / "image_gs.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    sources = [(options.draws, {"source": options.mnist, "split": "t10k"}), (options.digits, {"source": "digits"})]
    for count, source in sources:
        images = load_images(**source, size=SIZE, limit=IMAGES) if count else None
        for number in range(count):
            rows.append(draw(images, number, options.iterations))
            print("  ".join(f"{v:.1f} dB {k}" if k in SIGNS else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    title = f"# GS on images: when to follow signs\n\nPSNR in dB after {options.iterations} iterations"
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
    page = f"{title}, `python -m benchmarks.image_gs`. {about} Bold: below it.\n\n{table(rows)}"
    write_text_atomically(options.output, page)
    print(page)


if __name__ == "__main__":
    main()
