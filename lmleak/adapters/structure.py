"""Where the layers are: found by structure and names, never by position index."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.lookup import suggest

if TYPE_CHECKING:
    from lmleak.adapters.base import ModelAdapter

SHARED_SPECIFICATIONS = ("all", "no-word-embeddings", "embeddings", "block:FIRST-LAST", "head", "lora")


@dataclass(frozen=True)
class Selection:
    """Which parameters are shared."""

    specification: str
    names: tuple[str, ...]
    """Parameter names, in the model's order."""
    through_lookup: bool
    """Whether the word-embedding table's gradient includes the rows that were looked up."""


def select_parameters(specification: str, adapter: "ModelAdapter") -> Selection:
    """Return the parameters that ``shared=`` names.

    Args:
        specification: "all"; "no-word-embeddings" (every trained parameter but the word table; a table tied to
            the head stays, with the gradient that reaches it through the head); "embeddings" (the embedding
            layer alone, the table's looked-up rows included); "block:2" or "block:0-3"; "head"; "lora"; or a
            regular expression searched in the names.
        adapter: The model.

    Returns:
        The selection.

    Raises:
        ConfigError: If nothing is selected.
    """
    if not isinstance(specification, str) or not specification:
        raise ConfigError(f"shared must be all, no-word-embeddings, block:0-3 or the like, got {specification!r}")
    names, table = list(adapter.parameters()), adapter.lookup_table()
    roles = adapter.roles()
    through_lookup = False
    if specification == "all":
        chosen, through_lookup = names, table in names
    elif specification == "no-word-embeddings":
        chosen = [n for n in names if n != table or adapter.lookup_table_is_tied()]
    elif specification in ("embeddings", "head"):
        chosen = list(roles.get(specification, ()))
        through_lookup = specification == "embeddings" and table in chosen
    elif match := re.fullmatch(r"block:(\d+)(?:-(\d+))?", specification):
        first, last = int(match[1]), int(match[2] or match[1])
        chosen = [n for i in range(first, last + 1) for n in roles.get(f"block {i}", ())]
        absent = [i for i in range(first, last + 1) if f"block {i}" not in roles]
        if absent:
            raise ConfigError(
                f"shared={specification!r}: the model has no block {absent[0]}; it has {', '.join(roles)}"
            )
    elif specification == "lora":
        chosen = [n for n in names if "lora_" in n]
    else:
        try:
            pattern = re.compile(specification)
        except re.error as error:
            raise ConfigError(
                f"shared={specification!r} is neither a known choice nor a regular expression: {error}. "
                f"{suggest(specification, list(SHARED_SPECIFICATIONS))}"
            ) from error
        chosen = [n for n in names if pattern.search(n)]
        through_lookup = table in chosen and not adapter.lookup_table_is_tied()
    chosen = [n for n in names if n in set(chosen)]
    if not chosen:
        known = specification in SHARED_SPECIFICATIONS  # then the model lacks such parameters, or does not train them
        advice = f"Available: {', '.join(roles)}" if known else suggest(specification, list(SHARED_SPECIFICATIONS))
        raise ConfigError(
            f"shared={specification!r} selects none of the {len(names)} trained parameters (first: {names[0]!r}). "
            f"{advice}, or a regular expression over the names"
        )
    return Selection(specification, tuple(chosen), through_lookup)


def find_blocks(model: nn.Module, num_layers: int | None) -> list[str]:
    """Return the module paths of the transformer blocks, in order.

    They are the entries of the ModuleList of ``num_layers`` equal classes, or else of any classes (hybrid models);
    without such a list, of the longest one of equal classes (ALBERT shares one group among its layers).
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    }  # fmt: skip
    equal = {path: m for path, m in lists.items() if len({type(entry) for entry in m}) == 1}
    fitting = (
        {path: m for path, m in equal.items() if len(m) == num_layers}
        or {path: m for path, m in lists.items() if len(m) == num_layers}
        or equal
    )
    if not fitting:
        return []
    # Lists inside a block (experts, for instance) have longer paths; the blocks are the outermost.
    path = min(fitting, key=lambda p: (p.count("."), -len(fitting[p])))
    return [f"{path}.{i}" for i in range(len(fitting[path]))]


def position_padding(model: nn.Module) -> int | None:
    """Return the row that a learned position table keeps for padding, or None if it keeps none.

    RoBERTa and its kin (XLM-R, CamemBERT, MPNet, Longformer) count positions from the row after it, by token id.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]:
            return module.padding_idx
    return None


