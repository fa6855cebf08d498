"""Run the demonstration, and say what came out: table, plots, JSON.

Every run has a process of its own, so that its peak memory is its own. They are forked from one
process that has loaded the libraries and computed nothing: loading them once is enough.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import plots
from .._files import write_files
from ..errors import TrainingStopped
from .recipes import RECIPES, Recipe, Result


@dataclass(frozen=True)
class Row:
    """One method over its seeds: top-1 in percent with its sample standard deviation over the
    seeds (None from a single one), mean seconds, largest peak in bytes."""

    method: str
    top1_mean: float
    top1_sd: float | None
    trained_parameters: int
    seconds_mean: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Report:
    """All runs, with what they ran on."""

    split: str
    recipes: dict[str, Recipe]
    results: list[Result]
    total_seconds: float

    @property
    def rows(self) -> list[Row]:
        """The table, in the order of the recipes."""
        return [
            _row(method, [result for result in self.results if result.method == method])
            for method in self.recipes
        ]

    def of(self, method: str) -> list[Result]:
        """The runs of one method."""
        return [result for result in self.results if result.method == method]


def _row(method: str, results: Sequence[Result]) -> Row:
    top1 = [result.top1 for result in results]
    peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
    return Row(
        method=method,
        top1_mean=statistics.mean(top1),
        top1_sd=statistics.stdev(top1) if len(top1) > 1 else None,
        trained_parameters=results[0].trained_parameters,
        seconds_mean=statistics.mean(result.seconds for result in results),
        peak_bytes=max(peaks, default=None),
    )


def quick_recipes() -> dict[str, Recipe]:
    """The same four methods, trained for seconds: the figures mean nothing, the code is the same.

    For smoke tests.
    """
    return {method: replace(recipe, epochs=1) for method, recipe in RECIPES.items()}


def run_all(
    recipes: dict[str, Recipe], seeds: int, *, split: str, say: Callable[[str], None]
) -> Report:
    """Every recipe from every seed, one after another.

    Args:
        recipes: method → recipe, in the order to run and to show.
        seeds: how many; they are 0, 1, ...
        split: "test", or "validation" (see ``experiment.load``).
        say: is told each run's outcome as a line.

    Raises:
        TrainingStopped: a run's process died, e.g. for want of memory.
    """
    start = time.perf_counter()
    # a server that loads torch once and forks; Windows has none and loads it for every run
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["pgn_fast.demo.experiment"])
    results = []
    for method, recipe in recipes.items():
        for seed in range(seeds):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                try:
                    result = process.submit(_run, method, seed, split, recipe).result()
                except BrokenProcessPool as error:
                    raise TrainingStopped(
                        f"the process of {recipe.label}, seed {seed} died; was it out of memory?"
                    ) from error
            results.append(result)
            say(
                f"{recipe.label:<12} seed {seed}  top-1 {result.top1:6.2f} %  "
                f"in {result.seconds:5.1f} s"
            )
    return Report(split, recipes, results, time.perf_counter() - start)


def _run(method: str, seed: int, split: str, recipe: Recipe) -> Result:
    from .experiment import run

    return run(method, seed, split=split, recipe=recipe)


def table(report: Report) -> Table:
    """The rows for a terminal, with the recipes below."""
    first = report.results[0]
    made = Table(
        title=f"Handwritten digits, {first.images} {report.split} images, frozen pgn_demo_vit",
        caption=caption(report),
        caption_justify="left",
    )
    made.add_column("method")
    for name in ("top-1 (%)", "trained parameters", "seconds", "peak memory (MB)"):
        made.add_column(name, justify="right")
    for row in report.rows:
        made.add_row(
            report.recipes[row.method].label,
            f"{row.top1_mean:.2f}" + ("" if row.top1_sd is None else f" ± {row.top1_sd:.2f}"),
            f"{row.trained_parameters:,}",
            f"{row.seconds_mean:.1f}",
            "?" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        )
    return made


def caption(report: Report) -> str:
    """How the figures came about: one line for what is common, one a method."""
    seeds = len({result.seed for result in report.results})
    lines = [
        f"± is the standard deviation over {seeds} seeds; seconds of training on "
        f"{report.results[0].threads} threads; peak memory above the loaded libraries.",
        "AdamW, a tenth of warm-up, cosine; small turns, shifts and scalings of the images; heads "
        "start as a ridge probe.",
    ]
    for recipe in report.recipes.values():
        options = {"num_prompts": "P", "library_size": "K"}
        sizes = [f"{options[k]}={v}" for k, v in recipe.options.items() if k in options]
        lines.append(
            f"{recipe.label}: "
            + ", ".join(
                [
                    *sizes,
                    f"lr {recipe.lr:g}",
                    f"weight decay {recipe.weight_decay:g}",
                    f"batch {recipe.batch_size}",
                    f"{recipe.epochs} epochs",
                ]
            )
        )
    return "\n".join(lines)


def differences(report: Report) -> list[str]:
    """Each method against the one before it: is the step larger than the seeds' noise?

    The noise is two standard errors of the difference of the two means.
    """
    lines = []
    rows = report.rows
    for lower, upper in itertools.pairwise(rows):
        if lower.top1_sd is None or upper.top1_sd is None:
            continue
        count = len(report.of(upper.method))
        error = math.sqrt((lower.top1_sd**2 + upper.top1_sd**2) / count)
        step = upper.top1_mean - lower.top1_mean
        verdict = "beyond" if abs(step) > 2 * error else "within"
        lines.append(
            f"{report.recipes[upper.method].label} - {report.recipes[lower.method].label}: "
            f"{step:+.2f} points, {verdict} the noise of the seeds (2 × {error:.2f})"
        )
    return lines


def content(report: Report, command: str) -> dict[str, Any]:
    """The JSON: what ran, on what, every run, and the table's rows."""
    return {
        "command": command,
        "split": report.split,
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
        "python": platform.python_version(),
        "machine": _processor(),
        "threads": report.results[0].threads,
        "total_seconds": round(report.total_seconds, 1),
        "recipes": {method: asdict(recipe) for method, recipe in report.recipes.items()},
        "rows": [asdict(row) for row in report.rows],
        "differences": differences(report),
        "results": [asdict(result) for result in report.results],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(report: Report, output: Path, command: str, record: Path | None = None) -> list[Path]:
    """``demo.json``, ``accuracy.png`` and ``learning_curves.png`` into the folder ``output``; the
    pictures where matplotlib is installed.

    Args:
        report: of ``run_all``.
        output: made where it is missing.
        command: that made it, for the JSON.
        record: a second place for the JSON.

    Returns:
        The files written.
    """
    text = (json.dumps(content(report, command), indent=1) + "\n").encode()
    files = {output / "demo.json": text}
    if plots.missing() is None:
        files[output / "accuracy.png"] = plots.draw_png(9, 3.6, partial(_draw_accuracy, report))
        files[output / "learning_curves.png"] = plots.draw_png(
            9, 3.6, partial(_draw_losses, report)
        )
    if record is not None:
        files[record] = text
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return list(files)


def _draw_accuracy(report: Report, figure: Any) -> None:
    by_method, by_size = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(report.rows):
        results = report.of(row.method)
        label, color = report.recipes[row.method].label, f"C{place}"
        by_method.scatter([place] * len(results), [r.top1 for r in results], color=color, s=18)
        by_method.hlines(row.top1_mean, place - 0.3, place + 0.3, color=color)
        by_size.errorbar(
            row.trained_parameters,
            row.top1_mean,
            yerr=row.top1_sd or 0,
            fmt="o",
            capsize=3,
            color=color,
            label=label,
        )
    labels = [recipe.label for recipe in report.recipes.values()]
    by_method.set_xticks(range(len(labels)), labels)
    by_method.set(ylabel=f"{report.split} top-1 (%)", title="each dot a seed, the line their mean")
    by_size.set(xlabel="trained parameters", xscale="log", title="mean ± standard deviation")
    by_size.legend()
    for axes in (by_method, by_size):
        axes.grid(alpha=0.3)


def _draw_losses(report: Report, figure: Any) -> None:
    axes = figure.subplots()
    for place, method in enumerate(report.recipes):
        for first, result in enumerate(report.of(method)):
            epochs = len(result.losses)
            axes.plot(
                [(epoch + 1) / epochs for epoch in range(epochs)],
                result.losses,
                color=f"C{place}",
                alpha=0.7,
                label=report.recipes[method].label if first == 0 else None,
            )
    axes.set(
        xlabel="share of the training done", ylabel="training cross entropy (nats)", yscale="log"
    )
    axes.grid(alpha=0.3)
    axes.legend()
