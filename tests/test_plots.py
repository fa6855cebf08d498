"""Pictures, and what happens where matplotlib is not installed."""

from __future__ import annotations

import importlib.util

import pytest

from pgn_fast import plots
from pgn_fast.train.reports import plot_learning_curve

HISTORY = [{"epoch": e, "train_loss": 1 / e, "train_top1": 10.0 * e} for e in (1, 2, 3)]


def test_a_png_is_drawn(tmp_path):
    plot_learning_curve(tmp_path, HISTORY, "a title")
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_a_name_that_the_font_lacks_is_no_warning(tmp_path):
    plot_learning_curve(tmp_path, HISTORY, "风景")
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    plot_learning_curve(tmp_path, HISTORY, "a title")
    assert not list(tmp_path.iterdir())
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"learning_curve.png was left out: {plots.missing()}"]
    assert "pip install 'pgn_fast[plot]'" in lines[0]


def test_an_error_while_drawing_is_not_hidden():
    def draw(figure):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plots.draw_png(1, 1, draw)
