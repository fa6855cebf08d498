"""What a task does in each block of the backbone, and how long its sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..backbone.schedule import Mixture, PromptSchedule


@dataclass(frozen=True)
class Step:
    """What one task does in one block.

    Attributes:
        enters: something enters here, so that prompts in the sequence leave before the block.
        alone: what the block makes of prompts is not used: they enter as keys and values only.
        length: prompt tokens that enter; None: a function says it when it runs.
        keys: keys and values that come without tokens.
    """

    enters: bool
    alone: bool
    length: int | None
    keys: int

    @property
    def beside(self) -> bool:
        """Prompt tokens enter, as keys and values beside the sequence."""
        return self.enters and self.alone and self.length != 0


def steps_of(schedule: PromptSchedule, reads: bool, depth: int) -> tuple[Step, ...]:
    """What happens in each of ``depth`` blocks; ``reads``: the head reads prompts that are left."""
    found = []
    for i in range(depth):
        tokens, keys = schedule.parts(i)
        length: int | None = 0
        if isinstance(tokens, Mixture):
            length = tokens.logits.shape[1]
        elif isinstance(tokens, Tensor):
            length = tokens.shape[-2]
        elif tokens is not None:
            length = None
        leaves = i + 1 in schedule.entries or (i == schedule.last and not schedule.keep)
        found.append(
            Step(
                enters=i in schedule.entries,
                alone=leaves or (i == depth - 1 and not reads),
                length=length,
                keys=0 if keys is None else keys.k.shape[-2],
            )
        )
    return tuple(found)


def sequence_of(steps: Sequence[Step]) -> tuple[tuple[bool, int | None], ...]:
    """For each block whether prompts join the sequence, and how many prompt tokens it holds then
    (None: a function says it). Tasks that agree in all of it share their tensors."""
    found, length = [], 0
    for step in steps:
        joins = step.enters and not step.alone and step.length != 0
        if step.enters:
            length = step.length if joins else 0  # type: ignore[assignment]
        found.append((joins, length))
    return tuple(found)
