"""What each block does with a schedule's prompts; engine and ``explain`` read the same list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .schedule import KeyValues, PromptSchedule
from .weights import BlockWeights


class BlockStep(NamedTuple):
    """What one block has to do.

    Attributes:
        enters: something of the schedule enters here; prompts in the sequence leave before.
        tokens: prompt tokens that enter here, in whatever form, or what is added to all tokens.
        keys: keys and values beside those of the tokens.
        kv_only: the outputs of prompts are discarded, of those that enter and of those before.
        rows: output rows of the tokens that are no prompts; None all.
    """

    enters: bool
    tokens: Any  # as in schedule.Parts
    keys: KeyValues | None
    kv_only: bool
    rows: int | None

    @property
    def inserts(self) -> bool:
        """Prompt tokens enter the sequence, or stand beside it."""
        return self.enters and self.tokens is not None


@dataclass(slots=True)
class BlockInput:
    """What one block of one forward pass runs on, beside the tokens x that enter it.

    Attributes:
        index: of the block.
        weights: its own.
        step: who enters, and whose outputs are read.
        num_tokens: S + N, the leading tokens of x that are no prompts.
        rope: rotary embedding of the block; None without.
        prompts: those that enter here, (P, D) or (B, P, D), or None.
        inside: they are the last rows of x already (block 0).
        ready: their keys and values, where they were made before.
    """

    index: int
    weights: BlockWeights
    step: BlockStep
    num_tokens: int
    rope: Tensor | None
    prompts: Tensor | None
    inside: bool
    ready: tuple[Tensor, Tensor] | None


def block_steps(
    schedule: PromptSchedule, depth: int, reads_prompts: bool, rows: int | None = None
) -> list[BlockStep]:
    """One step a block.

    Args:
        reads_prompts: prompts that are left after the last block are read.
        rows: the leading tokens that are read after it; None all.
    """
    inserts, found = schedule.position != "add", []
    for i in range(depth):
        tokens, keys = schedule.parts(i)
        last = i == depth - 1
        leave = i + 1 in schedule.entries or (i == schedule.last and not schedule.keep)
        found.append(
            BlockStep(
                enters=inserts and i in schedule.entries,
                tokens=tokens,
                keys=keys,
                kv_only=leave or (last and not reads_prompts),
                rows=rows if last and not reads_prompts else None,
            )
        )
    return found
