"""Options from dataclasses, on the command line and in a YAML file: `transformers.HfArgumentParser`, as TRL's commands.

A dataclass' fields are options, with ``-`` or ``_`` in their names. Only what is given reaches the dataclass, which is
the one owner of defaults; so whatever the command line has comes before what ``--config`` has.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
_METAVARS = {int: "N", str: "NAME", float: "X", string_to_bool: "BOOL"}


class Parser(HfArgumentParser):
    """Options of ``dataclass_types``, all of which a YAML file may have that ``--config`` names.

    ``elsewhere``: names that are no options here, and why.
    """

    def __init__(
        self, dataclass_types: Sequence[type] = (), *, elsewhere: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(list(dataclass_types), allow_abbrev=False, formatter_class=argparse.HelpFormatter, **options)
        self.elsewhere = elsewhere or {}
        self.hints = {name: x for cls in dataclass_types for name, x in typing.get_type_hints(cls).items()}
        #: Key of a file -> its option.
        self.keys: dict[str, argparse.Action] = {}
        for text, action in self._option_string_actions.items():
            if action.dest in self.hints and not isinstance(action, argparse._StoreFalseAction):
                self.keys[text.lstrip("-").replace("-", "_")] = action
        for action in self._actions:
            if action.dest in self.hints:
                self._adapt(action)
        if self.keys:
            self.usage = f"{self.prog} [--config FILE] OPTION ..."
            what = "YAML file of options, such as the config.yaml of a run; options on the command line come first"
            self.add_argument("--config", action=_FromFile, metavar="FILE", default=argparse.SUPPRESS, help=what)

    def _adapt(self, action: argparse.Action) -> None:
        """Show one spelling and the default, keep whole numbers in lists, refuse what is not finite."""
        hint = self.hints[action.dest]
        action.option_strings = [text for text in action.option_strings if "_" not in text]
        default = getattr(action.default, "value", action.default)
        if default not in (None, False) and not action.required and action.nargs != 0:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            action.help = f"{(action.help or '').split('. ')[0].rstrip('.')} ({shown})"
        action.help = (action.help or "").replace("%%", "%").replace("%", "%%")
        action.default = argparse.SUPPRESS
        if not action.choices and action.nargs != 0:
            action.metavar = _METAVARS.get(action.type, "JSON")
        if action.type is float:
            action.type = _number if action.nargs else _finite
        elif action.type is int and action.nargs == "+" and type(None) in typing.get_args(hint):
            action.nargs = "*"
        elif typing.get_origin(action.type) is dict:
            action.type = json.loads

    def call(self, name: str, flag: str, metavar: str, help: str) -> None:
        """Show the option ``name`` as ``flag``, by which it is known too, and demand it."""
        action = self.keys[name]
        self.keys[flag.lstrip("-")] = self._option_string_actions[flag] = action
        action.option_strings, action.metavar, action.help, action.required = [flag], metavar, help, True

    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"ebft-train: error: {' '.join(message.split())} (options: {self.prog} --help)\n")

    def settings_in(self, path: str) -> dict[str, Any]:
        """What a file sets, by the names of the dataclasses' fields.

        Raises:
            ValueError: it is no mapping of these options to values of their types; the message names file, key,
                what was expected and what came.
            OSError: it cannot be read.
        """
        out: dict[str, Any] = {}
        for key, value in _read(path).items():
            action = self.keys.get(key)
            if key in self.elsewhere:
                raise ValueError(f"{path}: {key}: expected no such option here: {self.elsewhere[key]}")
            if action is None:
                (nearest,) = difflib.get_close_matches(str(key).replace("-", "_"), self.keys, 1, cutoff=0)
                raise ValueError(
                    f"{path}: {key}: expected an option of this command, got {key!r}; did you mean {nearest}?"
                )
            if action.dest in out:
                raise ValueError(f"{path}: {key}: expected once, got it as {action.dest} too")
            expected = _expected(value, self.hints[action.dest], action)
            if expected is not None:
                raise ValueError(f"{path}: {key}: expected {expected}, got {json.dumps(value, default=str)}")
            out[action.dest] = value
        return out


class _FromFile(argparse.Action):
    """Takes from a file what the command line does not give, before or after."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, f"expected one file, got {value!r} too")
        setattr(namespace, self.dest, value)
        try:
            settings = parser.settings_in(value)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentError(self, str(error)) from None
        for action in parser.keys.values():
            if action.dest in settings:
                action.required = False
                if not hasattr(namespace, action.dest):
                    setattr(namespace, action.dest, settings[action.dest])


def part_of(cls: type, names: Collection[str], title: str) -> type:
    """A dataclass of only those fields of ``cls``, whose options stand under a title of their own in ``--help``."""
    hints = typing.get_type_hints(cls)
    chosen = [(x.name, hints[x.name], copy(x)) for x in fields(cls) if x.name in names]
    return make_dataclass(cls.__name__, chosen, namespace={"_argument_group_name": title})


def given(cls: type[T], arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ``cls`` that were given."""
    return {x.name: getattr(arguments, x.name) for x in fields(cls) if hasattr(arguments, x.name)}


def yaml_of(settings: dict[str, Any]) -> bytes:
    """A file that ``--config`` reads as ``settings``."""
    plain = {name: _plain(value) for name, value in settings.items()}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where 1.1 surprises: ``no`` is text, ``1e-6`` a number; and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As of SafeLoader. Raises ValueError for a key that comes twice."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            text, line = str(key.value), key.start_mark.line + 1
            if text in seen:
                raise ValueError(f"{text}: expected once, got it in lines {seen[text]} and {line}")
            seen[text] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, x) for tag, x in known if tag != _BOOL or first in "tTfF"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _read(path: str) -> dict[Any, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a safe one)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        got = {type(None): "nothing", str: "text", list: "a list"}.get(type(content), repr(content))
        raise ValueError(f"{path}: expected a mapping of options to values, got {got}")
    return content


def _expected(value: Any, hint: Any, action: argparse.Action) -> str | None:
    """What an option takes, or None if ``value`` is that."""
    if action.const is not None and value == action.const:  # what the bare flag means
        return None
    choices = action.choices if value is not None else None
    listed = value if isinstance(value, list) else [value]
    if _fits(value, hint) and not (choices and any(x not in choices for x in listed)):
        return None
    return f"one of {', '.join(map(str, choices))}" if choices else _words(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a file is of a type; whole numbers are numbers, True is none."""
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == x and type(value) is type(x) for x in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(x, parts[0]) for x in value)
    if origin is float:
        return type(value) in (int, float) and math.isfinite(value)
    if issubclass(origin, Enum):
        return value in [x.value for x in origin]
    return type(value) is origin


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(json.dumps(x) for x in parts)
    if origin is list:
        return f"a list ({_words(parts[0])} each)"
    return _WORDS.get(origin, "a mapping" if origin is dict else "a name")


def _number(text: str) -> int | float:
    return _finite(text) if "." in text or "e" in text.lower() else int(text)


def _finite(text: str) -> float:
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
