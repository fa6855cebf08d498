"""Rounding for JPEG (experimental): to the coefficients that the file stores, not to pixels.

A JPEG keeps k = round(DCT(YCbCr(pixels)) / table). Feedback rounding in the basis of those k gives
a patch that the encoder finds already quantized, and leaves alone. Where the colors are
subsampled, only luminance is used: a gray patch has the same file at 4:4:4 and at 4:2:0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference import feedback_integers
from .rounding import FeedbackRounding

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance)
_LUMINANCE = """
    16 11 10 16  24  40  51  61   12 12 14 19  26  58  60  55
    14 13 16 24  40  57  69  56   14 17 22 29  51  87  80  62
    18 22 37 56  68 109 103  77   24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99"""
_CHROMINANCE = (
    """
    17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99
    24 26 56 99 99 99 99 99   47 66 99 99 99 99 99 99"""
    + 32 * " 99"
)
# JFIF: Y, Cb - 128 and Cr - 128 of red, green and blue
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
MARGIN = 24.0  # levels: a coefficient moves a whole block


def quantization_tables(quality: int) -> Tensor:
    """libjpeg's tables for a quality from 1 to 100: luminance and twice chrominance, (3, 8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = [np.array(text.split(), int).reshape(8, 8) for text in (_LUMINANCE, _CHROMINANCE)]
    tables = [np.clip((table * scale + 50) // 100, 1, 255) for table in (base[0], base[1], base[1])]
    return torch.from_numpy(np.stack(tables)).double()


def _to_rgb() -> Tensor:
    """Red, green and blue of Y, Cb and Cr, (3, 3)."""
    return torch.linalg.inv(torch.tensor(_YCBCR, dtype=torch.float64))


def coefficient_basis(patch_size: int, quality: int, *, gray: bool = False) -> Tensor:
    """Levels of a patch that each coefficient contributes, (n, n): levels = 128 + basis @ k.

    With ``gray`` the luminance coefficients alone, (n, n / 3).
    """
    p, blocks = patch_size, patch_size // 8
    x, f = torch.arange(8).double(), torch.arange(8).double()[:, None]
    cosines = torch.cos(torch.pi * (2 * x + 1) * f / 16) / 2  # orthonormal, but for f = 0
    cosines[0] /= 2**0.5
    atoms = torch.einsum(
        "ckl,ky,lx,rc->cklryx", quantization_tables(quality), cosines, cosines, _to_rgb()
    )
    if gray:
        atoms = atoms[:1]
    basis = torch.zeros(len(atoms), blocks, blocks, 8, 8, 3, p, p, dtype=torch.float64)
    for i in range(blocks):
        for j in range(blocks):
            basis[:, i, j, :, :, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = atoms
    return basis.reshape(-1, 3 * p * p).T.contiguous()


@dataclass(frozen=True)
class JpegRounding(FeedbackRounding):
    """Feedback rounding of JPEG coefficients; patches on the 8-pixel grid.

    ``feedback`` and ``order`` are those of the coefficients. float64 in eager PyTorch: about a
    second for n = 3072, whatever the number of prompts.

    Attributes:
        gray: round luminance only, and give all three channels its value: for 4:2:2 and 4:2:0.
    """

    patch_size: int = 0
    quality: int = 95
    gray: bool = False

    @classmethod
    def from_patch_map(
        cls, A: Tensor, patch_size: int, quality: int, *, gray: bool = False
    ) -> JpegRounding:
        """For a token map A (D, n) of levels; see ``FeedbackRounding.from_map``."""
        basis = coefficient_basis(patch_size, quality, gray=gray)
        plain = FeedbackRounding.from_map(A.double() @ basis)
        # a decoder rounds Y, Cb and Cr to whole levels, and what it makes of them to RGB; of a gray
        # patch only Y, which is the level of all channels
        rgb = A.double().reshape(len(A), 3, -1)
        ycbcr = torch.einsum("dcp,ck->kdp", rgb, _to_rgb())
        noise = ycbcr[0].square().sum() if gray else ycbcr.square().sum() + rgb.square().sum()
        levels = math.sqrt(noise.item() / 12)
        return cls(
            plain.feedback,
            plain.order,
            math.hypot(plain.token_error, levels),
            math.hypot(plain.nearest_token_error, levels),
            plain.swing,
            patch_size=patch_size,
            quality=quality,
            gray=gray,
        )

    @cached_property
    def basis(self) -> Tensor:
        return coefficient_basis(self.patch_size, self.quality, gray=self.gray)

    @cached_property
    def to_coefficients(self) -> Tensor:
        """The inverse of ``basis``, for gray patches its pseudo-inverse: the channels' mean."""
        if self.gray:  # orthogonal columns
            return self.basis.T / self.basis.square().sum(dim=0)[:, None]
        return torch.linalg.inv(self.basis)

    @property
    def margin(self) -> float:
        return MARGIN

    def settings(self) -> dict[str, Any]:
        own = {"patch_size": self.patch_size, "quality": self.quality, "gray": self.gray}
        return {**super().settings(), **own}

    def __call__(self, levels: Tensor, *, backend: str | None = None) -> Tensor:
        """Levels (..., n) -> uint8 pixels of the same shape, as a decoder will show them."""
        rows = levels.reshape(-1, levels.shape[-1]).double().cpu()
        coefficients = (rows - 128) @ self.to_coefficients.T
        # no bound: the gamut is kept by the margin, and clipped below where it is not
        stored = feedback_integers(
            coefficients, self.feedback.double(), self.order, -torch.inf, torch.inf
        )
        pixels = (128 + stored @ self.basis.T).round().clamp(0, 255).to(torch.uint8)
        return pixels.reshape(levels.shape).to(levels.device)
