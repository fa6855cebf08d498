"""Scalars for TensorBoard, Weights & Biases, MLflow and Trackio, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import numbers
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .config import TrainConfig

PROJECT = "pgn_fast"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises UserError: a tracker's package is not installed; says how to get it."""
    for package in ("accelerate", *names) if names else ():
        if importlib.util.find_spec(package) is None:
            also = "" if package in ("accelerate", "tensorboard") else f" {package}"
            raise UserError(
                f"`tracker` {' '.join(names)} needs the package {package}: "
                f"pip install 'pgn_fast[tracking]'{also}"
            )


class Trackers:
    """The trackers that are started; before, and without names, nothing happens."""

    def __init__(self) -> None:
        self._trackers: list[Any] = []

    def start(
        self, config: TrainConfig, output: Path, device: torch.device, next_step: int
    ) -> None:
        """Start those of ``config.tracker``.

        Args:
            config: of the run; goes to the trackers as it is.
            output: the run's folder. TensorBoard's files go to ``tensorboard/`` in it.
            device: of the run.
            next_step: optimizer steps are counted on from here; what a killed run logged after its
                checkpoint is hidden where the tracker can do so.
        """
        if not config.tracker:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # accelerate logs to Python's logging only where it knows which process this is
        PartialState(cpu=device.type == "cpu")
        for name in config.tracker:
            title, options = _options(name, config, output, next_step)
            tracker = LOGGER_TYPE_TO_CLASS[name](title, **options)
            tracker.start()
            # TensorBoard would get a run of its own for them; args.yaml has them
            if name != "tensorboard":
                tracker.store_init_configuration(_plain(config))
            self._trackers.append(tracker)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Numbers by name, as of optimizer step number ``step``."""
        values = {
            name.replace("_", "/", 1): value
            for name, value in row.items()
            if isinstance(value, numbers.Real)
        }
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        self._trackers.clear()


def _options(
    name: str, config: TrainConfig, output: Path, next_step: int
) -> tuple[str, dict[str, Any]]:
    """What accelerate calls the run, and the library's own options."""
    project = config.wandb_project or PROJECT
    if name == "tensorboard":
        return "tensorboard", {"logging_dir": str(output), "purge_step": next_step}
    if name == "mlflow":
        return project, {"run_name": output.name}
    if name == "trackio":
        return project, {"name": output.name, "resume": "allow"}
    resumed = config.wandb_resume_id
    again = {"id": resumed, "resume": "must"} if resumed else {}
    options = {"name": output.name, "dir": str(output), "tags": list(config.wandb_tags) or None}
    return project, options | again


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration in the types that every tracker takes."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in config.as_dict().items()
    }
