"""How the site differs from the pages as they stand here: a few lines for MkDocs, so that nothing is written twice.

The README, CONTRIBUTING.md, CHANGELOG.md and the notebook become pages. A docstring that ``docs/build.py`` puts into a
page as text is rendered from the code instead, with links. Links to files that the site does not have become names.
"""

from __future__ import annotations

import json
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the site, by the files outside of docs/ that they are.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/first_steps.ipynb": "notebook.md",
}
# With the heading that is the name alone, which mkdocstrings gives too.
_BLOCK = re.compile(r"(?:^## `\w+`\n\n)?<!-- docstring: ([\w.]+) -->\n.*?<!-- end -->", re.S | re.M)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)]*)?\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)
_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand elsewhere."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_notebook(text) if name.endswith(".ipynb") else text))
    return files


def _notebook(text: str) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells) + "\n"


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Docstrings from the code, and links within the site."""
    here = next((name for name, other in PAGES.items() if other == page.file.src_uri), f"docs/{page.file.src_uri}")
    markdown = _BLOCK.sub(lambda found: f"::: {found[1]}", markdown)
    parts = _CODE.split(markdown)  # every other one is code, where nothing is a link
    parts[::2] = [_LINK.sub(lambda found: _link(found, here, files), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], here: str, files: Any) -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    page = PAGES.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(page) is not None:
        return f"[{text}]({page}{anchor})"
    if not (ROOT / path).exists():
        return found[0]  # MkDocs says that it leads nowhere
    return f"`{path}`" if text in (target, path) else f"{text} (`{path}`)"


class Roles(Extension):
    """Sphinx's roles in docstrings become Markdown: links to what the site shows, names of what it does not."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda found: self._link(obj, found[1]), obj.docstring.value)

    def _link(self, obj: Any, name: str) -> str:
        scopes = ["", obj.path, obj.path.rpartition(".")[0], obj.path.partition(".")[0]]
        for path in (f"{scope}.{name}".lstrip(".") for scope in scopes):
            public = ".".join([path.split(".")[0], *path.split(".")[-2 if "." in name else -1 :]])
            for candidate in (path, public):
                if candidate in _shown() or candidate.rpartition(".")[0] in _shown():
                    return f"[`{name.rpartition('.')[2]}`][{candidate}]"
        return f"`{name}`"


@cache
def _shown() -> frozenset[str]:
    """What the pages show the docstrings of."""
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    return frozenset(name for text in pages for name in _BLOCK.findall(text))
