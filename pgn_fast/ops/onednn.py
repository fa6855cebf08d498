"""The oneDNN that is bundled with torch: backend "cpu" of ``frozen_linear``, and products in int8.

torch multiplies float32 matrices by MKL, whose AVX-512 kernels run on Intel's processors alone. On
others it stays with AVX2: half the speed of oneDNN's kernels on an AMD EPYC with AVX-512. On Intel
the two are equal.
"""

from __future__ import annotations

import functools
import math
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

# multiplications below which oneDNN's call, 12 us, costs more than its kernels win
_SMALLEST = 2**20


def missing() -> str | None:
    """Reason oneDNN's linear layer is unavailable here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch does not offer oneDNN's linear layer"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"oneDNN is used on x86-64 alone, this is {platform.machine()}"
    return None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run. x (..., I), weight (O, I), bias (O,) or None, float32: see ops.frozen_linear."""
    return multiply(x, weight, bias) if pays(x, weight) else F.linear(x, weight, bias)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is large enough for oneDNN."""
    return x.numel() * weight.shape[0] >= _SMALLEST


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN; ``weight`` as it is, or as ``pack`` returned it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight (O, I) in the layout that oneDNN multiplies by, for ``multiply``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


# half of the range of bytes: a token's codes are from 1 to 255
_MIDDLE = 128


@functools.cache
def int8_missing() -> str | None:
    """Why there are no fast products of bytes here; None where there are."""
    if (reason := missing()) is not None:
        return reason
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this build of torch does not offer oneDNN's linear layer in int8"
    if not torch.cpu._is_vnni_supported():
        return "int8 products need a processor with AVX-512 VNNI"
    return None


# columns that are mixed with each other: a power of two
_MIXED = 64


def _spread(rows: Tensor) -> Tensor:
    """Rows (R, I), each block of columns times an orthogonal Hadamard matrix.

    Done to both sides of a product it leaves the product as it is. Tokens have a few channels far
    larger than the others, which would set the scale for all; mixed with 63 others they do not.
    """
    block = math.gcd(rows.shape[1], _MIXED)
    if block == 1:
        return rows
    mixed = multiply(rows.reshape(-1, block), _hadamard(block), None)
    return mixed.view(rows.shape)


@functools.cache
def _hadamard(size: int) -> Tensor:
    """Symmetric and orthogonal, (size, size), of entries ± size**-0.5."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, I) as codes in oneDNN's layout, and the scales (O,) that they are times."""
    weight = _spread(weight.detach())
    scale = weight.abs().amax(dim=1).div_(_MIDDLE - 1).clamp_min_(torch.finfo(weight.dtype).tiny)
    codes = (weight / scale[:, None]).round_().to(torch.int8)
    return torch.ops.onednn.qlinear_prepack(codes, None), scale


def multiply_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I), float32, by what ``pack_int8`` returned: (..., O), float32.

    Tokens are rounded to 8 bits, each by a scale of its own.
    """
    rows = _spread(x.flatten(0, -2))
    # torch.aminmax takes ten times as long
    token = rows.abs().amax(dim=1, keepdim=True)
    token = token.div_(_MIDDLE - 1).clamp_min_(torch.finfo(x.dtype).tiny)
    # truncated, a half more is rounded
    codes = torch.addcmul(x.new_tensor(_MIDDLE + 0.5), rows, token.reciprocal()).to(torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, _MIDDLE, packed, scale, torch.zeros_like(scale, dtype=torch.int64),
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    y = y.mul_(token) if bias is None else torch.addcmul(bias, y, token, out=y)
    return y.unflatten(0, x.shape[:-1])
