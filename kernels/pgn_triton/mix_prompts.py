"""Triton kernels of pgn_fast.ops.mix_prompts:  prompts = mixture(logits) @ token_library.

R = B * P rows, one a prompt token. Forward: a program owns BLOCK_R rows and BLOCK_D columns and
loops over the token library once, with an online softmax, so that K coefficients never exist
together. Backward, with w the coefficients and g the gradient of the prompts:

    grad_library = w^T g                       sums over rows: fixed row ranges, fixed order
    grad_logits  = w * (g T^T - <g, prompt>)   softmax;  w * (1 - w) * g T^T for the sigmoid

The coefficients are recomputed from each row's log-sum-exp. <g, prompt> and the log-sum-exp come
from a second loop over the library: it costs one more GEMM, and saves K columns of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Tile,
    bucket,
    cast,
    dot,
    dot_precision,
    launch_tuned,
    on_their_device,
    rows_of,
    split_rows,
    sum_splits,
    tile,
    unit_columns,
)

# float32 is multiplied without tensor cores, operands in registers: its tiles must be small
FORWARD_CONFIGS = {
    "half": [
        tile(BLOCK_R=16, BLOCK_K=64, BLOCK_D=128, warps=4, stages=3),
        tile(BLOCK_R=64, BLOCK_K=64, BLOCK_D=128, warps=4, stages=3),
        tile(BLOCK_R=16, BLOCK_K=64, BLOCK_D=64, warps=4, stages=3),
    ],
    "float": [tile(BLOCK_R=16, BLOCK_K=64, BLOCK_D=64, warps=4, stages=2)],
}
LOGITS_CONFIGS = {
    "half": [
        tile(BLOCK_R=32, BLOCK_K=64, BLOCK_D=64, warps=4, stages=3),
        tile(BLOCK_R=64, BLOCK_K=128, BLOCK_D=64, warps=4, stages=3),
    ],
    "float": [tile(BLOCK_R=32, BLOCK_K=64, BLOCK_D=32, warps=8, stages=2)],
}
# BLOCK_R cuts the sum over rows: one value a kind, so that tuning does not change its order
LIBRARY_CONFIGS = {
    "half": [
        tile(BLOCK_R=32, BLOCK_K=64, BLOCK_D=64, warps=4, stages=3),
        tile(BLOCK_R=32, BLOCK_K=64, BLOCK_D=128, warps=4, stages=3),
    ],
    "float": [tile(BLOCK_R=16, BLOCK_K=64, BLOCK_D=64, warps=8, stages=2)],
}


@triton.jit
def _mix_rows(
    logits_row,  # [BLOCK_R] offsets of the rows' logits
    logits_ptr,  # (B, P, K), last dimension contiguous
    library_ptr,  # (K, D)
    d,  # [BLOCK_D] columns
    K,
    D,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prompt rows and their log-sum-exp (zero for the sigmoid): [BLOCK_R, BLOCK_D], [BLOCK_R]."""
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    mixture = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # other=-inf gives library tokens past K the weight zero, softmax and sigmoid alike
        z = tl.load(
            logits_ptr + logits_row[:, None] + k[None, :],
            mask=k[None, :] < K,
            other=float("-inf"),
        ).to(tl.float32)  # [BLOCK_R, BLOCK_K]
        if SOFTMAX:
            new_largest = tl.maximum(largest, tl.max(z, axis=1))
            # rows that met nothing but -inf so far: -inf - -inf would be NaN
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp(z - shift[:, None])
            rescale = tl.exp(largest - shift)
            total = total * rescale + tl.sum(weights, axis=1)
            mixture = mixture * rescale[:, None]
            largest = new_largest
        else:
            weights = tl.sigmoid(z)
        tokens = tl.load(
            library_ptr + k.to(tl.int64)[:, None] * D + d[None, :],
            mask=(k[:, None] < K) & (d[None, :] < D),
            other=0.0,
        )  # [BLOCK_K, BLOCK_D]
        mixture = dot(cast(weights, tokens.dtype), tokens, mixture, PRECISION)
    if SOFTMAX:
        mixture = mixture / total[:, None]
        largest = largest + tl.log(total)
    return mixture, largest


