"""The discrete moves of LAMP: new orders of the tokens of one text."""

import torch
from torch import Tensor


def random_orders(length: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Return different orders of ``length`` tokens, the present one first.

    The kinds take turns, as in LAMP (Balunovic et al. 2022, arXiv:2202.08827, section 4.2): swap two tokens, move one
    token, move a sub-sequence, move a prefix to the end. Repeated orders are left out.

    Args:
        length: Number of tokens, at least 2.
        count: How many orders are tried, the present one included.
        generator: Draws them.

    Returns:
        At most ``count`` permutations, each (length,).
    """
    identity = list(range(length))
    orders = {tuple(identity)}
    for kind in range(1, count):
        first, second = sorted(torch.randperm(length, generator=generator)[:2].tolist())
        order = list(identity)
        if kind % 4 == 1:
            order[first], order[second] = order[second], order[first]
        elif kind % 4 == 2:
            order.insert(below(length, generator), order.pop(below(length, generator)))
        elif kind % 4 == 3:
            part, rest = order[first:second], order[:first] + order[second:]
            place = below(len(rest) + 1, generator)
            order = rest[:place] + part + rest[place:]
        else:
            order = order[second:] + order[:second]
        orders.add(tuple(order))
    return [torch.tensor(order) for order in sorted(orders)]  # the identity sorts first


def below(limit: int, generator: torch.Generator) -> int:
    """Return a random integer from 0 to ``limit`` - 1."""
    return int(torch.randint(limit, (1,), generator=generator))
