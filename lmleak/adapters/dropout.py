"""Dropout that is on: a model in training mode for one gradient, with seeded masks and nothing left behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as RunningNorm  # batch and instance normalisation

from lmleak.errors import UnsupportedModelError


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode as far as dropout goes.

    All modules are switched, because attention layers and others apply dropout as a function, by their own flag. Not
    so layers with running statistics (BatchNorm), which would mix the examples and change buffers. Gradient
    checkpointing, which runs in training mode only, is switched off: its reentrant form refuses
    ``torch.autograd.grad``. Flags are restored, also after an exception.

    Args:
        model: An adapter's private copy.

    Yields:
        Nothing.
    """
    flags = [(module, name, getattr(module, name)) for module in model.modules()
             for name in ("training", "gradient_checkpointing") if hasattr(module, name)]  # fmt: skip
    try:
        for module, name, _ in flags:
            setattr(module, name, name == "training" and not isinstance(module, RunningNorm))
        yield
    finally:
        for module, name, value in flags:
            setattr(module, name, value)


@contextmanager
def dropout_on(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Activate dropout as ``model.train()`` does, with masks from a seed.

    The global random state is restored, also after an exception.

    Args:
        model: An adapter's private copy.
        seed: Seed of the masks, drawn one after the other over all forward passes within.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: If nothing random happened, so the model has no dropout to be on.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    # Dropout draws from the global generator of the device and takes no other.
    with torch.random.fork_rng(devices=devices):
        generator = torch.cuda.default_generators[device.index] if devices else torch.default_generator
        generator.manual_seed(seed)
        before = generator.get_state()
        with training_mode(model):
            yield
        if torch.equal(generator.get_state(), before):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no dropout (every probability is zero), so its gradient is the same with "
                "dropout=True; drop it, or set the probabilities in the model's configuration"
            )
