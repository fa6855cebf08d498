"""The frozen backbone: a timm vision transformer, by name or ready-made; others are refused."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

DEMO_NAME = "pgn_demo_vit"

_WINDOWS = (
    "attends inside windows and merges patches, so a prompt token has no place in its sequence"
)
# the file in timm.models that defines a model -> why prompts cannot enter it
_REFUSED = {
    "swin_transformer": f"Swin {_WINDOWS}",
    "swin_transformer_v2": f"Swin {_WINDOWS}",
    "swin_transformer_v2_cr": f"Swin {_WINDOWS}",
    "hiera": f"Hiera {_WINDOWS}",
    "hieradet_sam2": f"Hiera {_WINDOWS}",
    "mvitv2": "MViT pools queries and keys over the image grid, where prompt tokens have no place",
    "vision_transformer_sam": (
        "SAM's blocks work on an image grid (B, H, W, D) with windows and relative positions, not "
        "on a token sequence"
    ),
    "cait": (
        "CaiT adds its class token only behind the patch blocks, so prompts and class token would "
        "not meet where VPT and PGN need them"
    ),
    "xcit": (
        "XCiT attends between channels and mixes neighboring patches by convolution on the image "
        "grid, so a prompt token is not one more key"
    ),
    "vision_transformer_relpos": (
        "its relative position bias is computed for the image grid in every block and has no rows "
        "for prompts"
    ),
}


def load_backbone(name_or_module: str | nn.Module, **kwargs: Any) -> Any:
    """Return a vision transformer, frozen and in eval mode.

    Args:
        name_or_module: a timm model name ("vit_base_patch16_224.augreg_in21k"), "pgn_demo_vit" for
            the small backbone inside this package, or a timm model, which is frozen in place.
        **kwargs: for ``timm.create_model``, with a name only; ``pretrained`` is True unless given,
            because a frozen backbone of random weights is of no use.

    Raises:
        TypeError: neither a name nor a module.
        ValueError: no timm model of that name, or not a plain vision transformer.
        RuntimeError: its pretrained weights could not be had.
    """
    if isinstance(name_or_module, str):
        backbone: Any = _create(name_or_module, **kwargs)
    elif kwargs:
        raise ValueError(f"{', '.join(kwargs)}: given with a model that is already there")
    else:
        backbone = name_or_module
    _check_backbone(backbone)
    return backbone.requires_grad_(False).eval()


def _create(name: str, *, pretrained: bool = True, **kwargs: Any) -> Any:
    if name == DEMO_NAME:
        from .. import demo

        if kwargs:
            raise ValueError(f"backbone: {name} has one size, it does not take {', '.join(kwargs)}")
        return demo.backbone() if pretrained else demo.build()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise ValueError(
            f"backbone: timm has no model named {name!r}"
            + (f"; near it: {', '.join(near)}" if near else "; timm.list_models() names them all")
        )
    defined_in = timm.model_entrypoint(name.split(".")[0]).__module__
    _refuse(name, defined_in)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ValueError(f"backbone: {name} does not take {kwargs} ({error})") from error
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"backbone: the pretrained weights of {name!r} could not be loaded ({error}). Without "
            f"a network, pass a model: timm.create_model({name!r}, checkpoint_path=...)"
        ) from error


def _refuse(name: str, defined_in: str) -> None:
    reason = _REFUSED.get(defined_in.rpartition(".")[2])
    if reason is not None:
        raise ValueError(
            f"backbone: {name} is not supported: {reason}. Use a plain vision transformer, such as "
            "vit_*, deit*_*, eva02_* or beit*_*"
        )


def _check_backbone(backbone: nn.Module) -> None:
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            "backbone takes a timm vision transformer or its name, got "
            f"{type(backbone).__name__}; e.g. timm.create_model('vit_base_patch16_224')"
        )
    kind = type(backbone)
    _refuse(kind.__name__, kind.__module__)
    if not isinstance(backbone, VisionTransformer | Eva | Beit):
        raise ValueError(
            f"backbone: {kind.__name__} is not a vision transformer that prompts can enter: timm's "
            "VisionTransformer, Eva and Beit classes are, such as vit_*, deit*_*, eva02_*, beit*_*"
        )
