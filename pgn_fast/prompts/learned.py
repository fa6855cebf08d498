"""Visual Prompt Tuning: prompts that are parameters, the same for every image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisualPrompts(nn.Module):
    """Prompt tokens of the blocks that have some.

    Args:
        embed_dim: D, the width of the backbone's tokens.
        patch_size: of the backbone, in pixels (height, width); it scales the initial values.
        num_prompts: P, prompt tokens per block.
        layers: the block indices, from 0, that get prompts.
        shared: one set of prompts for all of them.
        project_dim: the prompts' stored width d, projected to D by one linear layer; None: d = D.
        dropout: on the prompts of each image and block on its own, behind the projection.

    Attributes:
        prompts: Parameter (len(layers) or 1, P, d), uniform in +-sqrt(6 / (3 p^2 + d)).
        projection: nn.Linear(d, D), Kaiming normal (fan-out), or None.

    Source: Jia et al., arXiv:2203.12119, section 3.2; the official code's behavior.
    """

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
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.dropout = dropout
        width = embed_dim if project_dim is None else project_dim
        self.prompts = nn.Parameter(torch.empty(1 if shared else len(layers), num_prompts, width))
        nn.init.uniform_(self.prompts, *initial_range(patch_size, width))
        self.projection = None
        if project_dim is not None:
            self.projection = nn.Linear(project_dim, embed_dim)
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")

    def forward(self, batch_size: int) -> dict[int, Tensor]:
        """The prompts of every block: (P, D) shared by the batch, or (B, P, D) under dropout."""
        prompts = self.prompts if self.projection is None else self.projection(self.prompts)
        sets = prompts.unbind()
        if len(sets) == 1:
            sets = sets * len(self.layers)
        if self.training and self.dropout > 0:
            sets = tuple(F.dropout(p.expand(batch_size, -1, -1), self.dropout) for p in sets)
        return dict(zip(self.layers, sets, strict=True))


def initial_range(patch_size: tuple[int, ...], width: int) -> tuple[float, float]:
    """Bounds of the uniform distribution that prompts start from (Jia et al., official code)."""
    bound = math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + width))
    return -bound, bound
