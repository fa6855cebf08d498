"""The state of a run in its checkpoint, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import checkpoints
from .state import Position, Record

if TYPE_CHECKING:
    from .run import Run


def save_state(run: Run) -> None:
    """Replace the run's checkpoint; the first process writes what all of them know."""
    # position and generators are each process's own, the rest is the same everywhere
    own = {"position": vars(run.position), "random": checkpoints.random_state(run.device)}
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
    checkpoints.set_random_state(own["random"], run.device)
