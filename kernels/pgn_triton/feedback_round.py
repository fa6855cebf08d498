"""Triton kernel of pgn_fast.ops.feedback_round:

    w[r, j] = levels[r, order[j]] - sum_{i<j} feedback[j, i] * (w[r, i] - q[r, i]),  q = round(w)

n pixels, R prompts. Pixels depend on each other one by one, prompts do not: a program owns BLOCK_R
prompts and loops over the pixels, BLOCK_J at a time. What all earlier pixels pass on is a GEMM
with their errors, kept in global memory (they stay in the L2 cache); only the BLOCK_J
pixels of a panel among themselves go one after the other. n dependent steps make it latency bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import dot, on_their_device, tile

# float32 without tensor cores; wider panels make the sequential part longer
CONFIG = tile(BLOCK_R=16, BLOCK_J=32, BLOCK_I=32, warps=4, stages=2)


@triton.jit
def _feedback_round_kernel(
    levels_ptr,  # (R, n)
    feedback_ptr,  # (n, n)
    order_ptr,  # (n,) int64
    errors_ptr,  # (R, n) float32, in processing order
    rounded_ptr,  # (R, n) uint8
    R,
    n,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = r[:, None] < R
    here = tl.arange(0, BLOCK_J)
    for start in range(0, n, BLOCK_J):
        j = start + here
        inside = rows & (j[None, :] < n)
        pixel = tl.load(order_ptr + j, mask=j < n, other=0)
        w = tl.load(levels_ptr + r[:, None] * n + pixel[None, :], mask=inside, other=0.0)
        passed = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
        for before in range(0, start, BLOCK_I):
            i = before + tl.arange(0, BLOCK_I)
            earlier = i < start
            errors = tl.load(
                errors_ptr + r[:, None] * n + i[None, :], mask=rows & earlier[None, :], other=0.0
            )
            shares = tl.load(
                feedback_ptr + j[None, :].to(tl.int64) * n + i[:, None],
                mask=earlier[:, None] & (j[None, :] < n),
                other=0.0,
            )
            # ieee: TF32 would put its own error on every pixel
            passed = dot(errors, shares, passed, "ieee")
        w -= passed

        panel = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)  # errors of this panel's pixels
        for step in range(BLOCK_J):
            now = here[None, :] == step
            value = tl.sum(tl.where(now, w, 0.0), axis=1)  # [BLOCK_R]
            level = tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5)
            error = value - level
            panel = tl.where(now, error[:, None], panel)
            w = tl.where(now, level[:, None], w)
            later = (here > step) & (j < n)
            share = tl.load(feedback_ptr + j.to(tl.int64) * n + start + step, mask=later, other=0.0)
            w -= error[:, None] * share[None, :]
        tl.store(errors_ptr + r[:, None] * n + j[None, :], panel, mask=inside)
        tl.store(rounded_ptr + r[:, None] * n + pixel[None, :], w.to(tl.uint8), mask=inside)
        # the next panel's loads read what other threads of this program have just written
        tl.debug_barrier()


@on_their_device
def feedback_round(levels: Tensor, feedback: Tensor, order: Tensor) -> Tensor:
    """Launch. The inputs are checked: see pgn_fast.ops.feedback_round; levels are float32."""
    levels, feedback, order = levels.contiguous(), feedback.contiguous(), order.contiguous()
    R, n = levels.shape
    rounded = torch.empty_like(levels, dtype=torch.uint8)
    if rounded.numel():
        _feedback_round_kernel[(triton.cdiv(R, CONFIG.blocks["BLOCK_R"]),)](
            *(levels, feedback, order, torch.empty_like(levels), rounded, R, n), **CONFIG.options()
        )
    return rounded
