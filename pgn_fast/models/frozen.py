"""What a model makes of images before anything that is trained comes into play."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbone.readout import Readout
from ..backbone.schedule import FrozenTokens


class FrozenBelow:
    """For models whose prompts enter above some blocks: what these make of an image is the same in
    every step, and may be kept."""

    backbone: Any
    prompter: Any
    backend: str | None

    @property
    def frozen_blocks(self) -> int:
        """How many blocks come before the first prompt; 0 also where the prompts depend on the
        image, or change it."""
        if getattr(self.prompter, "reads_images", True):
            return 0
        rotates = getattr(self.backbone, "rope", None) is not None
        if rotates and getattr(self.backbone, "dynamic_img_size", False):
            return 0  # the positions of another image size would be taken for its own
        schedule = self.prompter.example(self.backbone)
        return schedule.first if schedule.patch_weight is None else 0

    def below(self, images: Tensor) -> FrozenTokens:
        """Images (B, C, H, W) to what enters the first block with prompts; the model takes it in
        their place, to the same bits. Without gradients.

        Raises:
            ValueError: prompts enter block 0, or depend on the image.
        """
        first = self.frozen_blocks
        if first == 0:
            raise ValueError(
                "nothing is frozen below these prompts: they enter block 0 or depend on the image; "
                "VPT(layers=...) puts them into the last blocks"
            )
        below, taken = first - 1, dict[int, Tensor]()
        readout = Readout(prompts=False, after=frozenset({below}), stop=below)
        with torch.no_grad():
            pixels, schedule = self._prompted(images, self.backend)  # type: ignore[attr-defined]
            self._encode(pixels, schedule, readout, taken)  # type: ignore[attr-defined]
        return FrozenTokens(taken[below], first)