@triton.jit
def _forward_kernel(
    logits_ptr,  # (B, P, K), last dimension contiguous
    library_ptr,  # (K, D)
    prompts_ptr,  # (B, P, D), last dimension contiguous
    R,
    P,
    K,
    D,
    logits_b,
    logits_p,
    prompts_b,
    prompts_p,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, inside, b, p = rows_of(tl.program_id(0), R, P, BLOCK_R)
    p = p.to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixture, _ = _mix_rows(
        b * logits_b + p * logits_p,
        logits_ptr,
        library_ptr,
        d,
        K,
        D,
        SOFTMAX,
        PRECISION,
        BLOCK_R,
        BLOCK_K,
        BLOCK_D,
    )
    tl.store(
        prompts_ptr + (b * prompts_b + p * prompts_p)[:, None] + d[None, :],
        cast(mixture, prompts_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )


@triton.jit
def _row_terms_kernel(
    logits_ptr,  # (B, P, K), last dimension contiguous
    library_ptr,  # (K, D)
    grad_ptr,  # (B, P, D), last dimension contiguous
    lse_ptr,  # (R,) float32
    inner_ptr,  # (D blocks, R) float32: shares of <g, prompt>
    R,
    P,
    K,
    D,
    logits_b,
    logits_p,
    grad_b,
    grad_p,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r, inside, b, p = rows_of(tl.program_id(0), R, P, BLOCK_R)
    p = p.to(tl.int64)
    d_block = tl.program_id(1)
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    mixture, lse = _mix_rows(
        b * logits_b + p * logits_p,
        logits_ptr,
        library_ptr,
        d,
        K,
        D,
        SOFTMAX,
        PRECISION,
        BLOCK_R,
        BLOCK_K,
        BLOCK_D,
    )
    g = tl.load(
        grad_ptr + (b * grad_b + p * grad_p)[:, None] + d[None, :],
        mask=d[None, :] < D,
        other=0.0,
    ).to(tl.float32)
    tl.store(inner_ptr + d_block.to(tl.int64) * R + r, tl.sum(mixture * g, axis=1), mask=inside)
    if d_block == 0:
        tl.store(lse_ptr + r, lse, mask=inside)


@triton.jit
def _grad_logits_kernel(
    logits_ptr,  # (B, P, K), last dimension contiguous
    library_ptr,  # (K, D)
    grad_ptr,  # (B, P, D), last dimension contiguous
    lse_ptr,  # (R,) float32
    inner_ptr,  # (INNERS, R) float32
    grad_logits_ptr,  # (R, K)
    R,
    P,
    K,
    D,
    INNERS,
    logits_b,
    logits_p,
    grad_b,
    grad_p,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r, inside, b, p = rows_of(tl.program_id(0), R, P, BLOCK_R)
    p = p.to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad_row = (b * grad_b + p * grad_p)[:, None]
    grad_weights = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad_ptr + grad_row + d[None, :], mask=d[None, :] < D, other=0.0)
        tokens = tl.load(
            library_ptr + k.to(tl.int64)[None, :] * D + d[:, None],
            mask=(k[None, :] < K) & (d[:, None] < D),
            other=0.0,
        )  # [BLOCK_D, BLOCK_K]
        grad_weights = dot(g, tokens, grad_weights, PRECISION)
    z = tl.load(
        logits_ptr + (b * logits_b + p * logits_p)[:, None] + k[None, :],
        mask=k[None, :] < K,
        other=float("-inf"),
    ).to(tl.float32)
    if SOFTMAX:
        inner = tl.zeros([BLOCK_R], tl.float32)
        for _ in range(INNERS):
            inner += tl.load(inner_ptr + r, mask=inside, other=0.0)
            inner_ptr += R
        weights = tl.exp(z - tl.load(lse_ptr + r, mask=inside, other=0.0)[:, None])
        grad_z = weights * (grad_weights - inner[:, None])
    else:
        weights = tl.sigmoid(z)
        grad_z = weights * (1.0 - weights) * grad_weights
    tl.store(
        grad_logits_ptr + r[:, None] * K + k[None, :],
        cast(grad_z, grad_logits_ptr.dtype.element_ty),
        mask=inside[:, None] & (k[None, :] < K),
    )


@triton.jit
def _grad_library_kernel(
    logits_ptr,  # (B, P, K), last dimension contiguous
    grad_ptr,  # (B, P, D), last dimension contiguous
    lse_ptr,  # (R,) float32
    partial_ptr,  # (splits, K, D) float32
    R,
    P,
    K,
    D,
    blocks_per_split,
    logits_b,
    logits_p,
    grad_b,
    grad_p,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    first = split * blocks_per_split
    end = tl.minimum(first + blocks_per_split, (R - 1) // BLOCK_R + 1)
    grad_library = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for block in range(first, end):
        r, inside, b, p = rows_of(block, R, P, BLOCK_R)
        p = p.to(tl.int64)
        z = tl.load(
            logits_ptr + (b * logits_b + p * logits_p)[None, :] + k[:, None],
            mask=inside[None, :] & (k[:, None] < K),
            other=float("-inf"),
        ).to(tl.float32)  # [BLOCK_K, BLOCK_R]
        if SOFTMAX:
            weights = tl.exp(z - tl.load(lse_ptr + r, mask=inside, other=0.0)[None, :])
        else:
            weights = tl.sigmoid(z)
        g = tl.load(
            grad_ptr + (b * grad_b + p * grad_p)[:, None] + d[None, :],
            mask=inside[:, None] & (d[None, :] < D),
            other=0.0,
        )  # [BLOCK_R, BLOCK_D]
        grad_library = dot(cast(weights, g.dtype), g, grad_library, PRECISION)
    tl.store(
        partial_ptr + (split.to(tl.int64) * K + k[:, None]) * D + d[None, :],
        grad_library,
        mask=(k[:, None] < K) & (d[None, :] < D),
    )


@on_their_device
def mix_prompts(logits: Tensor, token_library: Tensor, activation: str) -> Tensor:
    """Launch. The inputs are checked: see pgn_fast.ops.mix_prompts."""
    B, P, _ = logits.shape
    prompts = token_library.new_empty(B, P, token_library.shape[1])
    mix_prompts_into(prompts, logits, token_library, activation)
    return prompts


def mix_prompts_into(
    prompts: Tensor, logits: Tensor, token_library: Tensor, activation: str
) -> None:
    """Write the prompt tokens into ``prompts`` (B, P, D): any rows of a larger buffer."""
    (B, P, K), D = logits.shape, token_library.shape[1]
    if prompts.numel() == 0:
        return
    logits, library, R = unit_columns(logits), token_library.contiguous(), B * P

    def launch(config: Tile) -> None:
        blocks = config.blocks
        grid = (triton.cdiv(R, blocks["BLOCK_R"]), triton.cdiv(D, blocks["BLOCK_D"]))
        _forward_kernel[grid](
            logits,
            library,
            prompts,
            R,
            P,
            K,
            D,
            *logits.stride()[:2],
            *prompts.stride()[:2],
            SOFTMAX=activation == "softmax",
            PRECISION=dot_precision(),
            **config.options(),
        )

    key = ("mix_prompts", logits.dtype, bucket(R), bucket(K), D)
    launch_tuned(FORWARD_CONFIGS[_kind(logits)], key, logits.device, launch)


@on_their_device
def mix_prompts_backward(
    grad_prompts: Tensor, logits: Tensor, token_library: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Launch. The inputs are checked: see pgn_fast.ops.mix_prompts.

    ``grad_library`` is summed in a fixed order: the same inputs give the same bits.
    """
    (B, P, K), D = logits.shape, token_library.shape[1]
    if grad_prompts.numel() == 0:
        return torch.zeros_like(logits), torch.zeros_like(token_library)
    logits, library, R = unit_columns(logits), token_library.contiguous(), B * P
    grad = unit_columns(grad_prompts)
    strides = (*logits.stride()[:2], *grad.stride()[:2])
    flags = {"SOFTMAX": activation == "softmax", "PRECISION": dot_precision()}
    key = (logits.dtype, bucket(R), bucket(K), D)

    # the first walk's tile is not tuned: `inner` has one share for each of its column blocks
    terms = FORWARD_CONFIGS[_kind(logits)][0]
    inners = triton.cdiv(D, terms.blocks["BLOCK_D"])
    lse = logits.new_empty(R, dtype=torch.float32)
    inner = logits.new_empty(inners, R, dtype=torch.float32)
    if flags["SOFTMAX"]:
        _row_terms_kernel[(triton.cdiv(R, terms.blocks["BLOCK_R"]), inners)](
            logits, library, grad, lse, inner, R, P, K, D, *strides, **flags, **terms.options()
        )

    grad_logits = logits.new_empty(B, P, K)

    def launch_logits(config: Tile) -> None:
        blocks = config.blocks
        grid = (triton.cdiv(R, blocks["BLOCK_R"]), triton.cdiv(K, blocks["BLOCK_K"]))
        _grad_logits_kernel[grid](
            logits,
            library,
            grad,
            lse,
            inner,
            grad_logits,
            R,
            P,
            K,
            D,
            inners,
            *strides,
            **flags,
            **config.options(),
        )

    launch_tuned(LOGITS_CONFIGS[_kind(logits)], ("grad_logits", *key), logits.device, launch_logits)

    blocks = LIBRARY_CONFIGS[_kind(logits)][0].blocks
    tiles = triton.cdiv(K, blocks["BLOCK_K"]) * triton.cdiv(D, blocks["BLOCK_D"])
    splits, rows_per_split = split_rows(R, blocks["BLOCK_R"], tiles)
    partial = library.new_empty(splits, K, D, dtype=torch.float32)

    def launch_library(config: Tile) -> None:
        blocks = config.blocks
        grid = (triton.cdiv(K, blocks["BLOCK_K"]), triton.cdiv(D, blocks["BLOCK_D"]), splits)
        _grad_library_kernel[grid](
            logits,
            grad,
            lse,
            partial,
            R,
            P,
            K,
            D,
            rows_per_split // blocks["BLOCK_R"],
            *strides,
            **flags,
            **config.options(),
        )

    launch_tuned(
        LIBRARY_CONFIGS[_kind(logits)], ("grad_library", *key), logits.device, launch_library
    )
    return grad_logits, sum_splits(partial).to(token_library.dtype)


def _kind(x: Tensor) -> str:
    return "float" if x.dtype == torch.float32 else "half"
