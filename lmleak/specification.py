"""Reading specification strings such as "clip(max_norm=1)+gaussian(std=0.01)" or "tag(iterations=500)".

Grammar: parts joined by "+"; a part is a name, or a name with ``key=value`` arguments in parentheses. A
value is a number, true / false, a bare word (``unit=rms``), or text in single or double quotes, taken
literally without escapes, so that a regular expression is written as it is. Nothing is ever evaluated.
"""

import ast
import math
import numbers
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import TypeVar

from lmleak.errors import ConfigError
from lmleak.lookup import lookup, suggest

T = TypeVar("T")

_PART = re.compile(
    r"""\s*(?P<name>[A-Za-z][\w-]*)\s*(?:\((?P<arguments>(?:[^()'"]|'[^']*'|"[^"]*")*)\))?\s*(?P<end>\+|$)"""
)
_ARGUMENT = re.compile(
    r"""\s*(?P<key>[A-Za-z_]\w*)\s*=\s*(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>[^\s,'"()]+))\s*(?:,|$)"""
)


def is_whole_number(value: object) -> bool:
    """Return whether a value counts something: Python's and NumPy's integers do, truth values do not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Return whether a value measures something: a real number within the range of float, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def build_parts(spec: str, kind: str, table: Mapping[str, type[T]], example: str) -> tuple[T, ...]:
    """Return one object per part of a specification.

    Args:
        spec: The specification.
        kind: What is specified, for messages ("defense", "attack").
        table: Dataclasses by name; their fields, except ``seed``, are the arguments.
        example: A valid specification, for messages.

    Returns:
        The objects, in order.

    Raises:
        ConfigError: If the text cannot be read, or a name, argument or value is not valid.
    """  # noqa: DOC502 (raised below)
    return tuple(_build(name, arguments, kind, table) for name, arguments in _split(spec, kind, example))


def _split(spec: str, kind: str, example: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text between the parentheses) per part."""
    if not isinstance(spec, str):
        raise ConfigError(f"a {kind} is given as text, got {spec!r}; write for instance {example!r}")
    position, more = 0, True
    while more:
        match = _PART.match(spec, position)
        if match is None:
            raise ConfigError(
                f"cannot read the {kind} {spec!r} from {spec[position:]!r} on; expected name(key=value), "
                f"with quotes around text that holds brackets, parts joined by '+': {example!r}"
            )
        yield match["name"], match["arguments"] or ""
        position, more = match.end(), match["end"] == "+"


def _build(name: str, arguments: str, kind: str, table: Mapping[str, type[T]]) -> T:
    """Construct one object, its seed still the default."""
    chosen = lookup(kind, name, table)
    expected = {f.name: f for f in fields(chosen) if f.name != "seed"}
    example = getattr(chosen, "example", name)
    settings = {}
    for key, value in _arguments(name, arguments, example):
        if key == "seed":
            raise ConfigError(
                f"{name}({arguments}) names a seed, but specifications are public and a seed must not be; "
                "pass it beside the specification, as seed="
            )
        if key not in expected:
            raise ConfigError(
                f"{name} has no argument {key!r}. {suggest(key, expected) if expected else 'It has none'}"
            )
        if key in settings:
            raise ConfigError(f"{name}({arguments}) gives {key!r} twice; write it once")
        settings[key] = value
    required = [k for k, f in expected.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in settings]:
        raise ConfigError(f"{name} needs {missing[0]}=...; write for instance {example}")
    refuse_wrong_kinds(name, chosen, settings, example)
    return chosen(**settings)


def refuse_wrong_kinds(name: str, chosen: type, settings: Mapping[str, object], example: str) -> None:
    """Refuse a word where a dataclass expects a number or a truth value; ranges and words are its own to check.

    Args:
        name: What is being made, for the message.
        chosen: The dataclass.
        settings: Its arguments.
        example: A valid specification, for the message.

    Raises:
        ConfigError: On the first argument of the wrong kind.
    """
    hints = typing.get_type_hints(chosen)
    for key, value in settings.items():
        kinds = set(typing.get_args(hints[key])) or {hints[key]}  # the members of a union, or the type itself
        if value is None and type(None) in kinds:
            continue
        kinds.discard(type(None))
        if kinds == {bool}:
            expected, fits = "true or false", isinstance(value, bool)
        elif kinds == {int}:
            expected, fits = "an integer", is_whole_number(value)
        elif kinds <= {int, float}:
            expected, fits = "a number", isinstance(value, numbers.Real) and not isinstance(value, bool)
        else:
            continue
        if not fits:
            raise ConfigError(f"{name}: {key} must be {expected}, got {value!r}; write for instance {example}")


def _arguments(name: str, text: str, example: str) -> Iterator[tuple[str, object]]:
    """Yield (key, value) per argument."""
    position = 0
    while text[position:].strip():
        match = _ARGUMENT.match(text, position)
        if match is None:
            raise ConfigError(
                f"cannot read the arguments of {name}({text}) from {text[position:]!r} on; expected key=value"
                " separated by commas, text with commas, spaces or brackets in quotes; "
                f"write for instance {example}"
            )
        quoted = match["single"] if match["single"] is not None else match["double"]
        yield match["key"], _bare_value(match["bare"]) if quoted is None else quoted
        position = match.end()


def _bare_value(word: str) -> object:
    """Return a number or truth value if the word is one, else the word itself."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return word  # not a Python literal, hence a word; whoever expects a number refuses it
    return value if isinstance(value, (int, float)) else word
