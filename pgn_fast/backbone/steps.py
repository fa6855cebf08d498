"""What each block does with a schedule's prompts; engine and ``explain`` read the same list."""

from __future__ import annotations

from typing import NamedTuple

from .schedule import KeyValues, PromptSchedule


class BlockStep(NamedTuple):
    """What one block has to do.

    Attributes:
        enters: something of the schedule enters here; prompts in the sequence leave before.
        tokens: prompt tokens enter here, in whatever form.
        keys: keys and values beside those of the tokens.
        kv_only: the outputs of prompts are discarded, of those that enter and of those before.
        rows: output rows of the tokens that are no prompts; None all.
    """

    enters: bool
    tokens: bool
    keys: KeyValues | None
    kv_only: bool
    rows: int | None


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
                tokens=inserts and tokens is not None,
                keys=keys,
                kv_only=leave or (last and not reads_prompts),
                rows=rows if last and not reads_prompts else None,
            )
        )
    return found
