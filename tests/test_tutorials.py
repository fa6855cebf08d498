"""The tutorials run, offline, and print what their pages show."""

from __future__ import annotations

import json
import re

import notebooks
import pytest

PATHS = sorted(notebooks.TUTORIALS.glob("*.ipynb"))


def shown(outputs: list[dict]) -> list[str]:
    """What a reader sees, without what differs between machines: digits, lengths of numbers."""
    texts = []
    for output in outputs:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/plain", [])))
        texts.append("a picture" if "image/png" in data else re.sub(r"\d[\d.,e+-]*", "#", text))
    return texts


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_tutorial_prints_what_its_page_shows(path, tmp_path):
    notebook = json.loads(path.read_text())
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    printed = notebooks.run(notebook, tmp_path)
    assert list(map(shown, printed)) == list(map(shown, stored)), (
        f"{path.name} is out of date: python tools/notebooks.py"
    )
    assert any(printed)
