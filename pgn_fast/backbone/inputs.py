"""What a frozen ViT takes as images; everything else gets one readable sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.prompted_patch_embed import pixel_factors
from ..reference import normalize

if TYPE_CHECKING:  # prompts import this file, and have to do without timm
    from timm.models.vision_transformer import VisionTransformer


def check_images(backbone: VisionTransformer, images: Tensor, border: int = 0) -> None:
    """Refuse images that the backbone cannot read.

    Args:
        backbone: a timm vision transformer.
        images: should be normalized floating-point images (B, C, H, W), or uint8 ones where the
            backbone knows its mean and standard deviation.
        border: pixels that will be added on every side before the backbone sees the images.

    Raises:
        ValueError: shape, channels, size, dtype or device do not fit.
    """
    if not isinstance(images, Tensor) or images.layout != torch.strided:
        kind = images.layout if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a dense tensor (B, C, H, W), got {kind}")
    weight = next(backbone.patch_embed.parameters())
    if images.ndim != 4:
        raise ValueError(
            f"images must be (B, C, H, W), got {tuple(images.shape)}"
            + ("; add a batch dimension: images[None]" if images.ndim == 3 else "")
        )
    if images.dtype == torch.uint8:
        mean_and_std(backbone)
    elif not images.is_floating_point():
        raise ValueError(
            f"images must be normalized and floating-point, or uint8, got {images.dtype}; "
            "images.to(torch.uint8) holds pixels from 0 to 255"
        )
    if images.device != weight.device:
        raise ValueError(
            f"images are on {images.device}, the backbone is on {weight.device}; move one of them"
        )
    float_images = images.is_floating_point()
    if (
        float_images
        and images.dtype != weight.dtype
        and not torch.is_autocast_enabled(images.device.type)
    ):
        raise ValueError(
            f"images are {images.dtype}, the backbone is {weight.dtype}; cast one, e.g. "
            f"images.to({weight.dtype}), or run under torch.autocast"
        )
    if images.shape[1] != backbone.in_chans:
        raise ValueError(
            f"images have {images.shape[1]} channels, the backbone takes {backbone.in_chans}; "
            f"convert the images, or create the backbone with in_chans={images.shape[1]}"
        )
    _check_size(backbone, images.shape[2], images.shape[3], border)


def mean_and_std(backbone: VisionTransformer) -> tuple[list[float], list[float]]:
    """Of each channel, in units of [0, 1], as the backbone was pretrained.

    Raises:
        ValueError: the backbone does not know them.
    """
    known = getattr(backbone, "pretrained_cfg", None) or {}
    mean, std = (list(known.get(name) or ()) for name in ("mean", "std"))
    if len(mean) != backbone.in_chans or len(std) != backbone.in_chans:
        raise ValueError(
            f"images are uint8, and this backbone of {backbone.in_chans} channels does not say by "
            f"which mean and standard deviation to normalize them (its pretrained_cfg has "
            f"mean={mean or None}, std={std or None}); pass normalized floating-point images"
        )
    return mean, std


def normalized(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """uint8 images as the backbone's floating-point ones: (pixel / 255 - mean) / std. Others as
    they are."""
    if images.is_floating_point():
        return images
    factors = pixel_factors(images, *mean_and_std(backbone))
    return normalize(images, next(backbone.patch_embed.parameters()).dtype, *factors)


def _check_size(backbone: VisionTransformer, height: int, width: int, border: int) -> None:
    patch_embed = backbone.patch_embed
    patch_height, patch_width = patch_embed.patch_size
    padded = (height + 2 * border, width + 2 * border)
    if backbone.dynamic_img_size if hasattr(backbone, "dynamic_img_size") else False:
        fits = getattr(patch_embed, "dynamic_img_pad", False) or (
            padded[0] % patch_height == 0 and padded[1] % patch_width == 0
        )
        if not fits or min(padded) < 1:
            raise ValueError(
                f"images of {height}x{width} pixels are not whole patches of "
                f"{patch_height}x{patch_width}; resize them, or create the backbone with "
                "dynamic_img_pad=True"
            )
    elif padded != tuple(patch_embed.img_size):
        own = tuple(size - 2 * border for size in patch_embed.img_size)
        raise ValueError(
            f"images are {height}x{width} pixels, this backbone takes {own[0]}x{own[1]}; resize "
            f"them, or create the backbone with img_size={padded} or dynamic_img_size=True"
        )
