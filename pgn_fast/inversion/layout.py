"""Which cell of the canvas holds what: the image, a prompt, or nothing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LayoutError

BLANK_LEVEL = 128  # of cells without image or prompt, and of the gray around a padded canvas
MID_LEVEL = 127.5  # the middle of the gamut: prompts are counted from it
# a decoder interpolates subsampled colors over this many pixels across an edge
_CHROMA_REACH = 2
_LUMA = (0.299, 0.587, 0.114)  # JFIF


@dataclass(frozen=True)
class CanvasLayout:
    """Cells of a canvas of patches, numbered row by row.

    Attention does not care in which order tokens stand, so any cell may hold any token as long as
    its position embedding is accounted for.

    Attributes:
        grid: patches of the canvas (rows, columns).
        image: patches of the image (rows, columns).
        image_cells: the cell of each image patch, row by row.
        prompt_cells: the cell of each prompt.
        compensate_positions: each image patch is changed so that its token has the position
            embedding of its place in the image, not of its cell.
    """

    grid: tuple[int, int]
    image: tuple[int, int]
    image_cells: tuple[int, ...]
    prompt_cells: tuple[int, ...]
    compensate_positions: bool = False

    def __post_init__(self) -> None:
        used = (*self.image_cells, *self.prompt_cells)
        cells = math.prod(self.grid)
        if len(self.image_cells) != math.prod(self.image):
            raise LayoutError(
                f"an image of {self.image[0]}x{self.image[1]} patches needs "
                f"{math.prod(self.image)} cells, got {len(self.image_cells)}"
            )
        if len(set(used)) != len(used) or (used and not 0 <= min(used) <= max(used) < cells):
            raise LayoutError(
                f"every image patch and prompt needs a cell of its own among the {cells} of the "
                f"grid {self.grid[0]}x{self.grid[1]}"
            )

    @classmethod
    def border(
        cls,
        grid: tuple[int, int] = (7, 7),
        image: tuple[int, int] | None = None,
        prompts: int = 16,
    ) -> CanvasLayout:
        """A canvas of the usual size: the image shrunk to the middle, prompts around it.

        Works with every image API and costs the server nothing. The model must be trained in it,
        because the image is smaller and the cells that are left over are tokens too.

        Args:
            grid: rows and columns of the backbone's own patches.
            image: patches of the image; None: the largest of the grid's proportions that leaves
                cells for the prompts, 5x5 in 7x7 for 16 prompts.
            prompts: how many; the first cells around the image, row by row.
        """
        (rows, columns) = grid
        if image is None:
            fitting = [
                (rows - k, columns - k)
                for k in range(min(rows, columns))
                if rows * columns - (rows - k) * (columns - k) >= prompts
            ]
            if not fitting:
                raise LayoutError(
                    f"{prompts} prompts leave no room for an image in a {rows}x{columns} grid. Use "
                    "fewer prompts, or CanvasLayout.enlarged on a server for images of any size."
                )
            image = fitting[0]
        image_rows, image_columns = image
        if image_rows > rows or image_columns > columns:
            raise LayoutError(
                f"an image of {image_rows}x{image_columns} patches does not fit a {rows}x{columns} "
                "grid"
            )
        top, left = (rows - image_rows) // 2, (columns - image_columns) // 2
        inside = [
            (top + y) * columns + left + x for y in range(image_rows) for x in range(image_columns)
        ]
        outside = [cell for cell in range(rows * columns) if cell not in set(inside)]
        if prompts > len(outside):
            raise LayoutError(
                f"{prompts} prompts do not fit the {len(outside)} cells around an image of "
                f"{image_rows}x{image_columns} patches in a {rows}x{columns} grid. Use a smaller "
                "image or fewer prompts."
            )
        return cls(grid, image, tuple(inside), tuple(outside[:prompts]))

    @classmethod
    def enlarged(
        cls,
        grid: tuple[int, int] | None = None,
        image: tuple[int, int] = (7, 7),
        prompts: int = 16,
        *,
        compensate_positions: bool = True,
        allow_blank: bool = False,
    ) -> CanvasLayout:
        """A larger canvas: the image's patches one after the other, then the prompts.

        For a server that takes images of any size. With compensated positions it reproduces the
        token sequence of latent training: nothing has to be trained again.

        Args:
            grid: rows and columns; None takes the most nearly square one without blank cells.
            image: patches of the image (rows, columns), as the backbone sees it without prompts.
            prompts: how many.
            compensate_positions: see the class.
            allow_blank: accept cells without image or prompt; they become tokens.
        """
        tokens = math.prod(image) + prompts
        rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
        exact = (rows, tokens // rows)
        grid = exact if grid is None else grid
        blank = math.prod(grid) - tokens
        if blank < 0 or (blank > 0 and not allow_blank):
            what = (
                f"{blank} blank cells would become extra tokens" if blank > 0 else f"{-blank} lack"
            )
            raise LayoutError(
                f"{math.prod(image)} image + {prompts} prompt tokens do not fill a "
                f"{grid[0]}x{grid[1]} grid ({what}). Use {exact[0]}x{exact[1]}"
                + (", or allow_blank=True and train with the same blanks." if blank > 0 else ".")
            )
        count = math.prod(image)
        return cls(
            grid, image, tuple(range(count)), tuple(range(count, tokens)), compensate_positions
        )

    @classmethod
    def named(
        cls,
        kind: str,
        native: tuple[int, int],
        prompts: int,
        *,
        image_grid: tuple[int, int] | None = None,
        canvas_grid: tuple[int, int] | None = None,
        compensate: bool = True,
        allow_blank: bool = False,
    ) -> CanvasLayout:
        """The layout that the words of a command line name.

        Args:
            kind: "border" or "enlarged".
            native: rows and columns of the backbone's own patches.
            prompts: how many.
            image_grid: border: patches of the image.
            canvas_grid, compensate, allow_blank: enlarged: see there.

        Raises:
            LayoutError: the cells do not add up, or a word belongs to the other kind.
        """
        rows, columns = native
        if kind == "border":
            if canvas_grid is not None or allow_blank or not compensate:
                raise LayoutError(
                    "canvas-grid, allow-blank and no-compensate belong to layout enlarged: a "
                    f"border canvas has the backbone's own {rows}x{columns} patches in their own "
                    "places, and what is left over is blank. Leave them out."
                )
            return cls.border(native, image_grid, prompts)
        if kind != "enlarged":
            raise LayoutError(f"layout is {kind!r}; known: border, enlarged")
        if image_grid not in (None, native):
            raise LayoutError(
                "image-grid belongs to layout border: on an enlarged canvas the image keeps its "
                f"{rows}x{columns} patches. Leave it out."
            )
        return cls.enlarged(
            canvas_grid,
            native,
            prompts,
            compensate_positions=compensate,
            allow_blank=allow_blank,
        )

    def describe(self) -> str:
        """In words, for messages."""
        (rows, columns), (image_rows, image_columns) = self.grid, self.image
        compensated = " at compensated positions" if self.compensate_positions else ""
        return (
            f"a {rows}x{columns} canvas with an image of {image_rows}x{image_columns} "
            f"patches{compensated} and {self.num_prompts} prompts from cell "
            f"{min(self.prompt_cells, default=0)} on"
        )

    @property
    def blank_cells(self) -> tuple[int, ...]:
        """Cells that hold neither image nor prompt, of one gray level."""
        used = {*self.image_cells, *self.prompt_cells}
        return tuple(cell for cell in range(math.prod(self.grid)) if cell not in used)

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_cells)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "grid": list(self.grid),
            "image": list(self.image),
            "image_cells": list(self.image_cells),
            "prompt_cells": list(self.prompt_cells),
            "compensate_positions": self.compensate_positions,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CanvasLayout:
        """The layout that ``to_dict`` described."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**values)

    def compose(
        self, image_patches: Tensor, prompt_patches: Tensor | None, patch_size: int
    ) -> Tensor:
        """Put patches into their cells.

        Args:
            image_patches: levels (B, N, n), n = 3 * patch_size**2.
            prompt_patches: levels (B, P, n), same dtype; None leaves those cells at mid gray,
                which in an integer dtype is BLANK_LEVEL.
            patch_size: in pixels.

        Returns:
            Canvases (B, 3, H, W) in the patches' dtype.
        """
        B, _, n = image_patches.shape
        cells = image_patches.new_full((B, math.prod(self.grid), n), BLANK_LEVEL)
        cells[:, list(self.image_cells)] = image_patches
        if prompt_patches is not None:
            cells[:, list(self.prompt_cells)] = prompt_patches
        elif cells.is_floating_point():
            cells[:, list(self.prompt_cells)] = MID_LEVEL
        return from_patches(cells, self.grid, patch_size)


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, 3, H, W) to patches (B, N, 3 * p * p), channel first, row by row."""
    B, C, H, W = images.shape
    p = patch_size
    cells = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(B, (H // p) * (W // p), C * p * p)


def from_patches(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Patches (B, N, 3 * p * p), row by row, to images (B, 3, H, W)."""
    (rows, columns), p = grid, patch_size
    pixels = patches.reshape(-1, rows, columns, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(-1, 3, rows * p, columns * p)


def shrink(levels: Tensor, layout: CanvasLayout, patch_size: int) -> Tensor:
    """Image levels (B, 3, H, W) resized to the layout's image cells: whole levels, float32.

    Bicubic with antialiasing, then rounded and clipped, so that training sees what is served.
    """
    size = (layout.image[0] * patch_size, layout.image[1] * patch_size)
    if levels.shape[-2:] == size:
        return levels.float()
    resized = torch.nn.functional.interpolate(levels.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255)


def image_patches(
    levels: Tensor, layout: CanvasLayout, patch_size: int, *, gray_rim: bool = False
) -> Tensor:
    """What the image's cells of a canvas hold, in training and when served.

    Args:
        levels: images (B, 3, H, W), 0 to 255.
        layout, patch_size: of the canvas.
        gray_rim: take the color out of the two pixels next to a prompt. A JPEG decoder
            interpolates subsampled colors, and would tint the prompt's edge: at B/32 that doubles
            its token error.

    Returns:
        Whole levels (B, N, 3 * p * p), float32.
    """
    patches = to_patches(shrink(levels, layout, patch_size), patch_size)
    if not gray_rim:
        return patches
    colors = patches.unflatten(2, (3, -1))
    luma = torch.einsum("bncp,c->bnp", colors, colors.new_tensor(_LUMA)).round()[:, :, None]
    rim = _next_to_prompts(layout, patch_size).to(patches.device)[:, None]
    return torch.where(rim, luma, colors).flatten(2)


@functools.cache
def _next_to_prompts(layout: CanvasLayout, patch_size: int) -> Tensor:
    """Pixels of the image's cells that subsampled colors carry into a prompt, (N, p * p) bool."""
    rows, columns = layout.grid
    prompts = torch.zeros(rows * columns, 3 * patch_size**2)
    prompts[list(layout.prompt_cells)] = 1
    canvas = from_patches(prompts, layout.grid, patch_size)
    reach = 2 * _CHROMA_REACH + 1
    near = torch.nn.functional.max_pool2d(canvas, reach, stride=1, padding=_CHROMA_REACH)
    return to_patches(near, patch_size)[0, list(layout.image_cells), : patch_size**2] > 0
