"""A new engine's check of itself: one random image, here and by timm's own blocks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .eager import encode_eager
from .readout import Readout
from .schedule import Entry, PromptSchedule

if TYPE_CHECKING:
    from .engine import FastBackbone

# up to which an engine checks itself when it is built: some tenths of a second at most
_CHEAP_FLOPS_CPU, _CHEAP_FLOPS = 2e10, 1e12
_READOUT = Readout(rows=1)
_EIGHT_BIT_BATCH = 8


def is_cheap(backbone: Any) -> bool:
    """Whether one more image costs less than loading a backbone does."""
    device = next(backbone.parameters()).device
    if device.type == "meta":
        return False
    tokens = backbone.num_prefix_tokens + backbone.patch_embed.num_patches
    flops = 2 * tokens * sum(p.numel() for p in backbone.blocks.parameters())
    return flops < (_CHEAP_FLOPS_CPU if device.type == "cpu" else _CHEAP_FLOPS)


def check(engine: FastBackbone) -> None:
    """Compare with the eager path, by prompts that come, change and stay.

    Backbones with huge activations round a lot, timm's own code too. Rounding shrinks with the
    precision and a mistake does not, so where they differ both run once more in float64.

    Raises:
        RuntimeError: the results disagree; that would be an error of this package, or of a backbone
            whose own code differs from its class's.
    """
    dtype = next(engine.backbone.parameters()).dtype
    error = _difference(engine)
    if not error > max(min(1000 * torch.finfo(dtype).eps, 0.2), 1e-9):
        return  # NaN too: what the backbone itself computes is not at issue
    if dtype != torch.float64:
        exact = copy.deepcopy(engine)
        exact.backbone.double()
        if _difference(exact) <= 1e-6 * error:
            return
    raise RuntimeError(
        f"the fast path of {type(engine.backbone).__name__} differs from timm's own blocks by "
        f"{error:.1e} of the largest value. Use fast=False, and please report the backbone"
    )


def _difference(engine: FastBackbone) -> float:
    """The largest one between the two paths, in units of the largest value."""
    with _random_image(engine.backbone) as (images, schedule):
        expected = encode_eager(engine.backbone, images, schedule, _READOUT).double()
        actual = engine.encode(images, schedule, _READOUT).double()
    engine.cache.forget_prompts()
    return float((actual - expected).abs().max() / expected.abs().max())


def weights_error(engine: FastBackbone) -> float:
    """What weights in 8 bits change in the first token of a random image with prompts: the norm of
    the difference from the engine's own with float weights, in units of the token's norm."""
    plain = engine.in_float()
    with _random_image(engine.backbone) as (images, schedule):
        # products of few tokens are in float
        images = images.expand(_EIGHT_BIT_BATCH, -1, -1, -1)
        expected, actual = (e.encode(images, schedule, _READOUT).double() for e in (plain, engine))
    engine.cache.forget_prompts()
    return float((actual - expected).norm() / expected.norm())


@contextlib.contextmanager
def _random_image(backbone: Any) -> Iterator[tuple[Tensor, PromptSchedule]]:
    """One image and prompts of two blocks, always the same; gradients and autocast are off."""
    random = torch.Generator().manual_seed(0)
    size = backbone.in_chans, *backbone.patch_embed.img_size
    like = next(backbone.parameters())
    images = torch.randn(1, *size, generator=random).to(like)
    entries: dict[int, Entry] = {
        i: torch.randn(2, backbone.embed_dim, generator=random).to(like)
        for i in range(min(2, len(backbone.blocks)))
    }
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield images, PromptSchedule("append", entries)
