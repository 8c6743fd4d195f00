"""Choosing by name from a literal table, with a helpful refusal."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from lmleak.errors import ConfigError

T = TypeVar("T")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]``, or refuse with the nearest valid name.

    Args:
        kind: What is being chosen, for the message ("attack", "defense").
        name: The name asked for.
        table: The available choices.

    Returns:
        The chosen entry.

    Raises:
        ConfigError: If ``name`` is not in the table.
    """
    if name in table:
        return table[name]
    raise ConfigError(f"unknown {kind} {name!r}. {suggest(name, table)}")


def suggest(name: str, valid: Mapping[str, object] | list[str]) -> str:
    """Return "Did you mean ...? Available: ..." for a name that is not valid."""
    nearest = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Available: {', '.join(sorted(valid))}"
