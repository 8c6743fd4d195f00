"""The settings that name a model, for the commands that work on one gradient, and its loading."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from lmleak.adapters import ModelAdapter, TextAdapter, load_adapter
from lmleak.adapters.load import refuse_absent_device
from lmleak.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and where it runs."""

    model: str
    """Embedded name (reference-bert, reference-gpt2), image classifier by name (lenet, resnet20, ...), file of its
    weights, local directory, shape file (.yaml) or hub id."""
    task: str | None = None
    """sequence-classification, causal-lm, masked-lm or image-classification; if not given, what the gradient or the
    model says."""
    tokenizer: str | None = None
    """Name or directory of the tokenizer, if it is not beside the model."""
    weights_seed: int = 0
    """Seed of random weights (a network by name, shape files, a head that the checkpoint lacks); the same in capture
    and attack. A shape file that sets a seed of its own keeps it."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def device_of(setting: str, state: PartialState | None = None) -> str:
    """Return the device that a setting names.

    Args:
        setting: cpu, cuda, cuda:N, or auto.
        state: This process's place among several, whose device "auto" is; None takes the first CUDA device there is.

    Returns:
        The device.

    Raises:
        ConfigError: If it is absent or none.
    """
    if setting == "auto":
        return str(state.device) if state else "cuda" if torch.cuda.is_available() else "cpu"
    if setting.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device={setting!r} is not known; write cpu, cuda or auto")
    refuse_absent_device(setting)
    return setting


def load_model(config: ModelConfig, *, task: str | None = None) -> ModelAdapter:
    """Load the model that a configuration names.

    Args:
        config: The settings.
        task: The task where the settings name none; None reads it from the model.

    Returns:
        The adapter.
    """
    disable_progress_bar()  # of weight loading; it says nothing about the work
    return load_adapter(
        config.model, task=config.task or task, tokenizer=config.tokenizer, device=device_of(config.device),
        seed=config.weights_seed,
    )  # fmt: skip


def load_text_model(config: ModelConfig) -> TextAdapter:
    """Load the language model that a configuration names.

    Args:
        config: The settings.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: If it is no language model.
    """
    adapter = load_model(config)
    if not isinstance(adapter, TextAdapter):
        raise UnsupportedModelError(
            f"this command works on text, and {config.model!r} is of task {adapter.task!r}; images are attacked by "
            "lmleak capture, attack and score, by lmleak.run_attack and by the recipes"
        )
    return adapter
