"""The first layers of a model, run on token ids and stopped at a chosen linear map.

The forward pass is the model's own: a hook reads what enters the map and ends the pass there.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lmleak.adapters.examples import draw_tokens
from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.structure import is_linear, weight_rows
from lmleak.errors import UnsupportedModelError


class _Reached(Exception):
    """Ends a forward pass on purpose."""


def forward(adapter, ids: Tensor, cache: DynamicCache | None = None, *, stop_at: str | None = None) -> Tensor | None:
    """Run the model on unpadded token ids.

    Args:
        adapter: The model.
        ids: (n, T) token ids; with a cache, those that follow it.
        cache: Keys and values of the tokens before, extended in place by every block that runs.
        stop_at: Path of the module whose input is wanted; the pass ends there.

    Returns:
        The input of ``stop_at``, (n, T, d); None if the whole model ran.

    Raises:
        UnsupportedModelError: If ``stop_at`` was never reached.
    """
    captured: list[Tensor] = []

    def capture(module, arguments, keywords):
        captured.append(arguments[0] if arguments else next(iter(keywords.values())))
        raise _Reached

    past = cache.get_seq_length() if cache is not None else 0
    mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=adapter.device)
    caching = {} if cache is None else {cache_argument(adapter.model): cache, "use_cache": True}
    keep_precision = KeepDouble() if adapter.dtype == torch.float64 else nullcontext()
    handle = None
    if stop_at is not None:
        handle = adapter.model.get_submodule(stop_at).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad(), keep_precision:
            adapter.model(input_ids=ids.to(adapter.device), attention_mask=mask, **caching)
    except _Reached:
        return captured[0].reshape(*ids.shape, -1)
    finally:
        if handle is not None:
            handle.remove()
    if stop_at is not None:
        raise UnsupportedModelError(f"a forward pass of {adapter.name} never reached {stop_at!r}")
    return None


def cache_argument(model) -> str | None:
    """Return how a model calls the keys and values of earlier tokens; None if it takes none.

    "cache" since transformers 5.24, "past_key_values" before.
    """
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def linear_groups(adapter, prefix: str = "") -> list[tuple[str, ...]]:
    """Return the linear maps below a module path, in order of execution, those fed the very same tensor together."""
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, arguments, path=path: calls.append((path, arguments[0])))
        for path, module in adapter.model.named_modules()
        if path.startswith(prefix) and is_linear(module)
    ]
    try:
        forward(adapter, random_ids(adapter, 1, 3, seed=0))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for path, tensor in calls:
        if groups and groups[-1][0] is tensor:
            groups[-1][1].append(path)
        else:
            groups.append((tensor, [path]))
    return [tuple(paths) for _, paths in groups]


def head_gradient(adapter, gradient: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """Return the path of the linear map that makes the model's output, and its gradient if it is released.

    Args:
        adapter: The model.
        gradient: Released gradient per parameter name.

    Returns:
        The path, and (classes, d) on the model's device or None.
    """
    head = adapter.model.get_output_embeddings()
    if head is not None and is_linear(head):
        path = next(path for path, module in adapter.model.named_modules() if module is head)
    else:
        path = linear_groups(adapter)[-1][-1]
    module = adapter.model.get_submodule(path)
    # A tied weight goes by the table's name.
    name = next((n for n, p in adapter.model.named_parameters() if p is module.weight), None)
    return path, weight_rows(module, gradient[name]).to(adapter.device) if name in gradient else None


def random_ids(adapter, count: int, length: int, *, seed: int) -> Tensor:
    """Return (count, length) token ids drawn uniformly from the tokens that are not special."""
    return draw_tokens(adapter, count, length, torch.Generator().manual_seed(seed))


def dependence(adapter, path: str) -> tuple[bool, bool]:
    """Return whether the input of a map at some position depends on an earlier, and on a later, token."""
    ids = random_ids(adapter, 1, 4, seed=0)
    earlier, later = ids.clone(), ids.clone()
    others = [i for i in random_ids(adapter, 1, 64, seed=1)[0].tolist() if i not in ids[0].tolist()]
    earlier[0, 0] = later[0, 3] = others[0]
    x = forward(adapter, torch.cat([ids, earlier, later]), stop_at=path).double()
    change = (x - x[:1]).norm(dim=-1) / x[:1].norm(dim=-1)  # (3, 4)
    differs = change > 1e2 * torch.finfo(adapter.dtype).eps
    return bool(differs[1, 1:].any()), bool(differs[2, :3].any())


@dataclass(frozen=True)
class Site:
    """Linear maps that read one tensor, and whose stacked gradient gives that tensor's span."""

    paths: tuple[str, ...]
    where: str
    """In words, for messages."""

    def is_released(self, gradient: Mapping[str, Tensor]) -> bool:
        """Return whether the gradient of at least one of the maps is released."""
        return any(f"{path}.weight" in gradient for path in self.paths)


