"""Frozen linear layers in 8 bits, for inference: int8 on CPU, float8 on NVIDIA GPUs.

With one scale an output channel, s_w, found once, and one a token, s_x, found at each call:

    q_w = round(W / s_w)    q_x = round(x / s_x)    y = s_x s_w (q_x q_w^T) + b

Rounding is all that differs from the float product; sums run in int32, or float32 for float8.
For int8 both sides are first mixed within blocks of 64 columns (``onednn.pack_int8``), which leaves
the product as it is: a token's few channels that are far larger than the others would set its
scale.

int8 runs by the oneDNN that is bundled with torch, on processors with VNNI: others would add pairs
of products in 16 bits, which overflow. Its fast products take bytes from 0 to 255 on the left, so a
token's codes are shifted by 128, and oneDNN takes the shift out again. The weights are packed once.

float8 (e4m3) runs by ``torch._scaled_mm``. Its weights are rounded at every call, because a write
to weights on a GPU could not be seen without waiting for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import onednn
from ..ops._register import transformed
from .options import Weights
from .weights import PLACES, FrozenLinear

# of an image; below, a product in 8 bits saves less than finding the tokens' scales costs
_MIN_TOKENS = 16
_FLOAT8 = torch.float8_e4m3fn
# of the GPU; the first with float8 products
_CAPABILITY = (8, 9)


@dataclass
class Int8Linear(FrozenLinear):
    """A FrozenLinear that multiplies in 8 bits; without gradients.

    Attributes:
        packed: the weight's codes as oneDNN wants them, and the channels' scales (O,); None until
            they are needed.
    """

    packed: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        # never by the number of images, nor of a batch's prompts (two dimensions): an answer does
        # not depend on what else is in the batch
        if transformed() or x.ndim != 3 or x.shape[1] < _MIN_TOKENS:
            return super().__call__(x)
        if self.packed is None:
            self.packed = onednn.pack_int8(self.weight)
        return onednn.multiply_int8(x, *self.packed, self.bias)

    def gelu(self, x: Tensor, approximate: str) -> None:
        """None: the scales of the tokens stand between the product and GELU."""

    @staticmethod
    def places(block: int, depth: int) -> tuple[str, ...]:
        """Nothing of the last sixth of the blocks, whose errors none above evens out.

        Nor of the last block in any case: where one token is read, it has one row an image, which
        a bank of tasks would multiply in batches.
        """
        last = max(depth // 6, min(depth - 1, 1))
        return () if block >= depth - last else PLACES


@dataclass
class Float8Linear(FrozenLinear):
    """A FrozenLinear that multiplies in float8; without gradients."""

    def __call__(self, x: Tensor) -> Tensor:
        if transformed():
            return super().__call__(x)
        rows, x_scale = to_float8(x.flatten(0, -2))
        weight, weight_scale = to_float8(self.weight)
        y = scaled_product(rows, x_scale, weight, weight_scale)
        y = y.unflatten(0, x.shape[:-1]).to(self.weight.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def gelu(self, x: Tensor, approximate: str) -> None:
        """None: the bias is added after the product."""


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, I) as float8 and their scales (R, 1) in float32: x is about the product of both.

    Three passes over the rows, the first two in their own dtype: on a GPU the passes cost more than
    the product.
    """
    if x.dtype == torch.float64:  # whose norm in float32 torch refuses
        x = x.float()
    largest, least = torch.finfo(_FLOAT8).max, torch.finfo(torch.float32).tiny
    norm = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = norm.div_(largest).clamp_min_(least)
    # nothing to clamp: a quotient is above 448, float8's largest number, by roundings of float32 at
    # most, and all below 464 becomes 448
    return (x / scale).to(_FLOAT8), scale


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x (R, I) by weight (O, I), each times its rows' scales, (R, 1) and (O, 1): (R, O) in
    bfloat16, the one dtype for which torch takes scales of rows."""
    return torch._scaled_mm(x, weight.T, x_scale, weight_scale.T, out_dtype=torch.bfloat16)


LINEARS: dict[Weights, type[FrozenLinear]] = {"int8": Int8Linear, "fp8": Float8Linear}


def unsupported_reason(
    kind: Weights, device: torch.device, dtype: torch.dtype, backbone: Any
) -> str | None:
    """Why these weights cannot be used here; None where they can."""
    where = f"these are {str(dtype).removeprefix('torch.')} on {device.type}"
    if kind == "int8":
        if device.type != "cpu" or dtype != torch.float32:
            return f"int8 weights run in float32 models on cpu, {where}"
        return onednn.int8_missing()
    if device.type != "cuda":
        return f"float8 weights run on NVIDIA GPUs of capability 8.9 and above, {where}"
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        return f"float8 products need compute capability 8.9, this GPU has {found[0]}.{found[1]}"
    narrow = [p.shape for p in backbone.blocks.parameters() if p.ndim == 2]
    if odd := [tuple(shape) for shape in narrow if any(size % 16 for size in shape)]:
        return f"float8 products take widths that are multiples of 16; a weight here is {odd[0]}"
    return None
