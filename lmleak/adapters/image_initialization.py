"""How the weights of an image classifier are drawn: what the I2F paper found to change its risk most."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmleak.lookup import lookup

BIAS_RANGE = 0.5  # biases are drawn from U(-1/2, 1/2) under the initialisations of the paper

Draw = Callable[[Tensor, torch.Generator], Tensor]


def _uniform_bias(bias: Tensor, generator: torch.Generator) -> Tensor:
    return bias.uniform_(-BIAS_RANGE, BIAS_RANGE, generator=generator)


# name -> (how weights are drawn, how biases are); None keeps what torch's constructors draw
INITIALIZATIONS: dict[str, tuple[Draw, Draw] | None] = {
    "uniform": (lambda w, g: w.uniform_(-0.5, 0.5, generator=g), _uniform_bias),
    "normal": (lambda w, g: w.normal_(0, 0.5, generator=g), _uniform_bias),
    "kaiming": (lambda w, g: nn.init.kaiming_uniform_(w, nonlinearity="sigmoid", generator=g), _uniform_bias),
    "xavier": (lambda w, g: nn.init.xavier_uniform_(w, generator=g), _uniform_bias),
    "orthogonal": (lambda w, g: nn.init.orthogonal_(w, generator=g), lambda b, _: b.zero_()),
    "default": None,
}


def initialize(model: nn.Module, initialization: str, seed: int) -> None:
    """Draw the weights of all convolutions and linear layers anew, in place.

    With fan-in n and fan-out m of a layer: "uniform" U(-1/2, 1/2); "normal" N(0, 1/4); "kaiming" U(-b, b) with
    b = sqrt(3 / n), which is the gain 1 of a sigmoid; "xavier" U(-b, b) with b = sqrt(6 / (n + m)); under these
    four, biases are drawn from U(-1/2, 1/2). "orthogonal": orthonormal rows or columns, biases zero. "default":
    nothing is drawn, torch's own stays. Source: the initialisation study of Zhang et al. 2023, arXiv:2309.13016,
    and its released code; there the uniform draw also reaches the scales and shifts of normalisation layers, here
    these keep 1 and 0, and embeddings keep theirs: a scale near zero or below would cut a network that nobody trains.

    Args:
        model: The network.
        initialization: One of ``INITIALIZATIONS``.
        seed: Seed of the draw; the global generator is not touched. An unknown name is refused as ``ConfigError``.
    """
    draws = lookup("initialization", initialization, INITIALIZATIONS)
    if draws is None:
        return
    draw_weight, draw_bias = draws
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                draw_weight(module.weight, generator)
                if module.bias is not None:
                    draw_bias(module.bias, generator)
