"""What a run writes and reads back: its state in the checkpoint, its adapters."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from ..adapters import CONFIG_FILE, read_adapter, save_pretrained
from ..errors import TrainingStopped, UserError
from . import checkpoints
from .state import Position, Record

if TYPE_CHECKING:
    from .run import Run


def save_state(run: Run) -> None:
    """Replace the run's checkpoint; the first process writes what all of them know."""
    # position and generators are each process's own, the rest is the same everywhere
    own = {
        "position": vars(run.position),
        "random": checkpoints.random_state(run.device),
        "source": run.source.state() if run.position.batch else None,
    }
    processes = run.processes.collect(own)
    if not run.processes.first:
        return
    checkpoints.save(
        run.output,
        {
            "config": run.config.as_dict(),
            "images": len(run.splits.train),
            "model": run.model.adapter_state_dict(),
            "average": run.stepper.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.stepper.scaler.state_dict(),
            "schedule": run.schedule.state_dict(),
            "processes": processes,
            "record": vars(run.record),
        },
    )


def restore_state(run: Run, state: dict[str, Any]) -> None:
    """Put a run that was built from the same choices to where its checkpoint stands.

    Raises:
        UserError: other data, or another number of processes.
    """
    if state["images"] != len(run.splits.train):
        raise UserError(
            f"`resume`: the run began with {state['images']} training images, "
            f"{run.splits.train.origin} now has {len(run.splits.train)}. Put the data back, "
            "or start a new run with `output`."
        )
    world = len(state["processes"])
    if world != run.processes.world:
        raise UserError(
            f"`resume`: the run has {world} process(es), this is one of {run.processes.world}: "
            "other batches. Start as many again."
        )
    run.model.load_adapter_state_dict(state["model"])
    run.stepper.average.load_state_dict(state["average"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.stepper.scaler.load_state_dict(state["scaler"])
    run.schedule.load_state_dict(state["schedule"])
    own = state["processes"][run.processes.rank]
    run.position, run.record = Position(**own["position"]), Record(**state["record"])
    run.source.load_state(own["source"])
    checkpoints.set_random_state(own["random"], run.device)


def save_adapter(run: Run, name: str) -> str:
    """Write ``last/``, ``best/`` or another adapter of the run; the digest of its tensors."""
    folder = run.output / name
    save_pretrained(run.model, folder)
    return json.loads((folder / CONFIG_FILE).read_text())["weights_digest"]


def keep_adapter(run: Run, value: float, epoch: int) -> None:
    """Keep the adapters of the ``checkpoint_hist`` best epochs, the earlier of equals."""
    count = run.config.checkpoint_hist
    kept = sorted([*run.record.kept, [value, epoch]], key=lambda row: (-row[0], row[1]))
    run.record.kept = kept[:count]
    if [value, epoch] in run.record.kept:
        save_adapter(run, f"epochs/{epoch:04d}")
    for _, old in kept[count:]:
        shutil.rmtree(run.output / "epochs" / f"{old:04d}", ignore_errors=True)


def load_best(run: Run) -> None:
    """Give the model the weights of ``best/``.

    Raises:
        TrainingStopped: they are not those that the run wrote.
    """
    digest = run.processes.collect(run.record.best_digest)[0]
    adapter, tensors = read_adapter(run.output / "best")
    if adapter["weights_digest"] != digest:
        raise TrainingStopped(
            f"{run.output / 'best'} is no longer the adapter that this run wrote; something else "
            f"wrote into {run.output}. The run's own last state is in "
            f"{run.output / checkpoints.FILE}."
        )
    run.model.load_adapter_state_dict(tensors)
