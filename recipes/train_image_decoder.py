"""Train the decoder of the generative-prior attack (gias) on public images.

    python recipes/train_image_decoder.py --config configs/train_image_decoder/digits.yaml

A variational autoencoder whose encoder is thrown away. Images are split by their index in the data set: the second
half, n // 2 and later, is public and trains the decoder; the first half, which a study takes its private images from,
is never read. The same configuration gives the same weights, bit for bit, on the same machine with the same library
versions and thread count. The digits take about 20 seconds on one core.
"""

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sklearn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.attacks.image_decoder import ImageDecoder, save_decoder
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.data.images import load_images
from lmleak.evaluation import exit_status
from lmleak.files import refuse_unwritable

PUBLIC = "the second half by index"
LARGEST_LOG_VARIANCE = 10.0  # either way: exp of more is no use, and may overflow early in training


@dataclass
class TrainImageDecoder:
    """One decoder: its images, its shape and its training."""

    data: str = "digits"
    """What ``lmleak.data.images.load_images`` reads: "digits", MNIST idx files, .npz, a folder, a hub id."""
    split: str | None = None
    """Part of the data, where it has several."""
    size: int | None = None
    """Height and width to resize images to; None leaves them as they are."""
    output: str = "runs/image-decoder/digits.safetensors"
    """File to write."""
    seed: int = 0
    """Seed of the initial weights, the order and the noise."""
    latent_size: int = 24
    """Numbers per image."""
    width: int = 16
    """Channels before the decoder's last convolution."""
    steps: int = 3000
    """Steps of Adam."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """The first; it falls to zero as a cosine."""
    pixel_std: float = 0.05
    """Standard deviation s of a pixel about the decoder's: larger, and the latents are closer to standard normal."""
    threads: int = 1
    """Torch threads; sums in another order give other last bits."""

    def __post_init__(self):
        check_counts(self, "latent_size", "width", "steps", "batch_size", "threads", "size")
        check_positive(self, "learning_rate", "pixel_std")


class Encoder(nn.Module):
    """Mean and log variance of an image's latent: two strided convolutions and a linear layer.

    Args:
        decoder: What it encodes for.
    """

    def __init__(self, decoder: ImageDecoder):
        super().__init__()
        channels, *_ = decoder.image_shape
        self.conv1 = nn.Conv2d(channels, decoder.width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(decoder.width, 2 * decoder.width, 3, stride=2, padding=1)
        self.fc = nn.Linear(decoder.fc.out_features, 2 * decoder.latent_size)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, (B, latent_size) each."""
        hidden = F.silu(self.conv2(F.silu(self.conv1(pixels - 0.5))))
        mean, log_variance = self.fc(hidden.flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)


def main(args: TrainImageDecoder) -> dict:
    """Train one decoder, save it, and return its card."""
    refuse_unwritable(args.output, "output")
    torch.set_num_threads(args.threads)
    public = public_half(args)
    decoder, results = train(args, public)
    card = {
        "recipe": "recipes/train_image_decoder.py",
        "data": Path(args.data).name,
        "split": PUBLIC,
        "public_images": len(public),
        "pixels": "in [0, 1], before the model's own normalisation",
        "config": {name: value for name, value in asdict(args).items() if name not in ("data", "output")},
        "results": {name: round(value, 6) for name, value in results.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sklearn": sklearn.__version__},
        "seed": args.seed,
    }
    save_decoder(args.output, decoder, card)
    print(json.dumps(card["results"], indent=2))
    return card


def train(args: TrainImageDecoder, public: Tensor) -> tuple[ImageDecoder, dict[str, float]]:
    """Train by ``min ||x - G(z)||^2 / (2 s^2) + KL(q(z|x) || N(0, I))``, the negative evidence bound, in nats.

    Kingma and Welling 2013, arXiv:1312.6114, with a Gaussian of fixed deviation s about the decoder's pixels, and its
    constant left out.

    Args:
        args: The settings.
        public: (N, C, H, W) pixels in [0, 1].

    Returns:
        The decoder, the last batch's bound, and the error per pixel of all public images, encoded and decoded.
    """
    generator = torch.Generator().manual_seed(args.seed)
    decoder = ImageDecoder(tuple(public.shape[1:]), args.latent_size, args.width, seed=args.seed)
    with torch.random.fork_rng(devices=[]):  # initial weights draw from the global generator
        torch.manual_seed(args.seed)
        encoder = Encoder(decoder)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for pixels in batches_of(public, args, generator):
        mean, log_variance = encoder(pixels)
        noise = torch.randn(mean.shape, generator=generator)
        misfit = (decoder(mean + (log_variance / 2).exp() * noise) - pixels).square().flatten(1).sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        loss = (misfit / (2 * args.pixel_std**2) + divergence).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rmse = (decoder(encoder(public)[0]) - public).square().mean().sqrt().item()
    return decoder, {"negative_evidence_bound": loss.item(), "public_rmse": rmse}


def batches_of(public: Tensor, args: TrainImageDecoder, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one random batch per step."""
    for _ in range(args.steps):
        yield public[torch.randint(len(public), (args.batch_size,), generator=generator)]


def public_half(args: TrainImageDecoder) -> Tensor:
    """Return the public images, (N, C, H, W) in [0, 1]: those at index n // 2 and later."""
    pixels = load_images(args.data, split=args.split, size=args.size).pixels
    return pixels[len(pixels) // 2 :]


@exit_status
def command(argv: list[str]) -> None:
    """Train as the arguments say; exit status 2 if the input is refused."""
    main(parse_config(TrainImageDecoder, argv, prog="train_image_decoder.py"))


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
