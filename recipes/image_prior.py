"""What a generative prior adds to the gradient: images looked for in the range of a decoder, and without one.

    python recipes/train_image_decoder.py --config configs/train_image_decoder/digits.yaml
    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/image_prior.py
        --config configs/image_prior/digits.yaml

(the second on one line). The decoder was trained on the second half of the data; private images are of the first half.
Every private image is attacked three times: as it is ("like" the public ones), turned by 90 degrees ("rotated"), and
with black and white swapped ("negative"), which no public image looks like. Gradients are released clean, under
Gaussian noise of k times their root mean square, or pruned. The attackers know the noise's deviation sigma:
  gs              cosine distance, total variation, valid pixels
  gauss-newton    the nearest gradient
  gaussian prior  gauss-newton with the prior N(0, 1) on normalised pixels, weighed by sigma^2 (most probable image)
  latents         gias on the decoder's latents alone, their prior N(0, I) weighed by sigma^2
  gias            the same, and then the decoder's weights
Where sigma is zero, both priors are weighed as if it were ``floor`` of the gradient's root mean square. The image of
the decoder that is nearest to the private one, found from the truth, is no attack: it tells what ``latents`` cannot
get below. Errors are root mean squares in pixel values (white - black = 1). A killed run continues where it stopped;
one process or several give the same rows.
"""

import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from image_prior_report import write_results
from torch import Tensor

from lmleak.attacks import Attack
from lmleak.attacks.image_decoder import ImageDecoder, load_decoder
from lmleak.attacks.image_matching import ImageGS
from lmleak.attacks.image_newton import GaussNewton
from lmleak.attacks.image_prior import GIAS
from lmleak.config import parse_config
from lmleak.data.images import ImageData
from lmleak.defenses import Defense, GaussianNoise, NoDefense, Prune, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.image_study import ImageStudy, ImageStudyConfig, image_study, study_folder, study_images
from lmleak.gradients import capture_gradient
from lmleak.metrics.image import psnr

KINDS = {
    "like": lambda pixels: pixels,
    "rotated": lambda pixels: pixels.rot90(1, (-2, -1)),
    "negative": lambda pixels: 1 - pixels,
}
PROJECTION_STEPS, PROJECTION_RATE, PROJECTION_STARTS = 300, 0.1, 8


@dataclass(frozen=True, kw_only=True)
class PriorConfig(ImageStudyConfig):
    """Attack images with and without a generative prior."""

    model: str = "lenet"
    """Architecture, weights or hub id."""
    decoder: str = "runs/image-decoder/digits.safetensors"
    """What recipes/train_image_decoder.py wrote for the same data and image size."""
    samples: int = 8
    """Private images, from the first half of the data."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """How private images are changed: like, rotated, negative."""
    noise: list[float] = field(default_factory=lambda: [0.0, 0.1, 1.0, 3.0])
    """Gaussian noise in multiples of the gradient's root mean square."""
    pruned: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Shares of the coordinates that are dropped by magnitude, without noise."""
    floor: float = 1e-3
    """Deviation, in multiples of the gradient's root mean square, that weighs priors where no noise was added."""
    gs_iterations: int = 500
    """Steps of gs."""
    newton_iterations: int = 30
    """Steps of gauss-newton, from the mean image."""
    latent_iterations: int = 150
    """Steps of gias on latents, per restart."""
    weight_iterations: int = 150
    """Steps of gias on the decoder's weights."""
    restarts: int = 4
    """Starts of gias."""
    output: str = "runs/image_prior"
    """Folder for rows, tables, figure and grid."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size != 1:
            raise ConfigError(f"this study takes one image per gradient, got batch_size={self.batch_size}")
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(f"kinds must be different ones of {', '.join(KINDS)}, got {self.kinds}")
        if not all(0 <= k < float("inf") for k in self.noise) or not all(0 < p < 1 for p in self.pruned):
            raise ConfigError(
                f"noise must be finite and at least 0, pruned in (0, 1), got {self.noise}, {self.pruned}"
            )
        if not self.noise + self.pruned or not 0 < self.floor < float("inf"):
            raise ConfigError(f"noise or pruned must hold a level, and floor be positive, got floor={self.floor}")
        self.attackers(1.0, norm=1.0, latent_size=1)

    def attackers(self, sigma: float, *, norm: float, latent_size: int, prior_std: float = 1.0) -> dict[str, Attack]:
        """Return the attackers by name.

        Args:
            sigma: Deviation of the noise that they reckon with, in the gradient's unit.
            norm: l2 norm of the released gradient, by which gias divides.
            latent_size: Numbers per latent.
            prior_std: Deviation of normalised pixels.

        Returns:
            The attacks. ``latents`` minimises ||g - g*||^2 / norm^2 + w mean(z^2) with w = sigma^2 latent_size /
            norm^2, which is the most probable latent (times 2 sigma^2 / norm^2).
        """
        newton = GaussNewton(start="mean", iterations=self.newton_iterations)
        latents = GIAS(
            decoder=self.decoder, objective="l2", latent_iterations=self.latent_iterations, weight_iterations=0,
            restarts=self.restarts, latent_prior=sigma**2 * latent_size / norm**2,
        )  # fmt: skip
        return {
            "gs": ImageGS(iterations=self.gs_iterations),
            "gauss-newton": newton,
            "gaussian prior": replace(newton, prior_weight=(sigma / prior_std) ** 2),
            "latents": latents,
            "gias": replace(latents, weight_iterations=self.weight_iterations),
        }

    def levels(self) -> list[tuple[str, float]]:
        """Return what is done to a gradient, with its strength."""
        return [("noise", k) for k in self.noise] + [("pruned", p) for p in self.pruned]


def private_kinds(config: PriorConfig, data: ImageData) -> dict[str, ImageData]:
    """Return the private images of every kind: those of the first half, which no decoder has read.

    Args:
        config: The settings.
        data: All images.

    Returns:
        The images, the same ones changed in different ways.

    Raises:
        ConfigError: If more are asked for than the first half holds.
    """
    if config.samples > len(data) // 2:
        raise ConfigError(
            f"samples={config.samples}, but the first half of {data.name}, on which no decoder was trained, holds "
            f"{len(data) // 2} images"
        )
    pixels, labels = data.pixels[: config.samples], data.labels[: config.samples]
    return {kind: replace(data, pixels=KINDS[kind](pixels), labels=labels) for kind in config.kinds}


def nearest_in_range(decoder: ImageDecoder, pixels: Tensor, seed: int) -> Tensor:
    """Return the image of a decoder that is nearest to a given one: the owner's check, since it needs the truth.

    Args:
        decoder: The decoder.
        pixels: (1, C, H, W) in [0, 1].
        seed: Seed of the starting latents.

    Returns:
        Pixel values (1, C, H, W), of ``PROJECTION_STARTS`` descents by Adam the best.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(PROJECTION_STARTS, decoder.latent_size, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=PROJECTION_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROJECTION_STEPS)
    for _ in range(PROJECTION_STEPS):
        optimizer.zero_grad()
        (decoder(latents) - pixels).square().sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        made = decoder(latents)
        return made[(made - pixels).square().flatten(1).sum(1).argmin()][None]


