"""Run the tutorials and keep what they print: python tools/notebooks.py [docs/tutorials/timm.ipynb]

A notebook's code cells run one after the other in an empty folder; what they print, the value of a
last expression, and a picture (a PIL image) become the cells' outputs, as in Jupyter.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "docs/tutorials"


def run(notebook: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Outputs of each code cell, run in ``folder``."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        return [_outputs("".join(cell["source"]), i, names) for i, cell in enumerate(cells, 1)]
    finally:
        os.chdir(before)


def _outputs(source: str, count: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        found.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode()}
        result = {"output_type": "execute_result", "execution_count": count, "metadata": {}}
        found.append({**result, "data": data})
    return found


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(TUTORIALS.glob("*.ipynb"))):
        notebook = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            outputs = run(notebook, Path(folder))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for count, (cell, found) in enumerate(zip(cells, outputs, strict=True), 1):
            cell["execution_count"], cell["outputs"] = count, found
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
