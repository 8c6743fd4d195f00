"""Seeded vectors, and how far one is from another."""

import torch


def randn(*shape, seed=0, dtype=torch.float64):
    """Normal numbers of one seed, whatever the global state is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(got, expected):
    """||got - expected|| / ||expected||."""
    return ((got - expected).norm() / expected.norm()).item()
