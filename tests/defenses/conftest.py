"""A small gradient with the shapes that matter: matrix, vector, scalar, all-zero tensor, repeated magnitudes."""

import pytest
import torch

from lmleak.gradients.shared import SharedGradient


@pytest.fixture
def make_shared():
    """Return a function that makes a SharedGradient; ``zero`` makes every tensor zero."""

    def make(dtype=torch.float64, zero=False, **changes):
        generator = torch.Generator().manual_seed(11)

        def normal(*shape):
            return (0.0 if zero else 0.3) * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        gradient = {
            "embeddings.word.weight": normal(31, 8),
            "encoder.0.dense.weight": normal(12, 8).T,  # not contiguous
            "encoder.0.dense.bias": normal(12).round(decimals=1),  # ties, also across signs
            "encoder.1.dense.weight": torch.zeros(3, 5, dtype=dtype),
            "encoder.1.scale": normal(),
            "head.weight": 40 * normal(2, 12),
        }
        settings = {
            "gradient": gradient,
            "task": "sequence-classification",
            "batch_size": 3,
            "model": "tiny",
            "shared": "all",
            "defenses": ("clip(max_norm=9.0)",),
            "layout": {"attention_mask": torch.ones(3, 4, dtype=torch.long)},
            "labels": torch.tensor([1, 0, 1]),
        }
        return SharedGradient(**{**settings, **changes})

    return make
