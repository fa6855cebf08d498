"""Image patches that bring their own position along: for canvases larger than the image."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CodecError, InversionError, LayoutError
from .patch_map import PatchMap

# levels that the feedback may use in image patches: they move little, and their contrast is wanted
MARGIN = 3.0
ITERATIONS = 120


class PositionCompensation:
    """Changes image patches so that each token has the position of its place in the image.

        A u' + pos'_cell = A u + pos_i

    u' is the patch nearest to u in the gamut; where there is none, the nearest token. The position
    embedding of a cell is what the server's own resampling gives.
    """

    def __init__(self, patch_map: PatchMap) -> None:
        check_compensation(patch_map)
        cells = list(patch_map.layout.image_cells)
        self.patch_map = patch_map
        self.moved = patch_map.center(patch_map.image_positions - patch_map.positions[cells])

    def __call__(self, image_patches: Tensor) -> Tensor:
        """Image patches (B, N, n) in levels to uint8 patches of the same shape."""
        solver, levels = self.patch_map.solver, image_patches.double().cpu()
        wanted = levels @ solver.A.T + self.moved  # (B, N, D)
        solved = solver.in_box(
            wanted.flatten(0, 1).float(),
            MARGIN,
            255 - MARGIN,
            levels.flatten(0, 1).float(),
            iterations=ITERATIONS,
            tolerance=1e-4,
        )
        rounded = self.patch_map.rounding(solved.reshape(image_patches.shape))
        return rounded.to(image_patches.device, torch.uint8)


def check_compensation(patch_map: PatchMap) -> None:
    """Raise where positions cannot be compensated.

    Raises:
        InversionError: the backbone rotates queries and keys by position.
        CodecError: the codec does not keep what would be changed.
        LayoutError: the layout does not hold the backbone's own image patches.
    """
    if patch_map.rotary:
        raise InversionError(
            f"{patch_map.name} rotates queries and keys by position, which no pixel compensates. "
            "Train in a border layout, or in an enlarged one without compensation."
        )
    if patch_map.server.gray_only:
        raise CodecError(
            "compensated positions change the image's patches in colors that a JPEG with "
            "subsampled colors does not keep. Send PNG, or JPEG with subsampling=0 (4:4:4)."
        )
    cells = len(patch_map.layout.image_cells)
    if len(patch_map.image_positions) != cells:
        raise LayoutError(
            f"compensated positions need every image patch of the backbone's own grid, "
            f"{len(patch_map.image_positions)}; the layout has {cells}. Use "
            f"CanvasLayout.enlarged(image={patch_map.native})."
        )
