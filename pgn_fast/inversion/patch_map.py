"""The patch embedding as an affine map from 8-bit levels to tokens: token_j = A u + d + pos_j."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CodecError, InversionError, LayoutError
from .jpeg import JpegRounding
from .layout import MID_LEVEL, CanvasLayout
from .rounding import FeedbackRounding
from .server_spec import CHROMA, DTYPES, ServerSpec
from .solve import BoxSolver


@dataclass(frozen=True, eq=False)
class PatchMap:
    """What a frozen backbone makes of the pixels of one canvas cell.

    With per-channel mean and std spread over the pixels to m, s (n = 3 p^2 values):

        A = E diag(1 / (255 s)),   d = b - E (m / s),   token_j(u) = A u + d + pos_j

    Attributes:
        A: token change per level, (D, n) float64.
        d: token of the all-zero patch, (D,) float64.
        positions: position embedding of every canvas cell, as the server resamples it, (cells, D).
        image_positions: position embedding of every image patch on the backbone's own grid,
            (N, D); the one that compensated positions reproduce.
        native: the backbone's own grid of patches (rows, columns), for the images it was made for.
        patch_size: p, in pixels.
        layout, server: what the map was made for.
        num_prefix: S, class and register tokens in front of the patches.
        scale_free: a LayerNorm stands directly after the token assembly (CLIP), so that a token
            and a positive multiple of it give the same result.
        shift_free: every norm removes the mean, so that adding a constant to all D values of a
            token never matters. False for RMSNorm.
        rotary: the blocks rotate queries and keys by position, which no pixel can undo.
        name: of the backbone.
        fingerprint: hash of the backbone's weights that the map was made from. A and d themselves
            differ in their last bits between machines.
    """

    A: Tensor
    d: Tensor
    positions: Tensor
    image_positions: Tensor
    native: tuple[int, int]
    patch_size: int
    layout: CanvasLayout
    server: ServerSpec
    num_prefix: int = 1
    scale_free: bool = False
    shift_free: bool = True
    rotary: bool = False
    name: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.server.check_codec(self.patch_size, self.embed_dim)

    @classmethod
    def from_backbone(
        cls, model: Any, server: ServerSpec | None = None, layout: CanvasLayout | None = None
    ) -> PatchMap:
        """Read the map off a timm vision transformer.

        Args:
            model: the backbone, or a PromptedViT (its ``.backbone`` is read).
            server: None takes ``ServerSpec.from_backbone``.
            layout: None takes the border layout of the backbone's grid with 16 prompts, fewer
                where that has less than 7 x 7 patches.

        Raises:
            InversionError: the patch embedding is no single affine map per patch.
            CodecError: the server's JPEG files cannot carry patches of this size.
            LayoutError: the backbone does not take a canvas of the layout's grid.
        """
        backbone = getattr(model, "backbone", model)
        projection = _projection(backbone)
        server = ServerSpec.from_backbone(backbone) if server is None else server
        p = projection.kernel_size[0]
        rows, columns = backbone.patch_embed.grid_size
        native = (int(rows), int(columns))
        if layout is None:
            # a small grid has room for one row and one column of prompts
            prompts = 16 if min(native) >= 7 else min(16, sum(native) - 1)
            layout = CanvasLayout.border(native, prompts=prompts)
        server.check_canvas(layout.grid[0] * p, layout.grid[1] * p)
        # the server's arithmetic: weights as its dtype holds them
        weight = projection.weight.detach().to(DTYPES[server.dtype]).double().flatten(1)  # (D, n)
        bias = weight.new_zeros(len(weight))
        if projection.bias is not None:
            bias = projection.bias.detach().to(DTYPES[server.dtype]).double()
        mean, std = (
            torch.tensor(v, dtype=torch.float64).repeat_interleave(p * p)
            for v in (server.mean, server.std)
        )
        weight, bias = weight.cpu(), bias.cpu()
        norm_pre = getattr(backbone, "norm_pre", nn.Identity())
        return cls(
            A=weight / (255 * std),
            d=bias - weight @ (mean / std),
            positions=_positions(backbone, layout.grid),
            image_positions=_positions(backbone, native),
            native=native,
            patch_size=p,
            layout=layout,
            server=server,
            num_prefix=int(backbone.num_prefix_tokens),
            scale_free=isinstance(norm_pre, nn.LayerNorm),
            shift_free=_only_layer_norms(backbone),
            rotary=getattr(backbone, "rope", None) is not None,
            name=(getattr(backbone, "pretrained_cfg", None) or {}).get("architecture", "")
            or type(backbone).__name__,
            fingerprint=_fingerprint(
                projection.weight, projection.bias, getattr(backbone, "pos_embed", None)
            ),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchMap:
        return self  # immutable, and large: copies of a model share it

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the backbone was made for, in pixels."""
        return self.native[0] * self.patch_size, self.native[1] * self.patch_size

    @property
    def embed_dim(self) -> int:
        return self.A.shape[0]

    @property
    def patch_values(self) -> int:
        """n = 3 * patch_size**2, the values of one patch."""
        return self.A.shape[1]

    @cached_property
    def constant(self) -> Tensor:
        """The token of a mid-gray patch without its position, (D,): what a prompt cell adds to
        the content of a prompt that is trained with ``prompt_pos="canvas"``."""
        return self.A.sum(dim=1) * MID_LEVEL + self.d

    @cached_property
    def solver(self) -> BoxSolver:
        """For token differences as ``center`` leaves them, by patches that the codec carries.

        Raises:
            CodecError: patches must be gray, and the gray ones do not reach every token.
        """
        usable = self.center(self.A.T).T.contiguous()
        if not self.server.gray_only:
            return BoxSolver(usable)
        # a map that sees the mean of the channels: what is solved for gray starts stays gray
        p2 = self.patch_size**2
        gray = usable.reshape(-1, 3, p2).mean(dim=1, keepdim=True).expand(-1, 3, -1)
        solver = BoxSolver(gray.reshape(usable.shape).contiguous())
        needed = self.embed_dim - self.shift_free
        if solver.rank < needed:
            raise CodecError(
                f"jpeg {CHROMA[self.server.subsampling]} needs gray-only patches, and those of "
                f"{self.name or 'this backbone'} reach {solver.rank} of {needed} token directions. "
                "Send PNG, or JPEG with subsampling=0 (4:4:4)."
            )
        return solver

    @cached_property
    def rounding(self) -> FeedbackRounding:
        """How patches are rounded to 8 bits, or to what a JPEG file keeps of them."""
        if self.server.codec == "jpeg":
            return JpegRounding.from_patch_map(
                self.A, self.patch_size, self.server.quality, gray=self.server.gray_only
            )
        return FeedbackRounding.from_map(self.A)

    @cached_property
    def key(self) -> str:
        """Hash of everything that an inverted library depends on; the same on every machine."""
        settings = {"layout": self.layout.to_dict(), "server": self.server.to_dict()}
        text = self.fingerprint + json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def center(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) without what no norm lets through: their mean, where it is free."""
        return tokens - tokens.mean(dim=-1, keepdim=True) if self.shift_free else tokens

    def tokens(self, levels: Tensor) -> Tensor:
        """Levels (..., n) to tokens without position (..., D), float64."""
        return levels.double() @ self.A.T + self.d

    def relative_error(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """|tokens - wanted| / |wanted| over the last dimension, modulo what never matters."""
        difference = self.center(tokens.double() - wanted.double()).norm(dim=-1)
        return difference / self.center(wanted.double()).norm(dim=-1).clamp_min(1e-30)


def _projection(backbone: Any) -> nn.Conv2d:
    """The one convolution that is the patch embedding, or the reason why there is none."""

    def refuse(reason: str) -> InversionError:
        return InversionError(
            f"{type(backbone).__name__}: {reason}, so a token is not an affine function of the "
            "pixels of one patch and prompts cannot be written as pixels. Plain vision "
            "transformers (vit_*, deit*_*, CLIP and DINO) can."
        )

    embed = getattr(backbone, "patch_embed", None)
    if embed is None:
        raise refuse("it has no patch_embed")
    projection = getattr(embed, "proj", None)
    if getattr(embed, "backbone", None) is not None:
        raise refuse("its patch embedding is a convolutional network (hybrid stem)")
    if not isinstance(projection, nn.Conv2d):
        raise refuse(f"its patch embedding {type(embed).__name__} is not one convolution")
    if not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        raise refuse("it normalizes inside the patch embedding")
    kernel = tuple(projection.kernel_size)
    if kernel != tuple(projection.stride) or projection.padding not in ((0, 0), "valid"):
        raise refuse(f"its patches overlap (kernel {kernel}, stride {tuple(projection.stride)})")
    if kernel[0] != kernel[1] or projection.in_channels != 3 or projection.groups != 1:
        raise refuse(
            f"its patches are {kernel[0]}x{kernel[1]} of {projection.in_channels} channels, not "
            "square RGB"
        )
    return projection


@torch.no_grad()
def _positions(backbone: Any, grid: tuple[int, ...]) -> Tensor:
    """Position embeddings (cells, D) float64 on this grid, by the backbone's own code."""
    native = tuple(backbone.patch_embed.grid_size)
    dynamic = bool(getattr(backbone, "dynamic_img_size", False))
    if tuple(grid) != native and not dynamic:
        raise LayoutError(
            f"the canvas has {grid[0]}x{grid[1]} patches, the backbone takes {native[0]}x"
            f"{native[1]} only. Use CanvasLayout.border(grid={native}), or a backbone with "
            "dynamic_img_size=True."
        )
    prefix, D = int(backbone.num_prefix_tokens), int(backbone.embed_dim)
    parameter = backbone.patch_embed.proj.weight
    if not hasattr(backbone, "_pos_embed"):  # BEiT: an absolute embedding or none
        table = getattr(backbone, "pos_embed", None)
        zeros = torch.zeros(native[0] * native[1], D, dtype=torch.float64)
        return zeros if table is None else table[0, prefix:].double().cpu()
    shape = (1, *grid, D) if dynamic else (1, grid[0] * grid[1], D)
    tokens = backbone._pos_embed(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # EVA returns its rotation too
    return tokens[0, prefix:].double().cpu()


def _fingerprint(*tensors: Tensor | None) -> str:
    """Hash of parameters, bit by bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _only_layer_norms(backbone: nn.Module) -> bool:
    """Whether every norm on the residual stream removes the mean."""
    norms = [
        module
        for name, module in backbone.named_modules()
        if name.rpartition(".")[2] in ("norm1", "norm2", "norm", "norm_pre", "fc_norm")
        and not name.startswith("patch_embed")
        and ".attn." not in name
        and ".mlp." not in name
    ]
    return all(isinstance(norm, nn.LayerNorm | nn.Identity) for norm in norms)
