"""How images become a backbone's input."""

from __future__ import annotations

from typing import Any


def backbone_pixels(backbone: Any, **overrides: Any) -> dict[str, Any]:
    """How images become the backbone's input: its own preprocessing, but for the overrides.

    Args:
        overrides: mean, std, crop_pct, interpolation; None counts as not given.

    Returns:
        input_size (3, H, W) in pixels, interpolation, mean, std, crop_pct, crop_mode: timm's names.
    """
    from timm.data import resolve_model_data_config

    size = getattr(backbone.patch_embed, "img_size", None)
    # the size it was built with; its pretrained_cfg knows the usual one only
    sized = {"input_size": (3, *size)} if size else {}
    return resolve_model_data_config(backbone, args=sized | overrides)
