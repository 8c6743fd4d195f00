"""Dropout of the client as an unknown of the attack: one learned mask per dropout layer call.

A gradient computed with dropout on is the gradient of another network, and matching with dropout off has a floor.
GRAB (CCS 2024) learns the masks with the text: real numbers m in [0, 1 / (1 - p)], where a true mask is 0 or
1 / (1 - p). Every dropout is covered, also that of eager attention, because all of them end in
``torch.nn.functional.dropout``, which is what is replaced here (not: layers that call another kernel, and LayerDrop).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lmleak.adapters.dropout import training_mode
from lmleak.adapters.text import TextAdapter
from lmleak.errors import UnsupportedCombinationError


class ReplaceDropout(TorchFunctionMode):
    """While active, every dropout in training mode multiplies by the next mask; past the last one, by 1.

    Args:
        masks: Tensors shaped like what is dropped out, in the order of the forward pass.
    """

    def __init__(self, masks: tuple[Tensor, ...] = ()):
        super().__init__()
        self.masks = iter(masks)
        self.seen: list[tuple[torch.Size, float]] = []
        """Shape and probability of every dropout met."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not F.dropout:
            return func(*args, **kwargs)
        arguments = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        dropped, probability = arguments["input"], arguments.get("p", 0.5)
        if not arguments.get("training", True) or probability == 0:
            return dropped
        self.seen.append((dropped.shape, probability))
        mask = next(self.masks, None)
        return dropped if mask is None else dropped * mask


@contextmanager
def calling_dropouts(adapter: TextAdapter) -> Iterator[None]:
    """Have the adapter's private copy call its dropouts, as in training; restored also after an exception.

    Args:
        adapter: The model.

    Yields:
        Nothing.

    Raises:
        UnsupportedCombinationError: If training would skip whole layers at random.
    """
    layer_drop = [k for k, v in adapter.config.to_dict().items() if "layerdrop" in k and v]
    if layer_drop:
        raise UnsupportedCombinationError(
            f"{adapter.name} drops whole layers in training ({layer_drop[0]}), which no mask describes; "
            "attack with dropout_masks=False"
        )
    with training_mode(adapter.model):
        yield


def find_dropouts(adapter: TextAdapter, run: Callable[[], object]) -> list[tuple[torch.Size, float]]:
    """Return shape and probability of every dropout that runs; call it within :func:`calling_dropouts`.

    Args:
        adapter: The model.
        run: Runs whatever is matched, once, on anything.

    Returns:
        In order of execution.

    Raises:
        UnsupportedCombinationError: If the model has no dropout.
    """
    with ReplaceDropout() as mode:
        run()
    if not mode.seen:
        raise UnsupportedCombinationError(
            f"dropout_masks=True, but {adapter.name} has no dropout of positive probability"
        )
    return mode.seen
