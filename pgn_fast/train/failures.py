"""What a run that cannot go on says: why, what is kept, and the ways out."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from . import checkpoints
from .config import TrainConfig
from .split import Split


def what_is_kept(output: Path) -> str:
    path = output / checkpoints.FILE
    return f"the last good checkpoint is {path}" if path.exists() else "nothing is saved yet"


def out_of_memory(config: TrainConfig, output: Path, error: Exception) -> str:
    # torch's first sentence says how much was asked for; the rest is advice on its allocator
    reason = str(error).partition(". ")[0].rstrip(".")
    half, steps = config.batch_size // 2, 2 * config.grad_accum_steps
    smaller = (
        f"a smaller batch, such as `batch_size` {half} `grad_accum_steps` {steps} for "
        f"{half * steps} images a step"
        if half
        else "`amp` or a smaller `model`: `batch_size` is 1 already"
    )
    return (
        f"the device's memory is full with `batch_size` {config.batch_size} ({reason}); "
        f"{what_is_kept(output)}. Start a new run with {smaller}, or `resume` once other programs "
        "have left the device."
    )


def not_tested(split: Split, error: UserError, output: Path) -> UserError:
    """The test images cannot be scored, after all the work."""
    return UserError(
        f"{split.origin}: {str(error).removeprefix('data: ')} These are the test images: training "
        f"is at its end, {output / 'best'} is whole, and `resume` goes on with them alone."
    )


def lost_process(error: RuntimeError) -> str | None:
    """What happened where a data loader's worker or another process of the run has died."""
    text = str(error)
    if "DataLoader worker" in text:
        return (
            f"a data-loading process died, killed or out of memory ({text.partition('.')[0]}); "
            "fewer `workers` need less memory"
        )
    # gloo and NCCL report a peer that is gone in these words
    if any(
        words in text for words in ("onnection closed by peer", "onnection reset", "ncclRemote")
    ):
        return f"another process of this run has ended ({' '.join(text.split())[:120]})"
    return None


def from_worker(error: UserError) -> UserError:
    """The same error without the traceback that torch puts before one of a loader's process."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return error
    return UserError(text.rstrip().rpartition("UserError: ")[2])
