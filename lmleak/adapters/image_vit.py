"""A small vision transformer for small data: shifted patch tokens and locality self-attention.

Source: Lee, Lee, Song 2021, arXiv:2112.13492, on the transformer of Dosovitskiy et al. 2021, arXiv:2010.11929. Sizes
by default are those that Zhang et al. 2023 (arXiv:2309.13016) audit. Attention is written out, because fused kernels
have no second derivatives; there is no dropout.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.errors import ConfigError

EMBEDDING_STD = 0.02  # of the class token and the positions, as in Dosovitskiy et al.


class ShiftedPatches(nn.Module):
    """Tokens from patches of the image and of its four copies shifted diagonally by half a patch.

    Args:
        channels: Channels of the image.
        patch: Height and width of a patch.
        dim: Width of a token.
    """

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        values = 5 * channels * patch**2
        self.norm = nn.LayerNorm(values)
        self.projection = nn.Linear(values, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens (B, patches, dim)."""
        batch, channels, height, width = pixels.shape
        half, patch = self.patch // 2, self.patch
        padded = F.pad(pixels, (half, half, half, half))
        corners = [(half, half), (0, 0), (0, 2 * half), (2 * half, 0), (2 * half, 2 * half)]
        shifted = torch.cat([padded[:, :, i : i + height, j : j + width] for i, j in corners], 1)
        grid = shifted.reshape(batch, 5 * channels, height // patch, patch, width // patch, patch)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 5 * channels * patch**2)
        return self.projection(self.norm(patches))


class LocalityAttention(nn.Module):
    """Self-attention in which no token attends to itself and the temperature is learned.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        head_dim: Width of a head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.log_temperature = nn.Parameter(torch.tensor(-0.5 * math.log(head_dim)))
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, dim)."""
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) * self.log_temperature.exp()
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        weights = scores.masked_fill(itself, -torch.inf).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class SmallViT(nn.Module):
    """The transformer: patches, a class token, blocks of attention and MLP after LayerNorm, a linear head.

    Args:
        image_shape: (C, H, W); H and W are multiples of ``patch``.
        num_classes: Classes.
        patch: Height and width of a patch, even.
        dim: Width of a token.
        depth: Blocks.
        heads: Attention heads.
        head_dim: Width of a head.
        mlp: Hidden width of the MLPs.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, *, patch: int = 4, dim: int = 512, depth: int = 4,
        heads: int = 6, head_dim: int = 64, mlp: int = 256,
    ):  # fmt: skip
        super().__init__()
        channels, height, width = image_shape
        if height % patch or width % patch or patch % 2:
            raise ConfigError(
                f"this transformer reads patches of {patch}x{patch} pixels (an even number), and {height}x{width} is "
                f"no multiple; give image_shape=({channels}, H, W) with multiples of {patch}"
            )
        self.patches = ShiftedPatches(channels, patch, dim)
        self.class_token = nn.Parameter(EMBEDDING_STD * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(EMBEDDING_STD * torch.randn(1, 1 + (height // patch) * (width // patch), dim))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "attention": nn.Sequential(nn.LayerNorm(dim), LocalityAttention(dim, heads, head_dim)),
                "mlp": nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim)),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        tokens = self.patches(pixels)
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        for block in self.blocks:
            x = x + block["attention"](x)
            x = x + block["mlp"](x)
        return self.head(x[:, 0])
