"""Pictures of an inversion, for people: the library as patches, canvases, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .layout import MID_LEVEL, CanvasLayout, to_patches
from .prompter import RgbPrompter
from .report import InversionReport

_GRAY = 235


def contact_sheet(
    patches: Tensor, patch_size: int, *, columns: int = 16, zoom: int | None = None
) -> Image.Image:
    """Patches side by side with a gap of gray, row by row.

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
    sheet = np.full((rows * (p + gap) + gap, columns * (p + gap) + gap, 3), _GRAY, np.uint8)
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


def save_library(prompter: RgbPrompter, path: Path | IO[bytes]) -> None:
    """Every library token as a patch, as it is sent, and again with its contrast stretched.

    Args:
        prompter: whose library.
        path: a PNG file, or an open one.
    """
    from matplotlib.figure import Figure

    patches, p = library_patches(prompter), prompter.inverted.patch_size
    count = len(patches)
    columns = min(16, count)
    offsets = patches.float() - MID_LEVEL
    peak = offsets.abs().amax(dim=1, keepdim=True).clamp_min(1)
    stretched = (MID_LEVEL + offsets * (MID_LEVEL / peak)).round().to(torch.uint8)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(11.6, 0.6 + 5.5 * rows / columns), layout="constrained")
    titles = ("as sent: gray adds nothing", "the same, each stretched to full contrast")
    for axes, shown, title in zip(figure.subplots(1, 2), (patches, stretched), titles, strict=True):
        sheet = np.asarray(contact_sheet(shown, p, columns=columns))
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        # the middle of each row, labeled with the number of its first token
        axes.set_yticks([(row + 0.5) * sheet.shape[0] / rows for row in range(rows)])
        axes.set_yticklabels([str(row * columns) for row in range(rows)], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("number of the row's first token", fontsize=8)
    figure.suptitle(
        f"{count} tokens as 8-bit patches of {p} x {p} pixels; every prompt is a mixture of them",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, format="png")


def save_error_histogram(reports: list[InversionReport], path: Path | IO[bytes]) -> None:
    """Relative token errors of each report, and what rounding was predicted to cost.

    Args:
        reports: of the library, and of canvases.
        path: a PNG file, or an open one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    errors = [np.asarray(report.token_rel_err) for report in reports]
    every = np.concatenate(errors)
    low, high = every.min() * 0.8, every.max() * 1.25
    edges = np.geomspace(low, high, 41) if low > 0 else np.linspace(low, high, 41)
    bins = edges.tolist()
    for report, values, color in zip(reports, errors, ("#8a8a8a", "#1f6fb4"), strict=False):
        what = {"library": "library tokens", "canvases": "prompts of the images"}[report.source]
        axes.hist(
            values,
            bins,
            color=color,
            alpha=0.75,
            weights=np.full(len(values), 1 / len(values)),
            label=f"{what} ({len(values)})",
        )
        predicted = float(np.mean(report.predicted_round_err))
        axes.axvline(predicted, color=color, linestyle="--", linewidth=1.2)
    axes.set_xscale("log")
    ticks = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
    axes.xaxis.set_major_formatter(ticks)
    axes.xaxis.set_minor_formatter(ticks if high < 20 * low else NullFormatter())
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(
        "token error of the 8-bit patch, relative to the token's norm (dashed: predicted mean)",
        fontsize=9,
    )
    axes.set_ylabel("share of the tokens")
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
    canvas_captions: list[str] | None = None,
) -> None:
    """One row an image: the image, the canvas with its prompts numbered, and those patches.

    Args:
        images: uint8 (B, 3, H, W).
        canvases: uint8 (B, 3, H', W') without the border that ``ServerSpec.pad`` adds.
        layout, patch_size: of the canvases.
        path: a PNG file, or an open one.
        captions, canvas_captions: below each image and canvas, e.g. the predicted classes.
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
        _number_prompts(row[1], row[2], layout, patch_size, columns, sheet.width)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    titles = (
        f"image, {images.shape[2]} x {images.shape[3]}",
        f"8-bit canvas, {canvases.shape[2]} x {canvases.shape[3]}",
        f"its {layout.num_prompts} prompts, by number",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    for column, texts in enumerate((captions, canvas_captions)):
        for axes, caption in zip(grid[:, column], texts or [], strict=False):
            axes.set_xlabel(caption, fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def _number_prompts(
    canvas: Any, sheet: Any, layout: CanvasLayout, patch_size: int, columns: int, width: int
) -> None:
    """Frame the prompts of a canvas, and number them there and in the sheet of their patches."""
    from matplotlib.patches import Rectangle

    step = width / columns
    style: dict[str, Any] = {"fontsize": 7, "color": "white", "ha": "left", "va": "top"}
    style["bbox"] = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
    for i, cell in enumerate(layout.prompt_cells):
        # pixel centers are whole numbers, so a cell begins half a pixel before its first
        y, x = (patch_size * c - 0.5 for c in divmod(cell, layout.grid[1]))
        frame = Rectangle((x, y), patch_size, patch_size, fill=False, color="white", linewidth=0.8)
        canvas.add_patch(frame)
        if layout.num_prompts <= 64:
            canvas.text(x + 0.05 * patch_size, y + 0.05 * patch_size, str(i), **style)
            row, column = divmod(i, columns)
            sheet.text((column + 0.08) * step, (row + 0.08) * step, str(i), **style)


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
