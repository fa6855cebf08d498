"""Visual Prompt Tuning: prompts that are parameters, the same for every image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone.schedule import Entry, Position, PromptSchedule
from .base import Prompter


class VisualPrompts(Prompter):
    """Prompt tokens of the blocks that have some.

    Args:
        embed_dim: D, the width of the backbone's tokens.
        patch_size: of the backbone, in pixels (height, width); it scales the initial values.
        num_prompts: P, prompt tokens per block.
        layers: the block indices, from 0, that get prompts.
        shared: one set of prompts for all of them.
        project_dim: the prompts' stored width d, projected to D by one linear layer; None: d = D.
        dropout: on the prompts of each image and block on its own, after the projection.
        position: "prepend", or "add" for prompts that are added to the tokens: P = S + N, or 1.
        keep: after the last of ``layers`` the prompts stay in the sequence.

    Attributes:
        prompts: Parameter (len(layers) or 1, P, d), uniform in +-sqrt(6 / (3 p^2 + d)).
        projection: nn.Linear(d, D), Kaiming normal (fan-out), or None.

    Source: Jia et al., arXiv:2203.12119, section 3.2; the official code's behavior.
    """

    reads_images = False

    def __init__(
        self,
        embed_dim: int,
        patch_size: tuple[int, ...],
        num_prompts: int,
        layers: Sequence[int],
        *,
        shared: bool = False,
        project_dim: int | None = None,
        dropout: float = 0.0,
        position: Position = "prepend",
        keep: bool = True,
    ) -> None:
        super().__init__()
        self.position: Position = position
        self.keep = keep
        self.embed_dim = embed_dim
        self.layers = tuple(layers)
        self.dropout = dropout
        width = embed_dim if project_dim is None else project_dim
        self.prompts = nn.Parameter(torch.empty(1 if shared else len(layers), num_prompts, width))
        nn.init.uniform_(self.prompts, *initial_range(patch_size, width))
        self.projection = None
        if project_dim is not None:
            self.projection = nn.Linear(project_dim, embed_dim)
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")

    def schedule(self, images: Tensor) -> PromptSchedule:
        """The prompts of every block, whatever the images."""
        return PromptSchedule(self.position, self(images.shape[0]), keep=self.keep)

    def prompt(
        self, images: Tensor, backbone: Any, backend: str | None
    ) -> tuple[Tensor, PromptSchedule]:
        """As ``Prompter.prompt``; images stay as they are, uint8 too. Blocks that were pruned from
        the backbone later take their prompts with them."""
        depth = len(backbone.blocks)
        entries = {i: tokens for i, tokens in self(images.shape[0]).items() if i < depth}
        return images, PromptSchedule(self.position, entries, keep=self.keep)

    def check_images(self, images: Tensor, backbone: Any) -> None:
        """Refuse images that the backbone cannot read with these prompts (ValueError)."""
        super().check_images(images, backbone)
        if self.position == "add" and self.prompts.shape[1] > 1:
            check_size(images, backbone, "add")

    def example(self, backbone: Any) -> PromptSchedule:
        """As ``Prompter.example``."""
        prompts = torch.empty(self.prompts.shape[1], self.embed_dim, device="meta")
        if self.training and self.dropout > 0:
            prompts = prompts[None]
        layers = [i for i in self.layers if i < len(backbone.blocks)]
        return PromptSchedule(self.position, dict.fromkeys(layers, prompts), keep=self.keep)

    def forward(self, batch_size: int) -> dict[int, Entry]:
        """The prompts of every block: (P, D) shared by the batch, or (B, P, D) under dropout."""
        prompts = self.prompts if self.projection is None else self.projection(self.prompts)
        sets = prompts.unbind()
        if len(sets) == 1:
            sets = sets * len(self.layers)
        if self.training and self.dropout > 0:
            sets = tuple(F.dropout(p.expand(batch_size, -1, -1), self.dropout) for p in sets)
        return dict(zip(self.layers, sets, strict=True))


def check_size(images: Tensor, backbone: Any, location: str, border: int = 0) -> None:
    """Refuse images of another size than the one that the prompts were made for (ValueError)."""
    own = tuple(size - 2 * border for size in backbone.patch_embed.img_size)
    if images.shape[2:] != own:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]} pixels, but the prompts of "
            f"location={location!r} were made for {own[0]}x{own[1]}"
        )


def initial_range(patch_size: tuple[int, ...], width: int) -> tuple[float, float]:
    """Bounds of the uniform distribution that prompts start from (Jia et al., official code)."""
    bound = math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + width))
    return -bound, bound
