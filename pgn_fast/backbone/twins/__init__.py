"""Exact twins: timm's classes around the tensors of transformers', open_clip's and torchvision's.

A twin computes the original's tokens, shares its weights, and is what the engine runs. Nothing here
imports one of the libraries before a model of it is given.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .assembly import Origin, TwinRefused, assemble

__all__ = ["Origin", "TwinRefused", "copied_note", "library_of", "make_twin"]

# the package that defines a model's class -> the module in here that reads it
_READERS = {"transformers": "transformers", "open_clip": "open_clip", "torchvision": "torchvision"}


def library_of(module: nn.Module) -> str | None:
    """ "transformers", "open_clip" or "torchvision" where a model's class is one of theirs."""
    package = type(module).__module__.partition(".")[0]
    return package if package in _READERS else None


def make_twin(
    original: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    processor: Any = None,
) -> Any:
    """timm's class that computes what ``original`` does; it shares the original's weights.

    The vision tower of the original is frozen and in eval mode afterwards, as the twin is. The twin
    is compared with the original on one random image before it is returned.

    Args:
        original: a model for which ``library_of`` names a library.
        img_size: of the images in pixels, (H, W) or a number for squares, where it is not the
            original's own; its position embedding is resized by its own code.
        processor: the original's image processor or transforms, or its settings as a dictionary;
            None: what is on the disk beside the weights that the original was loaded from.

    Raises:
        TwinRefused: (a ValueError) a class or a setting that no twin follows.
    """
    library = library_of(original)
    assert library is not None
    reader = importlib.import_module(f"{__name__}.{_READERS[library]}")
    inner: Any = reader.unwrap(original)
    if inner is not None:
        pixels = reader.preprocessing(original, processor)
        about = {**(getattr(inner, "pretrained_cfg", None) or {}), **pixels}
        inner.pretrained_cfg = inner.default_cfg = about
        inner.origin = Origin(library, type(original).__name__, reader.hub_name(original))
        return inner.requires_grad_(False).eval()
    tower = reader.vision_tower(original)
    _check_tensors(tower)
    tower.requires_grad_(False).eval()
    pixels = reader.preprocessing(original, processor)
    parts = reader.parts_of(original, _size(reader, original, img_size, pixels))
    twin: Any = assemble(parts)
    twin.origin = Origin(
        library, type(original).__name__, reader.hub_name(original), dict(parts.copied)
    )
    twin.pretrained_cfg = twin.default_cfg = _about(twin, pixels)
    _compare(reader, original, twin)
    return twin


def copied_note(backbone: Any) -> str | None:
    """One line on a twin: whose weights it shares, and the bytes that it had to copy."""
    origin: Origin | None = getattr(backbone, "origin", None)
    if origin is None or origin.library == "timm":
        return None
    text = f"twin of {origin.library}'s {origin.kind}, on the same weights"
    if not origin.copied:
        return f"{text}: nothing is copied"
    copied = ", ".join(f"{name} {size:,d} bytes" for name, size in origin.copied.items())
    return f"{text}, but for copies: {copied}"


def _size(
    reader: Any, original: nn.Module, wanted: int | tuple[int, int] | None, pixels: dict[str, Any]
) -> tuple[int, int] | None:
    """Of the images: as asked for, else as the processor makes them, else as configured (None)."""
    if wanted is not None:
        size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
        return size  # type: ignore[return-value]
    processed = pixels.get("input_size")
    if processed is None or reader.takes_any_size(original):
        return None if processed is None else tuple(processed[1:])
    own = reader.configured_size(original)
    if tuple(processed[1:]) != own:
        raise TwinRefused(
            f"the image processor makes images of {processed[1]}x{processed[2]} pixels, the model "
            f"takes {own[0]}x{own[1]}; pass img_size= with the one that you want, or another "
            "processor="
        )
    return own


def _check_tensors(tower: nn.Module) -> None:
    tensors = list(tower.parameters())
    for what in ("device", "dtype"):
        found = sorted({str(getattr(t, what)) for t in tensors})
        if len(found) > 1:
            raise TwinRefused(
                f"its weights have several {what}s, {', '.join(found)}; move or cast it as a whole"
            )
    if any(t.is_meta for t in tensors):
        raise TwinRefused("its weights are on the meta device, without values; load them first")


def _about(twin: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    """timm's facts about the weights, as far as the original tells them."""
    size = (twin.in_chans, *twin.patch_embed.img_size)
    return {
        "architecture": type(twin).__name__,
        "num_classes": twin.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
        **pixels,
        "input_size": size,
    }


def _compare(reader: Any, original: nn.Module, twin: Any) -> None:
    """One random image through both.

    Raises:
        TwinRefused: they differ by more than rounding: a setting that no reader looks at.
    """
    like = next(twin.parameters())
    size = (1, twin.in_chans, *twin.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    images = images.to(like.device, like.dtype)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            expected = reader.tokens_of(original, images).double()
        except (AttributeError, RuntimeError, TypeError, ValueError) as failure:
            raise TwinRefused(f"the original's own code fails on an image: {failure}") from failure
        actual = twin.forward_features(images).double()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= min(1000 * torch.finfo(like.dtype).eps, 0.2):
        raise TwinRefused(
            f"the twin of {type(original).__name__} differs from it by {error:.1e} of the largest "
            "token value: it has a setting that the twin does not follow; please report the model"
        )
