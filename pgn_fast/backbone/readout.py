"""Who reads what: which tokens leave a backbone, and the pooling that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import families
from .schedule import PromptSchedule


@dataclass(frozen=True)
class Readout:
    """Which tokens are read. The engine does not compute what is not.

    Attributes:
        rows: the leading tokens that are read after the final norm; None all.
        prompts: prompts that are left after the last block are read.
        after: blocks whose output tokens are wanted too.
        stop: the last block that runs; None: all do.
    """

    rows: int | None = None
    prompts: bool = True
    after: frozenset[int] = frozenset()
    stop: int | None = None

    def reads_prompts(self, schedule: PromptSchedule, num_prefix: int) -> bool:
        """Whether prompts that are left are among the tokens that are read, where the schedule
        puts them after ``num_prefix`` prefix tokens."""
        if not (self.prompts and schedule.keep):
            return False
        # appended prompts come after all other tokens, and ``rows`` never counts that far
        return self.rows is None or (schedule.position == "prepend" and self.rows > num_prefix)

    def prompts_left(self, schedule: PromptSchedule) -> int:
        """How many prompt tokens are among all tokens that are read."""
        return schedule.num_prompts_left if self.prompts else 0


EVERYTHING = Readout()


def rows_read(backbone: Any) -> int | None:
    """How many leading tokens the backbone's own pooling reads: the class token, also the
    distillation token, or None for a pool over the patches."""
    return families.of(backbone).pooled_rows(backbone)


def pool(backbone: Any, tokens: Tensor) -> Tensor:
    """The backbone's own pooling of tokens without prompts: (B, S + N, D) to (B, D).

    The class token, the mean of class and distillation token, an average or attention over the
    patches, and the norm after it, whichever the backbone was made with.
    """
    return backbone.forward_head(tokens, pre_logits=True)


def pool_mean(backbone: Any, tokens: Tensor) -> Tensor:
    """The mean of the given tokens (B, T, D), and the backbone's norm after pooling: (B, D)."""
    return backbone.fc_norm(tokens.mean(dim=1))
