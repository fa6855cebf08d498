"""The classes of timm's vision transformers that this package runs: one row each.

A new family is one file beside this one and its row in ``FAMILIES``; docs/architecture.md has the
recipe. ``of`` finds a backbone's row, ``refused`` says why a class of timm has none.
"""

from __future__ import annotations

from typing import Any

from .base import Family
from .beit import Beit
from .eva import Eva
from .relpos import RelPos
from .vit import Distilled, Vit

# a backbone belongs to the first row whose class it is an instance of: subclasses come first
FAMILIES: tuple[Family, ...] = (Distilled(), Vit(), Eva(), Beit(), RelPos())

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
        "CaiT adds its class token only after the patch blocks, so prompts and class token would "
        "not meet where VPT and PGN need them"
    ),
    "xcit": (
        "XCiT attends between channels and mixes neighboring patches by convolution on the image "
        "grid, so a prompt token is not one more key"
    ),
}


def find(backbone: Any) -> Family | None:
    """The row of a backbone's class; None where it has none."""
    for family in FAMILIES:  # a loop that torch.compile follows
        if isinstance(backbone, family.kind):
            return family
    return None


def of(backbone: Any) -> Family:
    """The row of a backbone's class.

    Raises:
        TypeError: it has none, and did not come from ``load_backbone``.
    """
    family = find(backbone)
    if family is None:
        raise TypeError(
            f"{type(backbone).__name__} is not a vision transformer that prompts can enter: timm's "
            f"classes {names()} are"
        )
    return family


def refused(module: str) -> str | None:
    """Why prompts cannot enter models that a file of ``timm.models`` defines; None: not known.

    Args:
        module: the dotted name of the file.
    """
    return _REFUSED.get(module.rpartition(".")[2])


def names() -> str:
    """timm's classes in ``FAMILIES``, for messages."""
    return ", ".join(family.kind.__name__ for family in FAMILIES)
