"""A token library as 8-bit patches: mixed in pixels, rounded, laid out; needs no backbone.

Softmax mixing commutes with the inversion, because the coefficients are non-negative and sum to
one: a convex combination of patches stays in the gamut, and its token is the same combination of
the tokens, constants included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InversionError, LayoutError, SaturationWarning
from .layout import CanvasLayout
from .patch_map import PatchMap
from .rounding import FeedbackRounding
from .server_spec import ServerSpec
from .stored import load_stored, save_stored


class InvertedLibrary(nn.Module):
    """A token library as patches: mixes in pixels, rounds to 8 bits. Needs no backbone.

        levels[b, j] = baseline[j] + s * sum_k coefficients[b, j, k] * patches[k]

    with s = 1, or (``scale="auto"``) the largest s that keeps the patch in the gamut.

    Attributes:
        patches: (K, n) float32, offsets from the baseline, in levels.
        baseline: (1, n) mid gray, or (P, n) where each prompt's cell has its position cancelled.
        reach_err: (K,) relative token error of each library token before rounding.
        rounding: how levels become uint8.
        prompt_pos: "canvas": the prompts were trained with their cell's position embedding;
            "none": without any, and it is cancelled.
        scale: "fixed" or "auto".
        margin: levels kept free at both ends for the rounding's feedback.
        layout, server: what the library is for.
        image_size: height and width of the images that the model takes, in pixels.
        patch_size: p, in pixels.
        key: hash of the backbone's input side, see ``PatchMap.key``.
    """

    patches: Tensor
    baseline: Tensor
    reach_err: Tensor

    def __init__(
        self,
        patches: Tensor,
        baseline: Tensor,
        reach_err: Tensor,
        *,
        rounding: FeedbackRounding,
        prompt_pos: str,
        scale: str,
        margin: float,
        layout: CanvasLayout,
        server: ServerSpec,
        image_size: tuple[int, int],
        patch_size: int,
        key: str,
    ) -> None:
        super().__init__()
        self.register_buffer("patches", patches.float().contiguous())
        self.register_buffer("baseline", baseline.float().contiguous())
        self.register_buffer("reach_err", reach_err.float())
        self.rounding = rounding
        self.prompt_pos = prompt_pos
        self.scale = scale
        self.margin = margin
        self.layout = layout
        self.server = server
        self.image_size = tuple(image_size)
        self.patch_size = patch_size
        self.key = key

    def mix(self, coefficients: Tensor) -> Tensor:
        """Mixture coefficients (..., P, K) to the levels of the patches, (..., P, n), float.

        Raises:
            InversionError: the coefficients do not sum to one and the scale is fixed.
        """
        if self.scale == "fixed":
            off = (coefficients.sum(dim=-1) - 1).abs().max().item() if coefficients.numel() else 0
            if off > 1e-2 or (coefficients < -1e-4).any():
                raise InversionError(
                    f"the coefficients do not sum to 1 (off by {off:.2g}) or are negative; pixel "
                    'mixing is only gamut-safe for softmax. Use softmax, or scale="auto" on a '
                    "backbone with a norm before block 1."
                )
        return self.place(coefficients.to(self.patches.dtype) @ self.patches)

    def place(self, offsets: Tensor) -> Tensor:
        """Mixed offsets (..., P, n) to levels: on the baseline, exposed where scale is free."""
        if self.scale == "fixed":
            return self.baseline + offsets
        return self.baseline + self.exposure(offsets) * offsets

    def exposure(self, offsets: Tensor) -> Tensor:
        """The factor s (..., P, 1) by which mixed offsets are brightened or dimmed."""
        if self.scale == "fixed":
            return torch.ones_like(offsets[..., :1])
        return largest_scale(self.baseline, offsets, self.margin)

    def to_uint8(self, levels: Tensor, rounding: str = "feedback") -> Tensor:
        """Levels (..., n) to uint8, with error feedback or each pixel to its nearest level."""
        if rounding == "nearest":
            return levels.round().clamp(0, 255).to(torch.uint8)
        if rounding != "feedback":
            raise ValueError(f"rounding={rounding!r}; known: feedback, nearest")
        rounded = self.rounding(levels)
        ends = saturated_fraction(rounded)
        if ends > 0.01:
            warnings.warn(
                f"{ends:.0%} of the prompts' pixels lie at 0 or 255, where feedback clips; raise "
                f"margin (now {self.margin:g}).",
                SaturationWarning,
                stacklevel=2,
            )
        return rounded

    def check(self, patch_map: PatchMap) -> None:
        """Raise where this library was not made for that backbone, server and layout."""
        if self.layout != patch_map.layout:
            raise LayoutError(
                f"the library was inverted for {self.layout.describe()} "
                f"(prompt_pos={self.prompt_pos}) but is deployed on {patch_map.layout.describe()}. "
                "Invert it again for that layout."
            )
        if self.key != patch_map.key:
            raise InversionError(
                "the patch embedding, the position embedding, the normalization or the server's "
                "settings changed since this library was inverted; call invert_library again."
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything that mixing and rounding need into one safetensors file."""
        settings = {
            "prompt_pos": self.prompt_pos,
            "scale": self.scale,
            "margin": self.margin,
            "layout": self.layout.to_dict(),
            "server": self.server.to_dict(),
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "key": self.key,
        }
        tensors = {name: getattr(self, name) for name in ("patches", "baseline", "reach_err")}
        save_stored(Path(path), tensors, self.rounding, settings)

    @classmethod
    def load(cls, path: str | PathLike[str], patch_map: PatchMap | None = None) -> InvertedLibrary:
        """Read what ``save`` wrote; with ``patch_map``, check that it still fits the backbone.

        Raises:
            InversionError, LayoutError: it does not.
        """
        tensors, rounding, settings = load_stored(Path(path))
        settings |= tensors
        settings["layout"] = CanvasLayout.from_dict(settings["layout"])
        settings["server"] = ServerSpec(**settings["server"])
        library = cls(rounding=rounding, **settings)
        if patch_map is not None:
            library.check(patch_map)
        return library


def largest_scale(baseline: Tensor, offsets: Tensor, margin: float) -> Tensor:
    """The largest s, (..., 1), with margin <= baseline + s * offsets <= 255 - margin."""
    tiny = 1e-9
    up = (255 - margin - baseline) / offsets.clamp_min(tiny)
    down = (baseline - margin) / (-offsets).clamp_min(tiny)
    return up.minimum(down).amin(dim=-1, keepdim=True)


def saturated_fraction(rounded: Tensor) -> float:
    """Share of uint8 pixels at 0 or 255."""
    ends: Callable[[Tensor], Tensor] = lambda x: (x == 0) | (x == 255)
    return ends(rounded).double().mean().item() if rounded.numel() else 0.0
