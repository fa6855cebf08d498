"""Hooks of mkdocs: `::: package.*` on a page stands for every name in the package's ``__all__``."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write a page's `::: package.*` out, one line a name."""
    return re.sub(r"^::: ([\w.]+)\.\*$", _every_name, markdown, flags=re.M)


def _every_name(found: re.Match[str]) -> str:
    package, folder = found[1], ROOT / found[1].replace(".", "/")
    source = (folder / "__init__.py").read_text()
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    # a function of its file's name: read statically, the package has the file by that name
    twice = lambda name: f"{name}.{name}" if (folder / f"{name}.py").is_file() else name
    return "\n".join(f"::: {package}.{twice(name)}" for name in names)
