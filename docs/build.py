"""Fill the pages of this folder with what the code says of itself.

    python docs/build.py [--check]

Between ``<!-- docstring: module.name -->``, or ``<!-- options: module.Class -->``, and ``<!-- end -->`` stands the
signature and docstring of an object, or a table of a dataclass' options. ``--check`` writes nothing and fails if a page
is not what the code gives now.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from bench._documents import drift, table, write  # noqa: E402

_BLOCK = re.compile(r"(<!-- (docstring|options): ([\w.]+) -->\n).*?(<!-- end -->)", re.S)
# An annotation, which is kept as a string.
_QUOTED = re.compile(r"(: |-> )'([^']*)'")


def main() -> None:
    """Parse the command line; write, or check, every page with a block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is not up to date")
    check = parser.parse_args().check
    problems = []
    for path, text in pages():
        if check:
            problems += drift(path, text, "python docs/build.py")
        else:
            write(path, text)
    sys.exit("\n".join(problems) or None)


def pages() -> Iterator[tuple[Path, str]]:
    """Each page with a block, and what it should be."""
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            yield path, _BLOCK.sub(lambda found: f"{found[1]}\n{_block(found[2], found[3])}\n{found[4]}", text)


def names() -> list[str]:
    """Of all objects that the pages show."""
    return [found[3] for path in FOLDER.glob("*.md") for found in _BLOCK.finditer(path.read_text(encoding="utf-8"))]


def _block(kind: str, name: str) -> str:
    found = pkgutil.resolve_name(name)
    return _options(found) if kind == "options" else _docstring(name.rpartition(".")[2], found)


def _docstring(name: str, found: Any) -> str:
    """Signature and docstring as text: docstrings are written to be read as they are."""
    parts = [_signature(name, found), inspect.cleandoc(found.__doc__ or "")]
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        value = value.__func__ if isinstance(value, classmethod) else value
        documented = not member.startswith("_") and getattr(value, "__doc__", None)
        if documented and inspect.isfunction(value):
            parts += [_signature(f"{name}.{member}", value), inspect.cleandoc(value.__doc__)]
        elif documented and isinstance(value, (property, cached_property)):
            parts += [f"{name}.{member}", inspect.cleandoc(value.__doc__)]
    return "```text\n" + "\n\n".join(parts) + "\n```\n"


def _signature(name: str, found: Any) -> str:
    """One line, or a line per parameter where that is too long; of a protocol, how it is called."""
    if is_dataclass(found) and any("help" in option.metadata for option in fields(found)):
        return f"{name}(...)"  # its options have a table
    signature = inspect.signature(found.__call__ if getattr(found, "_is_protocol", False) else found)
    parameters = [x for x in signature.parameters.values() if x.name not in ("self", "cls")]
    text = _plain(name + str(signature.replace(parameters=parameters)))
    if len(text) <= 100:
        return text
    lines, returns = [], "" if signature.return_annotation is signature.empty else text.rpartition(") -> ")[2]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        lines.append(f"    {_plain(str(parameter))},")
    return "\n".join([f"{name}(", *lines, f") -> {returns}" if returns else ")"])


def _plain(signature: str) -> str:
    return _QUOTED.sub(r"\1\2", signature)


def _options(found: Any) -> str:
    """Name, default and help of the options that a dataclass itself declares."""
    rows = []
    for option in fields(found):
        if option.name not in found.__annotations__:
            continue
        default = option.default_factory() if option.default is MISSING else option.default
        choices = option.metadata.get("choices")
        told = option.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        rows.append((f"`{option.name}`", f"`{default}`", told.replace("|", "\\|")))
    return table(("option", "default", "what"), rows)


if __name__ == "__main__":
    main()
