"""How far a run is, what it has found, and which choices a resumed run may change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import checkpoints
from .config import GIVEN, TrainConfig
from .kinds import typed

# choices that do not change what is computed; a resumed run may differ in them
FREE = {
    "cache",
    "data_dir",
    "dataset_download",
    "workers",
    "log_interval",
    "recovery_interval",
    "stats",
    "tracker",
    "wandb_project",
    "wandb_tags",
    "wandb_resume_id",
}


@dataclass
class Position:
    """How far a run is, and the running sums of the epoch it is in, of this process's images."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """What a run has found so far.

    Attributes:
        history: one row an epoch, see ``reports.COLUMNS``.
        best_epoch, best_score: from 1; what it was chosen by.
        best_digest: of the tensors in ``best/``, so that another's adapter is not taken for it.
        kept: [score, epoch] of the epochs whose adapters are kept, best first.
        images: how many the figures of the last epoch are of, by split.
        unreadable: "name: reason" of images that were left out.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = float("-inf")
    best_digest: str = ""
    images: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)

    @property
    def best_loss(self) -> float:
        """The validation loss of the best epoch; infinite where none was validated."""
        return self.history[self.best_epoch - 1]["validation_loss"] if self.best_epoch else math.inf


def resume_config(
    output: Path, given: dict[str, Any], recipe: dict[str, Any] | None = None
) -> TrainConfig | None:
    """The configuration of the run in ``output``; None where it has no checkpoint yet.

    Args:
        given: fields that the user names again. Those that do not change the result may differ,
            and ``epochs`` may be more: the run goes on to the end of the longer one.
        recipe: fields of a recipe that is named again; they are held against the run's.

    Raises:
        UserError: a field that would change the result differs, or the checkpoint is damaged.
    """
    state = checkpoints.load(output)
    if state is None:
        return None
    saved = state["config"]
    plain = lambda values: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    wanted = plain(typed(TrainConfig, given))
    if saved["data"] == GIVEN != wanted.get("data"):
        raise UserError(
            f"`resume`: the run in {output} was started by pgn_fast.fit, by a script that has its "
            "model and data: call that again with resume=True."
        )
    longer = {"epochs"} if wanted.get("epochs", 0) > saved["epochs"] else set()
    for name, value in (plain(recipe or {}) | wanted).items():
        if name in FREE or (name in longer and name in wanted) or saved.get(name) == value:
            continue
        hint = "give more to go on" if name == "epochs" else "leave it out to continue the run"
        raise UserError(
            f"`resume`: the run in {output} has `{name}` = {saved.get(name)!r}, now {value!r} is "
            f"asked for: {hint}, or start a new one with `output`."
        )
    return TrainConfig.make(**saved | wanted)