def text_roles(model: nn.Module, names: list[str], blocks: list[str]) -> dict[str, tuple[str, ...]]:
    """Return parameter names by role: "embeddings", "block i", "head" (everything else).

    A parameter belongs to the embeddings if it sits in an ``nn.Embedding`` or below a module whose name contains
    "embed", and is not part of the output head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_path = next((path for path, m in model.named_modules() if m is head), None) if head is not None else None
    tables = {path for path, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def role(name: str) -> str:
        for i, block in enumerate(blocks):
            if name.startswith(block + "."):
                return f"block {i}"
        module_path = name.rpartition(".")[0]
        if module_path in tables:
            return "embeddings"
        in_head = head_path is not None and module_path == head_path
        return "embeddings" if "embed" in module_path.lower() and not in_head else "head"

    order = ["embeddings", *(f"block {i}" for i in range(len(blocks))), "head"]
    by_role: dict[str, list[str]] = {r: [] for r in order}
    for name in names:
        by_role[role(name)].append(name)
    return {r: tuple(members) for r, members in by_role.items() if members}


def attention_inputs(model: nn.Module, block: str, run: Callable[[], object]) -> tuple[str, ...]:
    """Return the paths of the linear maps that consume the attention input of a block (Q, K, V, or one fused map).

    Found by running the model: the first linear map executed inside the block, and all others in it that are
    fed the very same tensor.

    Args:
        model: The model.
        block: Path of the block.
        run: Runs the model once on anything.

    Returns:
        Module paths, in order of execution.

    Raises:
        UnsupportedModelError: If the block holds no linear map of a known kind.
    """
    calls: list[tuple[str, Tensor]] = []

    def record(path):
        return lambda module, arguments: calls.append((path, arguments[0]))

    handles = [
        module.register_forward_pre_hook(record(path))
        for path, module in model.named_modules()
        if path.startswith(block + ".") and is_linear(module)
    ]
    try:
        _run_through(model, block, run)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise UnsupportedModelError(f"block {block!r} runs no Linear or Conv1D map, so its attention input is unknown")
    first = calls[0][1]
    return tuple(path for path, tensor in calls if tensor is first)


def sees_ahead(model: nn.Module, block: str, run: Callable[[int], object]) -> bool:
    """Return whether the first position behind a block depends on the last token (bidirectional attention).

    Args:
        model: The model.
        block: Path of the block.
        run: Runs the model on a text of several tokens whose last one is given by a number.

    Returns:
        True for encoders, False for causal models.
    """
    outputs = [_run_through(model, block, lambda last=last: run(last)) for last in (0, 1)]
    first, second = (output.reshape(-1, output.shape[-1])[0].double() for output in outputs)
    return bool((first - second).norm() > 1e2 * torch.finfo(outputs[0].dtype).eps * first.norm())


class _Passed(Exception):
    """Ends a forward pass on purpose."""


def _run_through(model: nn.Module, block: str, run: Callable[[], object]) -> Tensor:
    """Run the model until a block has been passed, and return what the block put out."""
    outputs: list[Tensor] = []

    def stop(module, arguments, output):
        outputs.append(output if isinstance(output, Tensor) else output[0])
        raise _Passed

    handle = model.get_submodule(block).register_forward_hook(stop)
    try:
        run()
    except _Passed:
        return outputs[0]
    finally:
        handle.remove()
    raise UnsupportedModelError(f"a forward pass never reached block {block!r}")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is y = W x + b with a 2-D weight (``nn.Linear`` or the GPT-2 ``Conv1D``)."""
    return isinstance(module, (nn.Linear, Conv1D))


def replaced_forward(module: nn.Module) -> bool:
    """Return whether somebody put another ``forward`` on this very module; accelerate's placement does no harm."""
    return "forward" in vars(module) and type(getattr(module, "_hf_hook", None)).__name__ != "AlignDevicesHook"


def weight_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return a weight gradient as (d_out, d_in), whose rows lie in the span of the module's inputs."""
    return gradient if isinstance(module, nn.Linear) else gradient.T  # Conv1D stores (d_in, d_out)
