"""What a run leaves for people to read: progress, CSV, learning curve, summary."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .. import plots
from .._files import write_files

# off a terminal, within an epoch
SECONDS_BETWEEN_LINES = 30.0
# one row an epoch; losses in nats, scores in percent, time in seconds
_SPEED = ("images_per_second", "seconds")
COLUMNS = {
    "multiclass": (
        *("epoch", "lr", "train_loss", "train_top1", "validation_loss", "validation_top1"),
        *_SPEED,
    ),
    "multilabel": ("epoch", "lr", "train_loss", "validation_loss", "validation_map", *_SPEED),
}


def write_csv(output: Path, history: Sequence[dict[str, Any]], task: str) -> None:
    """``history.csv``: one row an epoch, rewritten whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS[task], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_files({output / "history.csv": text.getvalue().encode()})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, rewritten whole."""
    write_files({path: (json.dumps(content, indent=2) + "\n").encode()})


def plot_learning_curve(output: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """``learning_curve.png``: loss and score of training and validation over the epochs.

    Without matplotlib one line on standard error says so instead.
    """
    if reason := plots.missing():
        print(f"learning_curve.png was left out: {reason}", file=sys.stderr)
        return
    epochs = [row["epoch"] for row in history]

    def draw(figure: Any) -> None:
        several = any("validation_map" in row for row in history)
        quantities = {"loss": "cross entropy (nats)", "top1": "top-1 (%)"}
        if several:
            quantities = {
                "loss": "binary cross entropy (nats)",
                "map": "mean average precision (%)",
            }
        for axes, (quantity, label) in zip(figure.subplots(1, 2), quantities.items(), strict=True):
            for split in ("train", "validation"):
                values = [row.get(f"{split}_{quantity}") for row in history]
                if any(v is not None for v in values):
                    axes.plot(epochs, values, marker=".", label=split)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        figure.suptitle(title)

    write_files({output / "learning_curve.png": plots.draw_png(9, 3.6, draw)})


class ProgressReport:
    """A bar with images/s and the time that is left, and one line an epoch.

    Where the output is no terminal there is no bar, and the lines tell the time that is left.
    """

    def __init__(self, total_batches: int, done: int, show: bool) -> None:
        self.console = Console(quiet=not show, highlight=False, soft_wrap=True)
        self._total, self._first, self._done, self._images = total_batches, done, done, 0
        self._start = self._last_line = time.perf_counter()
        self._last_loss: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[speed]}  left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
            transient=True,
        )
        self._task: TaskID = self._bar.add_task(
            "training", total=total_batches, completed=done, speed=""
        )

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def batches(self, count: int, images: int, epoch: int, epochs: int) -> None:
        """``count`` more batches with ``images`` images are done."""
        self._done += count
        self._images += images
        loss = "" if self._last_loss is None else f"  loss {self._last_loss:.4f}"
        self._bar.update(
            self._task,
            completed=self._done,
            description=f"epoch {epoch}/{epochs}{loss}",
            speed=self._speed(),
        )

    def step(self, epoch: int, batch: int, batches: int, loss: float) -> None:
        """The loss since the last look; off a terminal a line of it now and then."""
        self._last_loss = loss
        now = time.perf_counter()
        if self.console.is_terminal or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        self.console.print(
            f"epoch {epoch:>3}  batch {batch}/{batches}  loss {loss:.4f}  {self._speed()}  "
            f"left {self._left()}"
        )

    def _speed(self) -> str:
        return f"{self._images / max(time.perf_counter() - self._start, 1e-9):,.0f} images/s"

    def _left(self) -> str:
        elapsed = time.perf_counter() - self._start
        seconds = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
        days, seconds = divmod(int(seconds), 86_400)
        clock = time.strftime("%H:%M:%S", time.gmtime(seconds))
        return f"{days} d {clock}" if days else clock

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """The line of a finished epoch."""
        self._last_line = time.perf_counter()
        train, validation = (
            f"{split} loss {row[f'{split}_loss']:.4f} {_score(row, split)}"
            if row.get(f"{split}_loss") is not None
            else ""
            for split in ("train", "validation")
        )
        self.console.print(
            f"epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.2e}  {train}{validation}"
            f"{row['images_per_second']:,.0f} images/s  left {self._left()}"
        )

    def say(self, text: str) -> None:
        """A line between the others."""
        self.console.print(text)


def _score(row: dict[str, Any], split: str) -> str:
    for name, word in (("top1", "top-1"), ("map", "mean average precision")):
        if row.get(f"{split}_{name}") is not None:
            return f"{word} {row[f'{split}_{name}']:6.2f} %  "
    return " "
