"""Which prompt tokens enter which block of a frozen ViT, where, and when they leave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Position = Literal["append", "prepend", "add"]


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of one forward pass. B images, P prompt tokens, S prefix tokens, N patches.

    Before block ``i`` in ``layers`` the prompts in the sequence are replaced by ``layers[i]``; the
    first entry inserts them. Blocks between two entries carry the prompts along. Prompts of block 0
    join the sequence behind the position embedding and before the backbone's ``norm_pre`` (CLIP's
    ``ln_pre``), as in the official PGN code; they never get a position embedding.

    Attributes:
        position: "append" puts the prompts behind the patches (PGN), "prepend" between the prefix
            tokens and the patches (VPT). "add" inserts no token: it adds ``layers[i]`` to the
            tokens that are there (VPT's ablations "add" and "add-1").
        layers: block index -> prompt tokens, (P, D) shared by the batch or (B, P, D). P is the same
            for all blocks. For "add" P is S + N, or 1 to add one vector to every token. Empty where
            the prompts are in the images already (VPT's ablations in pixel space).
        keep: behind the last block in ``layers`` the prompts stay in the sequence; False: they
            leave behind that block. Without meaning for "add".
        patch_weight: weight (D, C, p, p) and bias (D,) or None that stand in for the backbone's own
            patch projection (VPT's ablation "below", whose images have further channels).
    """

    position: Position
    layers: Mapping[int, Tensor]
    keep: bool = True
    patch_weight: tuple[Tensor, Tensor | None] | None = None

    @property
    def first(self) -> int:
        """The lowest block that gets prompts. Below it nothing needs a gradient, unless the images
        do (prompts in pixel space)."""
        return min(self.layers, default=0)

    @property
    def last(self) -> int:
        """The highest block that gets prompts."""
        return max(self.layers, default=-1)

    @property
    def num_prompts(self) -> int:
        """Prompt tokens in the sequence while they are there."""
        if self.position == "add" or not self.layers:
            return 0
        return self.layers[self.first].shape[-2]

    @property
    def num_prompts_left(self) -> int:
        """Prompt tokens in the sequence behind the last block."""
        return self.num_prompts if self.keep else 0
