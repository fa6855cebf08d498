"""A score's tables and pictures beside it: each class, and which class is taken for which."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import plots
from .._files import write_files
from .scores import INSTALL, Score, has_torchmetrics

# classes up to which a picture has their names, and a number in each cell
_NAMED, _NUMBERED = 40, 20


def write_details(folder: Path, score: Score, class_names: Sequence[str] | None) -> list[str]:
    """Write ``per_class.csv``, and of single classes ``confusion_matrix.csv`` and ``.png``.

    Returns:
        Sentences on what was left out for want of a package.
    """
    names = list(class_names or map(str, range(len(score.per_class))))
    several = score.map is not None
    each = [
        (n, "" if v is None else f"{v:.4f}") for n, v in zip(names, score.per_class, strict=True)
    ]
    title = ("class", "average_precision" if several else "top1")
    files = {folder / "per_class.csv": _csv([title, *each])}
    left_out = []
    if not has_torchmetrics():
        left_out.append(f"calibration and confusion were left out: {INSTALL}")
    if score.confusion is not None:
        rows = [(n, *row) for n, row in zip(names, score.confusion.tolist(), strict=True)]
        files[folder / "confusion_matrix.csv"] = _csv([("true \\ answer", *names), *rows])
        if reason := plots.missing():
            left_out.append(f"confusion_matrix.png was left out: {reason}")
        else:
            files[folder / "confusion_matrix.png"] = _picture(score.confusion, names)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return left_out


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # a class's name may be a folder's whose bytes are no UTF-8
    return text.getvalue().encode(errors="surrogateescape")


def _picture(confusion: Tensor, names: Sequence[str]) -> bytes:
    """Shares of each true class, row by row."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.5 + 0.3 * len(names))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the true class", fraction=0.046)
        axes.set(xlabel="answer", ylabel="true class")
        if len(names) <= _NAMED:
            shown = [name.encode(errors="replace").decode()[:24] for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90)
            axes.set_yticks(range(len(names)), shown)
        if len(names) <= _NUMBERED:
            for row, counts in enumerate(confusion.tolist()):
                for column, count in enumerate(counts):
                    if count:
                        color = "white" if shares[row, column] > 0.5 else "black"
                        where = {"ha": "center", "va": "center", "fontsize": 8}
                        axes.text(column, row, str(count), color=color, **where)

    return plots.draw_png(side + 1, side, draw)
