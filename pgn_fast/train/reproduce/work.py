"""A plan's runs, one after the other: what is finished stays, what was begun continues."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..._files import write_files
from ...errors import TrainingStopped, UserError
from .. import checkpoints
from ..config import TrainConfig
from ..loop import train
from ..signals import Interrupted
from ..state import FREE, resume_config
from .plans import Cell, Experiment

_STOPPED = "stopped.json"
_DIVERGED = re.compile(r"the loss is -?(nan|inf)|is not finite")


class Result(NamedTuple):
    """What the final runs of an experiment reached.

    Attributes:
        scores: test top-1 in percent, one a seed that came to its end.
        stopped: folders of final runs whose loss was not finite.
        chosen: the options that the search chose.
        images: test images behind a score, the fewest of all runs; 0: not written down.
    """

    scores: list[float]
    stopped: list[str]
    chosen: Mapping[str, Any]
    images: int = 0


def run_experiment(
    experiment: Experiment,
    output: Path,
    device: torch.device,
    say: Callable[[str], None],
    show: bool = True,
) -> Result:
    """Run what is missing of an experiment, in ``output``.

    Raises:
        UserError: data that are not there, options that cannot work, or a folder of other choices.
        TrainingStopped: a run ended on the way; the same command continues it. A loss that is not
            finite does not end the others: in the search it counts as the worst.
    """
    for cell in experiment.search:
        _run(cell, output, device, say, show)
    chosen = choose(experiment, output)
    if chosen:
        say(f"{experiment.data.name}: chosen {_words(chosen)}")
    scores, stopped, counts = [], [], []
    for cell in experiment.final:
        cell = dataclasses.replace(cell, options={**chosen, **cell.options})
        summary = _run(cell, output, device, say, show)
        if summary is None:
            stopped.append(cell.folder)
        elif summary["test"] is None:
            raise UserError(f"{output / cell.folder}: the run has no test images.")
        else:
            scores.append(summary["test"]["top1"])
            counts.append(summary["test"]["images"])
    return Result(scores, stopped, chosen, min(counts, default=0))


def is_done(cell: Cell, output: Path) -> bool:
    """Whether a run has come to its end, or to a loss that is not finite."""
    folder = output / cell.folder
    return (folder / "summary.json").is_file() or (folder / _STOPPED).is_file()


def choose(experiment: Experiment, output: Path) -> dict[str, Any]:
    """The options with the best validation top-1 of the last epoch; of equals the lowest rate.

    Raises:
        UserError: every run of the search ended by a loss that is not finite.
    """
    if not experiment.search:
        return {}
    best: tuple[float, float] | None = None
    chosen: dict[str, Any] = {}
    for cell in experiment.search:
        score = _last_validation(output / cell.folder)
        key = (score, -float(cell.options["lr_base"]))
        if score >= 0 and (best is None or key > best):
            best = key
            names = (*experiment.tuned, "lr_base_scale")
            chosen = {n: cell.options[n] for n in names if n in cell.options}
    if best is None:
        raise UserError(
            f"{experiment.data.name}: no run of the search in {output} came to its end; give "
            "lower `base_lr`."
        )
    return chosen


def _last_validation(folder: Path) -> float:
    if (folder / _STOPPED).is_file():
        return -1.0
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return float(rows[-1]["validation_top1"])


def _run(
    cell: Cell, output: Path, device: torch.device, say: Callable[[str], None], show: bool
) -> dict[str, Any] | None:
    """The summary of a run, which is done first where it is missing; None: it diverged."""
    folder, config = output / cell.folder, cell.config()
    if (folder / _STOPPED).is_file():
        return None
    if (folder / "summary.json").is_file():
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        _check_same(folder, summary["config"], config)
        return summary
    say(f"run {cell.folder}")
    begun = (folder / checkpoints.FILE).is_file()
    resumed = resume_config(folder, dict(cell.options)) if begun else None
    try:
        return train(resumed or config, folder, device=device, resume=folder.exists(), show=show)
    except Interrupted:
        raise
    except TrainingStopped as stop:
        if not _DIVERGED.search(str(stop)):
            raise
        say(f"{cell.folder}: {stop}")
        note = json.dumps({"reason": str(stop)}) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / _STOPPED: note.encode()})
        return None


def _check_same(folder: Path, saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises UserError: a finished run was made by other choices."""
    # the rate is computed from lr_base when a run begins
    skipped = FREE | ({"lr"} if config.lr_base is not None else set())
    for name, value in config.as_dict().items():
        if name not in skipped and saved.get(name) != value:
            raise UserError(
                f"`output`: the finished run in {folder} has {name} = {saved.get(name)!r}, now "
                f"{value!r} is asked for. Give another folder."
            )


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in options.items() if name != "lr_base_scale"
    )