def first_site(adapter) -> Site:
    """Return the site whose input tells one token and its position; without maps where no blocks were recognised."""
    return Site(adapter.attention_inputs(0) if adapter.blocks else (), "the attention input of block 0")


def prefix_sites(adapter) -> Iterator[Site]:
    """Yield the sites whose input tells a whole prefix, best first.

    The paper's is the attention input of the second block. The maps of the first block that come after its attention
    see the prefix too; they serve where the second block is withheld, and come first where the second block is
    the last of a classifier: only the final position leaves that block, so its keys and values carry at
    most one direction per head and text, and the gradient spans less than the tokens.

    Args:
        adapter: The model.

    Yields:
        The sites.
    """
    last_of_classifier = len(adapter.blocks) == 2 and adapter.task == "sequence-classification"
    second = [Site(adapter.attention_inputs(1), "the attention input of block 1")] if len(adapter.blocks) > 1 else []
    if not last_of_classifier:
        yield from second
    first, *rest = linear_groups(adapter, adapter.blocks[0] + ".")
    for paths in reversed(rest):
        if _input_width(adapter, paths) == _input_width(adapter, first) and dependence(adapter, paths[0])[0]:
            yield Site(paths, f"the input of {paths[0]} in block 0")
    if last_of_classifier:
        yield from second


def _input_width(adapter, paths: tuple[str, ...]) -> int:
    module = adapter.model.get_submodule(paths[0])
    return weight_rows(module, module.weight).shape[1]


@dataclass(frozen=True)
class Prefixes:
    """A set of token prefixes of equal length with what the first block remembers of them."""

    ids: Tensor
    """(n, t)."""
    keys: Tensor | None = None
    """(n, heads, t, d_head) of block 0; None where the model is run on whole prefixes."""
    values: Tensor | None = None

    def select(self, index: Tensor) -> "Prefixes":
        """Return the prefixes at ``index``."""
        if self.keys is None:
            return Prefixes(self.ids[index])
        return Prefixes(self.ids[index], self.keys[index], self.values[index])

    @staticmethod
    def join(parts: "list[Prefixes]") -> "Prefixes":
        """Return all prefixes of several sets of equal length."""
        ids = torch.cat([p.ids for p in parts])
        if parts[0].keys is None:
            return Prefixes(ids)
        return Prefixes(ids, torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]))


class PrefixModel:
    """A decoder up to one map behind its first attention, extended one token at a time.

    With the first block's keys and values kept, a longer prefix costs one new row instead of a whole pass. The
    model must agree with itself on a random sequence; otherwise whole prefixes are run.

    Args:
        adapter: The model.
        path: The map whose input is wanted.
        cached: Whether to try the cache.
    """

    def __init__(self, adapter, path: str, *, cached: bool = True):
        self.adapter, self.path = adapter, path
        self.cached = cached and cache_argument(adapter.model) is not None
        if self.cached:
            self.cached = self._cache_agrees()

    def _cache_agrees(self) -> bool:
        ids = random_ids(self.adapter, 2, 4, seed=2).to(self.adapter.device)
        whole = forward(self.adapter, ids, stop_at=self.path)
        prefixes, rows = None, []
        for position in range(ids.shape[1]):
            prefixes, x = self.extend(prefixes, torch.arange(2, device=ids.device), ids[:, position])
            rows.append(x)
        error = (torch.stack(rows, 1) - whole).norm() / whole.norm()
        return bool(error < 1e2 * torch.finfo(self.adapter.dtype).eps)

    def extend(self, prefixes: Prefixes | None, parents: Tensor, tokens: Tensor) -> tuple[Prefixes, Tensor]:
        """Append one token to each chosen prefix.

        Args:
            prefixes: n prefixes of t tokens; None for the empty one.
            parents: (k,) which prefix each new one continues; ignored for the empty one.
            tokens: (k,) the token that follows.

        Returns:
            The k longer prefixes, and the input of the map at their last position, (k, d).
        """
        ids = tokens[:, None] if prefixes is None else torch.cat([prefixes.ids[parents], tokens[:, None]], dim=1)
        if not self.cached:
            return Prefixes(ids), forward(self.adapter, ids, stop_at=self.path)[:, -1]
        cache = DynamicCache()
        if prefixes is not None:
            cache.update(prefixes.keys[parents], prefixes.values[parents], 0)
        x = forward(self.adapter, tokens[:, None], cache, stop_at=self.path)[:, -1]
        return Prefixes(ids, cache.layers[0].keys, cache.layers[0].values), x
