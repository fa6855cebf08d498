"""Pictures of an inversion, for people: the library as patches, canvases, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .layout import CanvasLayout, to_patches
from .prompter import RgbPrompter
from .report import InversionReport

_GREY = 235


def contact_sheet(
    patches: Tensor, patch_size: int, *, columns: int = 16, zoom: int | None = None
) -> Image.Image:
    """Patches side by side with a gap of grey, row by row.

    Args:
        patches: uint8 (K, 3 * p * p).
        patch_size: p, in pixels.
        columns: patches a row.
        zoom: screen pixels a pixel; None: as many as make a patch about 48 wide.
    """
    p, gap = patch_size, 1
    zoom = max(1, round(48 / p)) if zoom is None else zoom
    columns = min(columns, len(patches))
    rows = math.ceil(len(patches) / columns)
    sheet = np.full((rows * (p + gap) + gap, columns * (p + gap) + gap, 3), _GREY, np.uint8)
    pixels = patches.reshape(-1, 3, p, p).permute(0, 2, 3, 1).cpu().numpy()
    for k, patch in enumerate(pixels):
        y, x = gap + k // columns * (p + gap), gap + k % columns * (p + gap)
        sheet[y : y + p, x : x + p] = patch
    return Image.fromarray(np.kron(sheet, np.ones((zoom, zoom, 1), np.uint8)))


def library_patches(prompter: RgbPrompter) -> Tensor:
    """Every library token as the uint8 patch of the first prompt cell, (K, 3 * p * p)."""
    inverted = prompter.inverted
    levels = inverted.place(inverted.patches[:, None])[:, 0]
    return inverted.rounding(levels).cpu()


def save_error_histogram(reports: list[InversionReport], path: Path | IO[bytes]) -> None:
    """Relative token errors of each report, and what rounding was predicted to cost.

    Args:
        reports: of the library, and of canvases.
        path: a PNG file, or an open one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    errors = [np.asarray(report.token_rel_err) for report in reports]
    every = np.concatenate(errors)
    low, high = every.min() * 0.8, every.max() * 1.25
    edges = np.geomspace(low, high, 41) if low > 0 else np.linspace(low, high, 41)
    bins = edges.tolist()
    for report, values, colour in zip(reports, errors, ("#8a8a8a", "#1f6fb4"), strict=False):
        what = {"library": "library tokens", "canvases": "prompts of the images"}[report.source]
        axes.hist(
            values,
            bins,
            color=colour,
            alpha=0.75,
            weights=np.full(len(values), 1 / len(values)),
            label=f"{what} ({len(values)})",
        )
        predicted = float(np.mean(report.predicted_round_err))
        axes.axvline(predicted, color=colour, linestyle="--", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlabel("relative token error of the 8-bit patch (dashed: predicted for rounding)")
    axes.set_ylabel("share")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def save_overview(
    images: Tensor,
    canvases: Tensor,
    layout: CanvasLayout,
    patch_size: int,
    path: Path | IO[bytes],
    captions: list[str] | None = None,
) -> None:
    """One row an image: the image, the canvas that the server is sent, its prompt patches.

    Args:
        images: uint8 (B, 3, H, W).
        canvases: uint8 (B, 3, H', W') without the border that ``ServerSpec.pad`` adds.
        layout, patch_size: of the canvases.
        path: a PNG file, or an open one.
        captions: below each image, e.g. the predicted class.
    """
    from matplotlib.figure import Figure

    prompts = to_patches(canvases, patch_size)[:, list(layout.prompt_cells)]
    count = len(images)
    wide = canvases.shape[3] / canvases.shape[2]
    figure = Figure(figsize=(2.4 + 2.4 * wide + 2.6, 2.5 * count + 0.4), layout="constrained")
    grid = figure.subplots(count, 3, squeeze=False, gridspec_kw={"width_ratios": [1, wide, 1.1]})
    for row, image, canvas, patches in zip(grid, images, canvases, prompts, strict=True):
        columns = math.ceil(math.sqrt(layout.num_prompts))
        sheet = contact_sheet(patches, patch_size, columns=columns)
        pictures = [_picture(image), _picture(canvas), np.asarray(sheet)]
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    titles = (
        "image",
        "canvas: 8-bit pixels, all that is sent",
        f"its {layout.num_prompts} prompts",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    for axes, caption in zip(grid[:, 0], captions or [], strict=False):
        axes.set_xlabel(caption, fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
