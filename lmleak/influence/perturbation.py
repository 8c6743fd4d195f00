"""Perturbations of theta's shape that are made one parameter at a time, and never held as a whole."""

from collections import deque
from collections.abc import ItemsView, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lmleak.defenses.noise import unit_noise
from lmleak.errors import DataError


class UnitNoise(Mapping):
    """Standard Gaussian noise on every parameter, exactly as ``GaussianNoise(std=1, seed=seed)`` adds it.

    A parameter's noise is drawn when it is asked for, the same each time, and not kept. ``items()`` draws ahead, as
    many parameters at a time as torch has threads: each has a random stream of its own, so the numbers stay the same.

    Args:
        shapes: Shape per parameter name.
        dtype: Of the noise.
        seed: The defense's seed.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, seed: int):
        self.shapes, self.dtype, self.seed = dict(shapes), dtype, seed

    def __getitem__(self, name: str) -> Tensor:
        return unit_noise(name, self.shapes[name], self.dtype, self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def items(self) -> ItemsView[str, Tensor]:
        """Return names and noise."""
        return _DrawnAhead(self)


class _DrawnAhead(ItemsView):
    """Noise in order, drawn by as many threads as torch has.

    Behind a large parameter that is waited for, the threads go on with the small ones after it: up to ``QUEUED`` per
    thread. With the one in use they hold as many numbers as the largest parameter, times the threads and one; who asks
    for the next before letting go of the last holds that as well.
    """

    QUEUED = 32

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        noise, names = self._mapping, deque(self._mapping)
        sizes = {name: shape.numel() for name, shape in noise.shapes.items()}
        threads = torch.get_num_threads()
        room, ahead = (threads + 1) * max(sizes.values(), default=0), deque()
        with ThreadPoolExecutor(threads) as pool:

            def fill(room: int) -> int:
                while names and len(ahead) < self.QUEUED * threads and sizes[names[0]] <= room:
                    room -= sizes[names[0]]
                    ahead.append((names[0], pool.submit(noise.__getitem__, names.popleft())))
                return room

            room = fill(room)
            while ahead:
                name, drawn = ahead.popleft()
                yield name, drawn.result()
                del drawn  # which holds the noise
                room = fill(room + sizes[name])


class Perturbation(Mapping):
    """A theta-shaped mapping whose tensors are checked and moved beside x as they are asked for.

    Args:
        tensors: One per parameter name.
        shapes: Shape per parameter name.
        like: Gives dtype and device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], like: Tensor):
        self.tensors, self.shapes, self.like = tensors, shapes, like

    def __getitem__(self, name: str) -> Tensor:
        return self._checked(name, self.tensors[name])

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and checked tensors, in the way the mapping that makes them has."""
        for name, tensor in self.tensors.items():
            yield name, self._checked(name, tensor)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise DataError(f"delta of {name!r} is a {type(tensor).__name__}, expected a tensor like the parameter")
        if tensor.shape != self.shapes[name]:
            expected = tuple(self.shapes[name])
            raise DataError(f"delta of {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
        return tensor.to(self.like)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
