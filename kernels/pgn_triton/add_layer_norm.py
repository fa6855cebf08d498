"""Triton kernels of the frozen blocks' residual addition and LayerNorm, without the affine part.

    total = x + y;   normed = (total - mean(total)) * rstd,   rstd = 1 / sqrt(var(total) + eps)
    grad  = grad_total + rstd * (g - mean(g) - normed * mean(g * normed)),   g = grad_normed

x and y get the same gradient. Scale and shift of the LayerNorm belong in the next frozen Linear
(folded in float64, rounded once), so neither they nor their gradients cost a pass over memory:
four passes forward, four backward, all that is kept is ``normed`` and one number a row.

A program owns one row, all D columns of it in registers. Statistics are taken from the sum as it
is rounded to the tensors' dtype: forward and backward then belong to the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Tile, bucket, cast, on_their_device, tile


@triton.jit
def _forward_kernel(
    x_ptr,  # (R, D)
    y_ptr,  # (R, D) or None
    total_ptr,  # (R, D), written if there is a y
    normed_ptr,  # (R, D)
    rstd_ptr,  # (R,) float32
    D,
    eps,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.load(x_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
        rounded = cast(total + y, total_ptr.dtype.element_ty)
        tl.store(total_ptr + r * D + d, rounded, mask=d < D)
        total = rounded.to(tl.float32)
    centered = tl.where(d < D, total - tl.sum(total, axis=0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / D + eps)
    normed = cast(centered * rstd, normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + r * D + d, normed, mask=d < D)
    tl.store(rstd_ptr + r, rstd)


@triton.jit
def _backward_kernel(
    grad_normed_ptr,  # (R, D)
    grad_total_ptr,  # (R, D) or None
    normed_ptr,  # (R, D)
    rstd_ptr,  # (R,) float32
    grad_ptr,  # (R, D), written
    D,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(grad_normed_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
    normed = tl.load(normed_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
    grad = g - tl.sum(g, axis=0) / D - normed * (tl.sum(g * normed, axis=0) / D)
    grad *= tl.load(rstd_ptr + r)
    if grad_total_ptr is not None:
        grad += tl.load(grad_total_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(grad_ptr + r * D + d, cast(grad, grad_ptr.dtype.element_ty), mask=d < D)


def _row_config(D: int) -> Tile:
    """One warp holds a row of up to 1024 (with more, those past the last column have nothing to
    do); wider rows take as many as keep them in registers."""
    block = bucket(D)
    warps = 1 if block <= 1024 else 4 if block <= 4096 else 16
    return tile(BLOCK_D=block, warps=warps, stages=1)


@on_their_device
def add_layer_norm(x: Tensor, y: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch. x and y (..., D) are contiguous and of one shape, dtype and device; D <= 16384.

    Returns:
        total (..., D), which is ``x`` itself where ``y`` is None; normed (..., D), both in the
        dtype of ``x``; rstd (...), float32.
    """
    D = x.shape[-1]
    total = x if y is None else torch.empty_like(x)
    normed, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel():
        _forward_kernel[(rstd.numel(),)](
            *(x, y, total, normed, rstd, D, eps), **_row_config(D).options()
        )
    return total, normed, rstd


@on_their_device
def add_layer_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, normed: Tensor, rstd: Tensor
) -> Tensor:
    """Launch. The gradient of x, and of y: (..., D), in the dtype of ``normed``.

    ``grad_total`` is None where nothing but the LayerNorm reads the sum. All are contiguous.
    """
    grad, D = torch.empty_like(normed), normed.shape[-1]
    if rstd.numel():
        _backward_kernel[(rstd.numel(),)](
            *(grad_normed, grad_total, normed, rstd, grad, D),
            **_row_config(D).options(),
        )
    return grad
