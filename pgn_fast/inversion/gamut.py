"""A token library that can only hold what 8-bit patches can say: training in gamut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.schedule import PromptSchedule
from .compensation import check_compensation
from .errors import InversionError, LayoutError
from .jpeg import MARGIN as JPEG_MARGIN
from .layout import BLANK_LEVEL, MID_LEVEL, CanvasLayout, image_patches
from .patch_map import PatchMap
from .server_spec import ServerSpec

MARGIN = 6.0  # levels that the rounding's feedback may use
_FIT_STEPS = 50


class GamutLibrary(nn.Module):
    """Drop-in for the token library of a PGN: yields (K, D), always inside the gamut.

        h = 127.5 - margin;  pixels_k = 127.5 + h * tanh((theta_k P^T) / h),  P = A^+
        token_k = A (pixels_k - 127.5)

    Near theta = 0 the token is theta (its part that pixels can produce at all), so initialization
    and learning rates of latent training carry over; far out it saturates smoothly at the gamut.
    The tokens are contents: what a patch adds to the token of a mid-gray cell. A PGN that is given
    this library trains in the canvas layout of ``patch_map``: the image in its cells, every prompt
    in its own cell with that cell's position embedding, blank cells as tokens, just as the server
    will see it.

    Args:
        n_tokens: K.
        patch_map: of the backbone, for the server and layout of the deployment.
        margin: levels kept free at both ends; None: 6, for a JPEG server 24.

    Attributes:
        theta: Parameter (K, D), normal with standard deviation 0.02, as a plain token library.
    """

    A: Tensor
    pseudo_inverse: Tensor
    offset: Tensor
    blanks: Tensor

    def __init__(self, n_tokens: int, patch_map: PatchMap, margin: float | None = None) -> None:
        super().__init__()
        if margin is None:
            margin = JPEG_MARGIN if patch_map.server.codec == "jpeg" else MARGIN
        if n_tokens < 1:
            raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
        if not 0 <= margin < MID_LEVEL:
            raise ValueError(f"margin must be in [0, 127.5) levels, got {margin}")
        if patch_map.layout.compensate_positions:
            check_compensation(patch_map)
        self.patch_map = patch_map
        self.margin = margin
        self.theta = nn.Parameter(torch.empty(n_tokens, patch_map.embed_dim))
        nn.init.normal_(self.theta, std=0.02)
        for name, value in self._constants().items():
            # not saved: they belong to the backbone, and an adapter is made for one backbone
            self.register_buffer(name, value, persistent=False)

    def _constants(self) -> dict[str, Tensor]:
        cells = list(self.patch_map.layout.prompt_cells)
        blanks = list(self.patch_map.layout.blank_cells)
        gray = torch.full((1, self.patch_map.patch_values), BLANK_LEVEL)
        constants = {
            "A": self.patch_map.A,
            "pseudo_inverse": self.patch_map.solver.pseudo_inverse,
            "offset": self.patch_map.constant + self.patch_map.positions[cells],  # (P, D)
            "blanks": self.patch_map.tokens(gray) + self.patch_map.positions[blanks],
        }
        return {name: value.float().contiguous() for name, value in constants.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> GamutLibrary:
        """Move to a device or dtype; the constants stay float32, whatever the backbone's dtype:
        bfloat16 has no room for half a level at 127.5."""
        super()._apply(fn, recurse)
        if self.A.dtype != torch.float32:
            for name, value in self._constants().items():
                setattr(self, name, value.to(self.A.device))
        return self

    @classmethod
    def from_latent(
        cls,
        tokens: Tensor,
        patch_map: PatchMap,
        margin: float | None = None,
        *,
        prompt_pos: str = "none",
        iters: int = 300,
    ) -> GamutLibrary:
        """The library nearest to one that was trained in latent space; fine-tune it afterwards.

        Args:
            tokens: (K, D). Solved for in the box first, then theta is fitted to what was found.
            patch_map, margin: as for the constructor.
            prompt_pos: "none": whole tokens, as latent training has them; the constant of a
                mid-gray cell is taken off. "canvas": contents, as this class yields them.
            iters: of the solver, at most.
        """
        library = cls(len(tokens), patch_map, margin)
        contents = tokens.detach().double().cpu()
        if prompt_pos == "none":
            contents = contents - patch_map.constant
        elif prompt_pos != "canvas":
            raise ValueError(f"prompt_pos={prompt_pos!r}; known: canvas, none")
        solver, margin = patch_map.solver, library.margin
        h = MID_LEVEL - margin
        mid = torch.full((patch_map.patch_values,), MID_LEVEL, dtype=torch.float64)
        y = patch_map.center(contents) + mid @ solver.A.T
        levels = solver.in_box(y.float(), margin, 255 - margin, mid, iterations=iters).double()
        # the inverse of the squashing, which at the bounds is infinite, brings theta near
        unsquashed = h * torch.atanh(((levels - mid) / h).clamp(-0.98, 0.98))
        reached = ((levels - mid) @ patch_map.A.T).float()
        with torch.no_grad():
            library.theta.copy_(unsquashed @ patch_map.A.T)
            # d token / d theta = A diag(tanh') A^+ has eigenvalues in (0, 1]: this converges
            for _ in range(_FIT_STEPS):
                library.theta.add_(reached - library())
        return library

    def to_config(self) -> dict[str, Any]:
        """What rebuilds this library in front of its backbone, as plain JSON values."""
        return {
            "n_tokens": len(self.theta),
            "margin": self.margin,
            "layout": self.patch_map.layout.to_dict(),
            "server": self.patch_map.server.to_dict(),
            "key": self.patch_map.key,
        }

    @classmethod
    def from_config(cls, backbone: Any, config: Mapping[str, Any]) -> GamutLibrary:
        """Rebuild what ``to_config`` described; the tokens come from the state dict.

        Raises:
            InversionError: the backbone's input side is not the one of the training.
        """
        server = ServerSpec(**config["server"])
        layout = CanvasLayout.from_dict(config["layout"])
        patch_map = PatchMap.from_backbone(backbone, server, layout)
        if config["key"] != patch_map.key:
            raise _stale()
        return cls(config["n_tokens"], patch_map, config["margin"])

    def pixels(self) -> Tensor:
        """The library as patches (K, n) in levels, within [margin, 255 - margin], float32."""
        h = MID_LEVEL - self.margin
        with torch.autocast(self.A.device.type, enabled=False):
            return MID_LEVEL + h * torch.tanh((self.theta.float() @ self.pseudo_inverse.T) / h)

    def forward(self) -> Tensor:
        """The token library (K, D). Costs 2 K n D multiply-adds, whatever the batch."""
        with torch.autocast(self.A.device.type, enabled=False):
            return ((self.pixels() - MID_LEVEL) @ self.A.T).to(self.theta.dtype)

    def place(self, images: Tensor, prompts: Tensor) -> tuple[Tensor, PromptSchedule]:
        """What the backbone gets in training: the canvas, and what its prompt cells hold.

        Args:
            images: normalized images (B, 3, H, W).
            prompts: contents of the prompts (B, P, D).

        Returns:
            Normalized canvases with mid-gray prompt cells, and the schedule that adds the contents
            to those cells' tokens. With compensated positions: the images themselves, and after
            the patches the prompts and the blank cells, each with the token and position of its
            cell.
        """
        layout, patch_map = self.patch_map.layout, self.patch_map
        if prompts.shape[1] != layout.num_prompts:
            raise LayoutError(
                f"the model has {prompts.shape[1]} prompts, its GamutLibrary's layout has cells "
                f"for {layout.num_prompts}. Build both with the same number."
            )
        if layout.compensate_positions:
            whole = prompts + self.offset.to(prompts.dtype)
            blanks = self.blanks.to(prompts.dtype).expand(len(prompts), -1, -1)
            return images, PromptSchedule("append", {0: torch.cat([whole, blanks], dim=1)})
        p, prefix = patch_map.patch_size, patch_map.num_prefix
        server = patch_map.server
        shown = image_patches(server.levels(images), layout, p, gray_rim=server.gray_only)
        canvases = server.normalize(layout.compose(shown, None, p))
        tokens = prefix + layout.grid[0] * layout.grid[1]
        contents = prompts.new_zeros(len(prompts), tokens, prompts.shape[2])
        contents[:, [prefix + cell for cell in layout.prompt_cells]] = prompts
        return canvases.to(images.dtype), PromptSchedule("add", {0: contents})

    def check(self, patch_map: PatchMap) -> None:
        """Raise where this library was trained for another backbone, server or layout."""
        if patch_map.layout != self.patch_map.layout:
            raise LayoutError(
                f"library was trained for {self.patch_map.layout.describe()} (prompt_pos=canvas) "
                f"but is deployed on {patch_map.layout.describe()}"
            )
        if patch_map.key != self.patch_map.key:
            raise _stale()


def _stale() -> InversionError:
    return InversionError(
        "the patch embedding, the position embedding, the normalization or the server's settings "
        "are not those that this GamutLibrary was trained with; use the same backbone and server."
    )
