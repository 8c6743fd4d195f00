"""The largest member for the reconstruction of images: a convolutional decoder of the gradient's features.

Linear layers to a coarse map of channels, then transposed convolutions that double it (Radford et al. 2016,
arXiv:1511.06434, without their batch normalisation, which would let the samples of a batch see one another).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

HIDDEN, CHANNELS = 256, 32
BATCH, LEARNING_RATE = 64, 1e-3
EPOCHS, PATIENCE = 150, 15
VALIDATION_SHARE = 0.1


class ConvolutionalDecoder(nn.Module):
    """Features (n, p) -> images (n, C, H, W): p -> 256 -> 32 maps of a quarter of the size -> twice as large -> full.

    Args:
        features: p.
        image_shape: (C, H, W); any size, what the doubling draws beyond it is cut off.
    """

    def __init__(self, features: int, image_shape: tuple[int, int, int]):
        super().__init__()
        channels, self.height, self.width = image_shape
        self.coarse = (CHANNELS, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.linear = nn.Sequential(
            nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, math.prod(self.coarse)), nn.ReLU()
        )
        self.drawing = nn.Sequential(
            nn.ConvTranspose2d(CHANNELS, CHANNELS // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(CHANNELS // 2, channels, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Return the images."""
        drawn = self.drawing(self.linear(features).unflatten(1, self.coarse))
        return drawn[:, :, : self.height, : self.width]


def fit_decoder(
    features: NDArray, values: NDArray, seed: int, *, image_shape: tuple[int, int, int]
) -> Callable[[NDArray], NDArray]:
    """Fit the decoder by Adam on the squared error, stopped by a tenth of the samples that it does not fit.

    Args:
        features: (n, p).
        values: (n, dx) images, flattened.
        seed: Of weights, held-out tenth and order of the samples; nothing global is drawn.
        image_shape: (C, H, W), dx = C H W.

    Returns:
        Features (m, p) -> values (m, dx), with the weights of the lowest held-out error.
    """
    centre, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    mean, scale = values.mean(0), values.std() or 1.0
    ready = lambda new: torch.tensor((new - centre) / spread, dtype=torch.float32)
    x, y = ready(features), torch.tensor((values - mean) / scale, dtype=torch.float32).unflatten(1, image_shape)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    count = max(1, round(VALIDATION_SHARE * len(x)))
    held, fitted = order[:count], order[count:]
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
        torch.default_generator.manual_seed(seed)
        decoder = ConvolutionalDecoder(x.shape[1], image_shape)
    best, lowest, waited = _copy(decoder), math.inf, 0
    optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for places in torch.randperm(len(fitted), generator=generator).split(BATCH):
            rows = fitted[places]
            loss = (decoder(x[rows]) - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = (decoder(x[held]) - y[held]).square().mean().item()
        if error < lowest:
            best, lowest, waited = _copy(decoder), error, 0
        elif (waited := waited + 1) >= PATIENCE:
            break
    decoder.load_state_dict(best)

    @torch.no_grad()
    def predict(new: NDArray) -> NDArray:
        drawn = torch.cat([decoder(part) for part in ready(new).split(1024)])
        return mean + scale * drawn.flatten(1).double().numpy()

    return predict


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
