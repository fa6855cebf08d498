"""Training runs from their configuration to their summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingStopped, UserError
from . import checkpoints
from .config import TrainConfig
from .distributed import Processes
from .failures import from_worker, lost_process, out_of_memory, what_is_kept
from .parts import Parts, assemble
from .run import Run
from .run_folder import RunFolder
from .signals import StopRequest


def train(
    config: TrainConfig,
    output: Path,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    show: bool = True,
) -> dict[str, Any]:
    """Run a training to its end and return its summary, which is also ``output/summary.json``.

    Args:
        config: what to train on what, and how.
        output: folder for ``best/`` and ``last/`` (adapters), ``checkpoint.pt``, ``history.csv``,
            ``learning_curve.png`` and ``summary.json``. One run works in it at a time.
        device: the CPU where None; under torchrun each process takes its own accelerator.
        resume: continue from ``output/checkpoint.pt``; from the beginning where there is none.
        show: print progress.

    Raises:
        UserError: the arguments or the data do not work, or ``output`` belongs to another run;
            nothing was created.
        TrainingStopped: the loss or a trained weight is not finite, the device's memory is full, a
            data-loading process died, or a signal asked to stop; the checkpoint is the last good
            one.
        OSError: a file could not be written; the older one is whole.
    """
    return run(config, output, lambda: assemble(config), device, resume, show)


def whole(run: Run) -> dict[str, Any]:
    """Train to the last epoch and touch the test images; the summary."""
    run.fit()
    return run.finish()


def run(
    config: TrainConfig,
    output: Path,
    make_parts: Callable[[], Parts],
    device: torch.device | None,
    resume: bool,
    show: bool,
    work: Callable[[Run], Any] = whole,
) -> Any:
    """``train`` with parts from ``make_parts``, which is called once ``output`` may be used.

    Args:
        work: what is done with the run.
    """
    with (
        Processes(device or torch.device("cpu")) as processes,
        RunFolder(output, resume=resume, writes=processes.first) as folder,
        StopRequest() as stop,
    ):
        try:
            state = checkpoints.load(output) if resume else None
            run = Run(config, folder, processes, make_parts(), state, stop, show)
            folder.create(run.config.as_dict())
            try:
                return work(run)
            finally:
                run.trackers.close()
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(out_of_memory(config, output, error)) from error
        except UserError as error:
            raise from_worker(error) from error
        except RuntimeError as error:
            if (reason := lost_process(error)) is None:
                raise
            raise TrainingStopped(f"{reason}; {what_is_kept(output)}.") from error
