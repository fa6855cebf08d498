"""VPT's ablations in pixel space: prompts around, below or in front of the image's own pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.inputs import check_images, normalized
from ..backbone.schedule import PromptSchedule
from .base import Prompter
from .learned import check_size, initial_range

# ImageNet's mean and standard deviation of red, green and blue
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOCATIONS = ("pad", "below", "prepend-pixel", "prepend-pixel-imgnettransform")


class PixelPrompts(Prompter):
    """Learned pixels that enter the images, or go through the patch embedding as tokens.

    C channels, H x W pixels, D the width of tokens.

    "pad": a border of ``num_prompts`` pixels on every side of the image. The backbone's image size
    is that of the padded image.
    "below": ``num_prompts`` further channels. They need a patch projection of C + num_prompts
    channels, a trained copy that lives here; the backbone's own stays as it is.
    "prepend-pixel": a strip of ``num_prompts`` patches that goes through the patch embedding; its
    tokens stand after the prefix tokens and get no position embedding.
    "prepend-pixel-imgnettransform": the same with the strip in [0, 1], normalized like an image.

    Values in [0, 1] are normalized with ImageNet's mean and standard deviation, as in the official
    code, whatever the backbone was trained with: an affine change that training can undo.

    Attributes:
        prompts: Parameter, n being ``num_prompts``: "below" (1, n, H, W), "prepend-pixel" (1, C, p,
            n p).
        prompts_lr, prompts_tb: Parameters of "pad" in place of it: left then right columns
            (1, C, H, 2 n), top then bottom rows (1, C, 2 n, W + 2 n).
        patch_weight, patch_bias: Parameters of "below", (D, C + n, p, p) and (D,) or None.

    Source: Jia et al., arXiv:2203.12119, section 4.3 (ablation on prompt location).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, num_prompts: int, location: str) -> None:
        super().__init__()
        self.location = location
        self.num_prompts = num_prompts
        projection = getattr(backbone.patch_embed, "proj", None)
        if not isinstance(projection, nn.Conv2d) or projection.in_channels != backbone.in_chans:
            raise ValueError(
                f"location={location!r} works on the pixels of the patch projection, which "
                f"{type(backbone.patch_embed).__name__} has not"
            )
        channels, patch_size = projection.in_channels, projection.kernel_size
        height, width = backbone.patch_embed.img_size
        uniform = initial_range(tuple(patch_size), projection.out_channels)
        if location in ("pad", "prepend-pixel-imgnettransform"):
            if channels != 3:
                raise ValueError(
                    f"location={location!r} normalizes with ImageNet's mean and standard deviation "
                    f"of 3 channels; this backbone has {channels}"
                )
            uniform = (0.0, 1.0)
            mean, std = torch.tensor([_MEAN, _STD])
            self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
            self.register_buffer("std", std.view(3, 1, 1), persistent=False)
        if location == "pad":
            height, width, border = (
                height - 2 * num_prompts,
                width - 2 * num_prompts,
                2 * num_prompts,
            )
            if min(height, width) < 1:
                raise ValueError(
                    f"location='pad' with num_prompts={num_prompts} leaves no image inside the "
                    f"backbone's {backbone.patch_embed.img_size} pixels"
                )
            self.prompts_lr = nn.Parameter(torch.empty(1, channels, height, border))
            self.prompts_tb = nn.Parameter(torch.empty(1, channels, border, width + border))
        elif location == "below":
            self.prompts = nn.Parameter(torch.empty(1, num_prompts, height, width))
        else:
            strip = (patch_size[0], patch_size[1] * num_prompts)
            self.prompts = nn.Parameter(torch.empty(1, channels, *strip))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, *uniform)
        if location == "below":
            self._add_patch_projection(projection)

    def _add_patch_projection(self, projection: nn.Conv2d) -> None:
        """The backbone's patch projection, widened by channels that start like any convolution."""
        weight = projection.weight.detach()
        further = weight.new_empty(len(weight), self.num_prompts, *projection.kernel_size)
        nn.init.kaiming_uniform_(further, a=math.sqrt(5))
        self.patch_weight = nn.Parameter(torch.cat([weight, further], dim=1))
        bias = projection.bias
        self.patch_bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def check_images(self, images: Tensor, backbone: Any) -> None:
        """Refuse images that the backbone cannot read with these prompts (ValueError)."""
        border = self.num_prompts if self.location == "pad" else 0
        check_images(backbone, images, border)
        if self.location in ("pad", "below"):
            check_size(images, backbone, self.location, border)

    def prompt(
        self, images: Tensor, backbone: Any, backend: str | None
    ) -> tuple[Tensor, PromptSchedule]:
        """As ``Prompter.prompt``: prompted images, or the tokens of the strip."""
        if self._makes_tokens:
            return images, PromptSchedule("prepend", {0: self.tokens(backbone)})
        images = normalized(backbone, images)
        patch_weight = self.patch_projection(images.dtype)
        return self.images(images), PromptSchedule("add", {}, patch_weight=patch_weight)

    def example(self, backbone: Any) -> PromptSchedule:
        """As ``Prompter.example``."""
        if not self._makes_tokens:
            return PromptSchedule("add", {})
        prompts = torch.empty(self.num_prompts, backbone.embed_dim, device="meta")
        return PromptSchedule("prepend", {0: prompts})

    @property
    def _makes_tokens(self) -> bool:
        return self.location.startswith("prepend-pixel")

    def images(self, images: Tensor) -> Tensor:
        """The images that the backbone gets: padded, or with further channels."""
        if self.location == "below":
            return torch.cat([images, self._batch(self.prompts, images)], dim=1)
        n = self.num_prompts
        sides = self._batch(self._normalized(self.prompts_lr), images)
        ends = self._batch(self._normalized(self.prompts_tb), images)
        images = torch.cat([sides[..., :n], images, sides[..., n:]], dim=3)
        return torch.cat([ends[..., :n, :], images, ends[..., n:, :]], dim=2)

    def patch_projection(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias in place of the backbone's own patch projection; None: that one."""
        if self.location != "below":
            return None
        bias = self.patch_bias
        return self.patch_weight.to(dtype), None if bias is None else bias.to(dtype)

    def tokens(self, backbone: Any) -> Tensor:
        """The strip's tokens (num_prompts, D) after the backbone's patch embedding."""
        strip: Tensor = self.prompts
        if self.location == "prepend-pixel-imgnettransform":
            strip = self._normalized(strip)
        patch_embed = backbone.patch_embed
        patches = patch_embed.proj(
            strip.to(patch_embed.proj.weight.dtype)
        )  # (1, D, 1, num_prompts)
        return patch_embed.norm(patches.flatten(2).mT)[0]

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def _batch(self, pixels: Tensor, images: Tensor) -> Tensor:
        return pixels.to(images.dtype).expand(images.shape[0], -1, -1, -1)
