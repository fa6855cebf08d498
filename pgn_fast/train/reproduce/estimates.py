"""What a plan takes: hours by the rate of this machine, disk by the size of what is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...errors import UserError
from .. import protocols
from ..config import TrainConfig
from ..methods import build_model, load_backbone_for
from .plans import Experiment, cost_of
from .work import is_done

_STEPS = 3
# best/ and last/, and in the checkpoint the weights and the optimizer's momentum
_COPIES = 4


@dataclass(frozen=True)
class Machine:
    """How fast one run is here, and what it leaves.

    Attributes:
        images_per_second: of a training step; None: not known.
        bytes_a_run: on disk.
        measured_with: what was timed, in words.
    """

    images_per_second: float | None
    bytes_a_run: int
    measured_with: str


def measure(experiment: Experiment, device: torch.device, batch_size: int) -> Machine:
    """Time steps of the experiment's largest model, with random weights and images.

    Raises:
        UserError: no such backbone.
    """
    config = max((c.config() for c in experiment.cells()), key=lambda config: config.num_prompts)
    backbone = load_backbone_for(_without_weights(config))
    model = build_model(config, backbone, experiment.data.num_classes).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    size = getattr(backbone.patch_embed, "img_size", None) or (224, 224)
    images = torch.randn(batch_size, 3, *size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for step in range(_STEPS + 1):
        if step == 1:  # the first one warms up
            _wait(device)
            begin = time.perf_counter()
        nn.functional.cross_entropy(model(images), labels).backward()
    _wait(device)
    rate = _STEPS * batch_size / (time.perf_counter() - begin)
    prompts = "" if config.method == "linear" else f" with {config.num_prompts} prompts"
    return Machine(
        rate,
        _COPIES * sum(p.numel() * p.element_size() for p in trained),
        f"{config.method} on {config.model}{prompts}, batches of {batch_size} on {device}",
    )


def _without_weights(config: TrainConfig) -> TrainConfig:
    from dataclasses import replace

    if config.model == "pgn_demo_vit":
        return config
    kwargs = {k: v for k, v in config.model_kwargs.items() if k != "checkpoint_path"}
    return replace(config, model_kwargs={**kwargs, "pretrained": False}, pretrained_path=None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(experiments: Sequence[Experiment], output: Path, machine: Machine) -> str:
    """The plan as a table: runs, hours, disk, and where the files of a data set are missing."""
    lines = [
        "| data set | runs (done) | hours | MB | files |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    total_runs = total_hours = total_bytes = 0.0
    missing: list[str] = []
    for experiment in experiments:
        cost = cost_of(experiment)
        done = sum(is_done(cell, output) for cell in experiment.cells())
        rate = machine.images_per_second
        hours = 0.0 if rate is None else cost.hours(rate) * (cost.runs - done) / max(cost.runs, 1)
        size = cost.runs * machine.bytes_a_run
        reason = _missing(experiment)
        if reason:
            missing.append(reason)
        lines.append(
            f"| {experiment.data.name} | {cost.runs} ({done}) | "
            f"{'?' if rate is None else f'{hours:.1f}'} | {size / 1e6:.0f} | "
            f"{'missing' if reason else 'there'} |"
        )
        total_runs += cost.runs
        total_hours += hours
        total_bytes += size
    lines += [
        f"| **all** | {total_runs:.0f} | "
        f"{'?' if machine.images_per_second is None else f'{total_hours:.1f}'} | "
        f"{total_bytes / 1e6:.0f} | |",
        "",
        f"Rate: {machine.measured_with}"
        + (
            ""
            if machine.images_per_second is None
            else f", {machine.images_per_second:.1f} images per second in training"
        )
        + ". Hours are those of the runs that are left, one after the other.",
    ]
    return "\n".join([*lines, *dict.fromkeys(missing)]) + "\n"


def _missing(experiment: Experiment) -> str | None:
    """Why the data set's files cannot be read; None: they are there."""
    config = next(iter(experiment.cells())).config()
    try:
        protocols.parts_of(config)
    except UserError as error:
        return str(error)
    return None
