"""The picture of a search: every trial's way, and what its rate came to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots
from .._files import write_files
from .config import TrainConfig

if TYPE_CHECKING:
    from .tune_trial import Trial


def plot_trials(path: Path, trials: Sequence[Trial], best: Trial, base: TrainConfig) -> None:
    """Validation score over epochs, and over the learning rate, one color a method.

    Without matplotlib one line on standard error says so instead.
    """
    if reason := plots.missing():
        print(f"{path.name} was left out: {reason}", file=sys.stderr)
        return
    scored = [trial for trial in trials if trial.scores]
    methods = sorted({trial.given["method"] for trial in scored})
    colors = {method: f"C{i}" for i, method in enumerate(methods)}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for trial in scored:
            color, chosen = colors[trial.given["method"]], trial is best
            epochs = sorted(map(int, trial.scores))
            scores = [trial.scores[str(n)] for n in epochs]
            left.plot(epochs, scores, ".-", color=color, lw=3 if chosen else 1)
            rate = trial.given.get("lr", base.lr)
            right.plot(
                rate, trial.best, "*" if chosen else "o", color=color, ms=12 if chosen else 5
            )
        for method, color in colors.items():
            right.plot([], [], "o", color=color, label=method)
        left.set(xlabel="epochs", ylabel=f"validation {base.eval_metric}", xscale="log")
        right.set(xlabel="learning rate", xscale="log", title=f"best: trial {best.number}")
        right.legend()
        for axes in (left, right):
            axes.grid(alpha=0.3)

    write_files({path: plots.draw_png(9, 3.6, draw)})
