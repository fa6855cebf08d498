"""What the Triton kernels of prompt_attention share, forward and backward."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor, float32

from ._common import bucket, dot_precision

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(
    own_ptr, prompt_ptr, j, T, P, own_t, prompt_t, d, HEAD: tl.constexpr, ALIGNED: tl.constexpr
):
    """Rows j of [own; prompts], zero past the last: [BLOCK_T, BLOCK_D]."""
    row = j.to(tl.int64)
    pointers = tl.where(j < T, own_ptr + row * own_t, prompt_ptr + (row - T) * prompt_t)
    if ALIGNED:  # the compiler cannot see it through the choice, and would load 2 bytes at a time
        pointers = tl.multiple_of(pointers, 16)
    return tl.load(pointers[:, None] + d, mask=(j[:, None] < T + P) & (d < HEAD), other=0.0)


def kind_of(q: Tensor) -> str:
    """Which tiles suit: small ones for float32, 16 rows for one query, fewer registers a thread
    where a head is wider than 64."""
    if q.dtype == float32 or q.shape[-1] > 128:
        return "float"
    if q.shape[2] <= 16:
        return "one-query"
    return "half" if q.shape[-1] <= 64 else "wide"


def sizes_of(q: Tensor) -> dict[str, int | str]:
    """Head width, the power of two that holds it (tl.dot takes no less than 16), precision."""
    HEAD = q.shape[-1]
    return {"HEAD": HEAD, "BLOCK_D": max(16, bucket(HEAD)), "PRECISION": dot_precision()}


def aligned(*tensors: Tensor) -> bool:
    """Every row of every tensor begins at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(s * x.itemsize % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def batch_strides(x: Tensor) -> tuple[int, ...]:
    """Strides over image, head and row; 0 over the image for what the batch shares."""
    return (0,) * (4 - x.ndim) + x.stride()[:-1]


def empty_heads_last(x: Tensor) -> Tensor:
    """(B, H, rows, HEAD) as the transpose of a contiguous (B, rows, H, HEAD)."""
    B, H, rows, HEAD = x.shape
    return x.new_empty(B, rows, H, HEAD).transpose(1, 2)