def level_rows(
    config: PriorConfig, decoder: ImageDecoder, study: ImageStudy, kind: str, sample: int, level: tuple[str, float]
) -> list[dict]:
    """Return one row per attacker on one image and one release; depends on the settings and the image alone."""
    batch, seed, (what, strength) = study.batch(sample), study.sample_seed(sample), level
    true = capture_gradient(study.adapter, batch, shared=study.shared)
    sigma = strength * true.rms if what == "noise" else 0.0
    defense: Defense = NoDefense()
    if what == "pruned":
        defense = Prune(ratio=strength)
    elif sigma:
        defense = GaussianNoise(std=sigma, seed=derived_seed(seed, 0))
    released = defense(true)
    assumed = sigma or config.floor * true.rms
    attackers = config.attackers(
        assumed, norm=released.rms * released.num_coordinates**0.5, latent_size=decoder.latent_size,
        prior_std=study.adapter.prior().std,
    )  # fmt: skip
    common = {"kind": kind, "sample": sample, "label": int(batch.targets), "what": what, "strength": strength}
    key = f"{kind}|{sample}|{what}|{strength:g}"
    return [
        {"key": f"{key}|{name}", **common, "attack": name}
        | scored_image_attack(attack, study.adapter, released, batch, seed=seed, keep_images=True)
        for name, attack in attackers.items()
    ]


def range_row(decoder: ImageDecoder, study: ImageStudy, kind: str, sample: int) -> dict:
    """Return the row of the decoder's image that is nearest to a private one."""
    pixels = study.data.pixels[sample : sample + 1]
    made = nearest_in_range(decoder, pixels, study.sample_seed(sample))
    error = (made - pixels).square().mean().item()
    return {
        "key": f"{kind}|{sample}|range", "kind": kind, "sample": sample, "what": "range", "attack": "range",
        "rmse_pixel": error**0.5, "psnr": psnr(made[0], pixels[0]),
    }  # fmt: skip


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(PriorConfig, argv, prog="image_prior.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = study_images(config)
    whole = image_study(config, config.model, data, state)
    studies = {kind: replace(whole, data=own) for kind, own in private_kinds(config, data).items()}
    decoder = load_decoder(config.decoder)
    GIAS(decoder=config.decoder).check(whole.adapter, whole.release(0).shared)
    folder = study_folder(config, studies)
    folder.identity["decoder"] = hashlib.sha256(Path(config.decoder).read_bytes()).hexdigest()
    items = [(k, i, level) for i in range(config.samples) for k in studies for level in (None, *config.levels())]

    def work(_: int, item: tuple[str, int, tuple[str, float] | None]) -> list[dict]:
        kind, sample, level = item
        if level is None:
            return [range_row(decoder, studies[kind], kind, sample)]
        return level_rows(config, decoder, studies[kind], kind, sample, level)

    rows = run_items(items, work, folder, state, label="attacking")
    if state.is_main_process:
        write_results(rows, {kind: own.pixels for kind, own in private_kinds(config, data).items()}, folder.path)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
