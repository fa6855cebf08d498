"""What makes prompts: the base class of every prompter, this package's own and yours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.inputs import check_images, normalized
from ..backbone.schedule import PromptSchedule


class Prompter(nn.Module):
    """A module that says which prompts enter which block of a frozen backbone.

    A method of your own is a subclass with a ``schedule`` and a constructor that takes the backbone
    first and everything else by keyword::

        @pgn_fast.register_method("my-vpt")
        class MyPrompter(pgn_fast.Prompter):
            def __init__(self, backbone, *, num_prompts=50):
                super().__init__()
                prompts = torch.randn(len(backbone.blocks), num_prompts, backbone.embed_dim)
                self.prompts = torch.nn.Parameter(0.02 * prompts)

            def schedule(self, images):
                return pgn_fast.PromptSchedule("prepend", dict(enumerate(self.prompts)))

        model = pgn_fast.create_model("my-vpt", backbone, num_classes=10, num_prompts=8)

    Its parameters and buffers are what is trained and saved, beside the head; they are float32 on a
    half-precision backbone. Do not keep the backbone as an attribute: it would become a part of the
    prompter.

    Attributes:
        reads_images: whether ``schedule`` looks at the pixels, or needs no more than their number;
            False lets training keep what the backbone makes of an image below the first prompts.
    """

    reads_images = True

    def schedule(self, images: Tensor) -> PromptSchedule:
        """Which prompts enter where, for these images.

        Args:
            images: (B, C, H, W), normalized, in the backbone's dtype and on its device.
        """
        raise NotImplementedError(f"{type(self).__name__} has no schedule(images)")

    def check_images(self, images: Tensor, backbone: Any) -> None:
        """Refuse images that the backbone cannot read with these prompts (ValueError)."""
        check_images(backbone, images)

    def prompt(
        self, images: Tensor, backbone: Any, backend: str | None
    ) -> tuple[Tensor, PromptSchedule]:
        """The images that the backbone gets, and the schedule. Override it to change the images.

        Args:
            images: (B, C, H, W), normalized, or uint8.
            backbone: the frozen backbone.
            backend: for ops of this package.
        """
        return images, self.schedule(normalized(backbone, images))

    def example(self, backbone: Any) -> PromptSchedule:
        """A schedule of which only kinds and shapes count, for ``explain``; here that of one black
        image, in eval mode."""
        like = next(backbone.parameters())
        size = backbone.in_chans, *(backbone.patch_embed.img_size or (224, 224))
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self.schedule(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
        finally:
            self.train(was_training)
