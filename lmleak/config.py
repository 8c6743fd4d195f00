"""Configuration: flat dataclasses, one YAML file per run, command-line arguments that win over it.

Every value of a YAML file is turned into an argument and parsed like the real ones, so that types and choices are
checked in one way; the last word is the command line's. Field documentation is the string under the field.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lmleak.errors import ConfigError
from lmleak.lookup import suggest

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """A parser that refuses with ConfigError instead of ending the process."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse_config(
    config_class: type[T], argv: Sequence[str], *, prog: str = "lmleak", positional: Sequence[str] = ()
) -> T:
    """Return a configuration from ``[--config file.yaml] [WORD ...] [--key value ...]``.

    Args:
        config_class: A flat dataclass; every field needs a default or must be given.
        argv: Arguments without the program's name.
        prog: The command's name in messages.
        positional: Fields that may also be given as words without ``--key``, in this order.

    Returns:
        The instance, after its own ``__post_init__`` checks.

    Raises:
        ConfigError: On unknown keys, wrong types or an unreadable file.
    """
    parser = _parser(config_class, prog, positional)
    path, rest = _split_config(list(argv))
    settings = _yaml_settings(config_class, parser, path) if path else {}
    given, unknown = parser.parse_known_args(rest)
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), unknown))[: len(positional)]
    unknown = unknown[len(words) :]
    fields = dataclasses.fields(config_class)
    if unknown:
        key = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        raise ConfigError(f"unknown argument {unknown[0]!r}. {suggest(key, [*(f.name for f in fields), 'config'])}")
    for name, word in zip(positional, words, strict=False):
        if name in given:
            raise ConfigError(f"{name} is given twice: {word!r} and --{name} {getattr(given, name)!r}")
        settings[name] = _parse_one(parser, name, word)
    settings |= vars(given)
    required = [f.name for f in fields if _default(f) is dataclasses.MISSING and f.name not in settings]
    missing = [name.upper() if name in positional else f"--{name}" for name in required]
    if missing:
        raise ConfigError(f"required: {', '.join(missing)} (see {prog} --help)")
    return config_class(**settings)


def to_yaml(config: Any) -> str:
    """Return a resolved configuration as YAML that :func:`parse_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def check_counts(config: Any, *names: str) -> None:
    """Refuse settings that count something and are below 1.

    Args:
        config: The settings.
        *names: Fields; None, where something is not set, passes.

    Raises:
        ConfigError: With the first one's value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def check_positive(config: Any, *names: str) -> None:
    """Refuse settings that are not positive and finite: numbers, or lists of them, which must not be empty.

    Args:
        config: The settings.
        *names: Fields.

    Raises:
        ConfigError: With the first one's value.
    """
    for name in names:
        value = getattr(config, name)
        several = isinstance(value, (list, tuple))
        values = value if several else [value]
        if not values or not all(0 < number < math.inf for number in values):
            raise ConfigError(f"{name} must be positive{' and not empty' if several else ''}, got {value}")


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of --config and the other arguments."""
    path, rest, i = None, [], 0
    while i < len(argv):
        if argv[i] == "--config":
            if i + 1 == len(argv):
                raise ConfigError("--config needs a file name after it")
            path, i = argv[i + 1], i + 2
        elif argv[i].startswith("--config="):
            path, i = argv[i].partition("=")[2], i + 1
        else:
            rest.append(argv[i])
            i += 1
    return path, rest


def _yaml_settings(config_class: type, parser: _Parser, path: str) -> dict[str, Any]:
    """Return the settings of a YAML file, each value checked by the parser as if it were an argument."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, got a {type(settings).__name__}")
    hints = typing.get_type_hints(config_class)
    names = [f.name for f in dataclasses.fields(config_class)]
    read: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in names:
            raise ConfigError(f"{path}: unknown key {key!r}. {suggest(str(key), names)}")
        if value is None:
            if type(None) in typing.get_args(hints[key]):
                read[key] = None
            continue  # elsewhere null stands for the default
        try:
            read[key] = _read(parser, key, value, _kind(hints[key]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return read


def _read(parser: _Parser, key: str, value: Any, kind: dict[str, Any]) -> Any:
    """Return one YAML value as the parser reads it."""
    if isinstance(value, dict):
        raise ConfigError(f"{key} holds a mapping; settings are flat")
    if isinstance(value, list):
        if "nargs" not in kind:
            raise ConfigError(f"{key} takes one value, got a list of {len(value)}")
        if any(v is None or isinstance(v, bool | dict | list) for v in value):
            raise ConfigError(f"{key} must be a flat list of numbers or words")
        return [item for v in value for item in _parse_one(parser, key, v)]  # item by item: one may begin with a dash
    if isinstance(value, bool) and "action" in kind:
        return value
    if isinstance(value, bool):
        raise ConfigError(f"{key}: {value} is read as a truth value; quote it if a word is meant")
    return _parse_one(parser, key, value)


def _parse_one(parser: _Parser, key: str, value: Any) -> Any:
    """Return a value as the parser reads it where it is given as ``--key=value``."""
    return vars(parser.parse_args([f"--{key}={value}"]))[key]


def _default(field: dataclasses.Field) -> Any:
    """Return the default of a field, ``dataclasses.MISSING`` if it must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _parser(config_class: type, prog: str, positional: Sequence[str]) -> _Parser:
    """Return a parser with one option per field, named --field-name (or --field_name)."""
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *map(str.upper, positional), "[--key value ...]"]) if positional else None,
        description=(inspect.getdoc(config_class) or "").partition("\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # a field that is not given keeps the dataclass's default
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; arguments given here win")
    documentation, hints = _field_documentation(config_class), typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        text, default = documentation.get(field.name, ""), _default(field)
        if default is dataclasses.MISSING:
            text = f"{text} (required)"
        elif default not in (None, ""):
            text = f"{text} (default: {default})"
        names = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])
        parser.add_argument(*names, dest=field.name, help=text.replace("%", "%%"), **_kind(hints[field.name]))
    return parser


def _kind(hint: Any) -> dict[str, Any]:
    """Return argparse's keywords for a field type: bool, int, float, str, Literal, ``X | None``, list[X]."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [h for h in typing.get_args(hint) if h is not type(None)]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint), "type": type(typing.get_args(hint)[0])}
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return {"nargs": "*", "type": item, "metavar": item.__name__.upper()}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _field_documentation(config_class: type) -> dict[str, str]:
    """Return the string under each annotated field, in the class body and in those of its bases."""
    documentation: dict[str, str] = {}
    for base in reversed([c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        documentation |= {
            statement.target.id: inspect.cleandoc(after.value.value)
            for statement, after in itertools.pairwise(body)
            if isinstance(statement, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        }
    return documentation
