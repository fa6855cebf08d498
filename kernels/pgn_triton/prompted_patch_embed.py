"""Triton kernels of pgn_fast.ops.prompted_patch_embed: an implicit GEMM and two writers of rows.

Every kernel writes its rows of the one result (B, L, D), L = S + N + P; nothing is concatenated.

    patches  a GEMM whose left operand is never formed: row m is patch n of image b, column k one of
             its C * p_h * p_w pixels, read where it lies in the image
    prompts  mixed by the kernel of mix_prompts, or copied
    prefix   copied to every image

Normalization happens in the weights. With a_c and s_c the factor and the shift of channel c, and
z = 128 for uint8 pixels (then x - z is exact in bfloat16), else 0:

    sum_k (a_c x_k + s_c) w_k = a * sum_k (x_k - z) (a_c / a) w_k + sum_k (a_c z + s_c) w_k

One small kernel writes the folded weights and the last sum, which joins the bias. The factor a of
the channel with the largest one stays outside, so that float16 weights stay in its normal range.
Pixels in channels_last order meet weights in that order: the same kernel permutes them.
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
    tile,
)
from .mix_prompts import mix_prompts_into

PATCH_CONFIGS = {
    "half": [
        tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, warps=4, stages=3),
        tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, warps=8, stages=3),
        tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, warps=4, stages=3),
    ],
    "float": [tile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, warps=4, stages=2)],
}
ROW_CONFIG = tile(BLOCK_D=1024, warps=4, stages=1)
FOLD_CONFIG = tile(BLOCK_K=256, warps=4, stages=1)


@triton.jit
def _fold_kernel(
    weight_ptr,  # (D, C, AREA)
    bias_ptr,  # (D,) or None
    folded_ptr,  # (D, C * AREA), columns in the order of the pixels in memory
    offset_ptr,  # (D,) float32
    C: tl.constexpr,
    AREA: tl.constexpr,
    FACTORS: tl.constexpr,  # a_c / a
    SHIFTS: tl.constexpr,  # a_c z + s_c
    CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64)
    offset = 0.0
    for c in tl.static_range(C):
        total = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, AREA, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = tl.load(weight_ptr + (d * C + c) * AREA + k, mask=k < AREA, other=0.0)
            w = w.to(tl.float32)
            total += w
            column = k * C + c if CHANNELS_LAST else c * AREA + k
            tl.store(
                folded_ptr + d * C * AREA + column,
                cast(w * FACTORS[c], folded_ptr.dtype.element_ty),
                mask=k < AREA,
            )
        offset += tl.sum(total, axis=0) * SHIFTS[c]
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + d).to(tl.float32)
    tl.store(offset_ptr + d, offset)


@triton.jit
def _patch_kernel(
    images_ptr,  # (B, C, H, W) or channels_last, uint8 or the dtype of the weight
    weight_ptr,  # (D, K), K = C * PATCH_H * PATCH_W in the order of the pixels in memory
    offset_ptr,  # (D,) or None
    pos_ptr,  # (N, D) or None
    out_ptr,  # (B, L, D): rows first_row to first_row + N of every image are written
    M,
    N,
    D,
    L,
    first_row,
    columns,  # patches in a row of the image
    factor,
    image_b,
    image_c,
    image_y,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PATCH_H * PATCH_W
    # column blocks of the same patches are neighbors: the pixels are then read once from memory
    d_blocks = tl.cdiv(D, BLOCK_N)
    _, inside, b, n = rows_of(tl.program_id(0) // d_blocks, M, N, BLOCK_M)
    d = (tl.program_id(0) % d_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = b * image_b + (n // columns).to(tl.int64) * PATCH_H * image_y
    pixel += (n % columns) * (PATCH_W * C if CHANNELS_LAST else PATCH_W)
    n = n.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if CHANNELS_LAST:
            within = (k // (PATCH_W * C)).to(tl.int64) * image_y + k % (PATCH_W * C)
        else:
            y, c = (k // PATCH_W) % PATCH_H, k // (PATCH_W * PATCH_H)
            within = c.to(tl.int64) * image_c + y * image_y + k % PATCH_W
        pixels = tl.load(
            images_ptr + pixel[:, None] + within[None, :], mask=k[None, :] < K, other=0
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            weight_ptr + d.to(tl.int64)[None, :] * K + k[:, None],
            mask=(k[:, None] < K) & (d[None, :] < D),
            other=0.0,
        )  # [BLOCK_K, BLOCK_N], zero past K whatever the pixels are
        if images_ptr.dtype.element_ty == tl.uint8:
            pixels = cast(pixels.to(tl.float32) - 128.0, w.dtype)
        acc = dot(pixels, w, acc, PRECISION)

    acc = acc * factor
    if offset_ptr is not None:
        acc += tl.load(offset_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        acc += tl.load(pos_ptr + n[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0).to(
            tl.float32
        )
    tl.store(
        out_ptr + (b * L + first_row + n)[:, None] * D + d[None, :],
        cast(acc, out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )


@triton.jit
def _rows_kernel(
    prefix_ptr,  # (S, D)
    prompts_ptr,  # (B, P, D), prompts_b = 0 where shared
    out_ptr,  # (B, L, D)
    S,
    P,
    D,
    L,
    first_prompt,  # row of the first prompt
    prompts_b,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(0) // (S + P)).to(tl.int64)
    s = tl.program_id(0) % (S + P)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = prefix_ptr + s * D
    row = s
    if s >= S:
        source = prompts_ptr + b * prompts_b + (s - S) * D
        row = first_prompt + s - S
    tl.store(out_ptr + (b * L + row) * D + d, tl.load(source + d, mask=d < D), mask=d < D)


@on_their_device
def prompted_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor,
    logits: Tensor | None,
    token_library: Tensor | None,
    prompts: Tensor | None,
    scale: list[float],
    shift: list[float],
    activation: str,
    position: str,
) -> Tensor:
    """Launch. The inputs are checked and dense: see pgn_fast.ops.prompted_patch_embed."""
    (B, _, height, width), (D, _, patch_h, patch_w) = images.shape, weight.shape
    S, N = prefix.shape[0], (height // patch_h) * (width // patch_w)
    P = logits.shape[1] if logits is not None else 0 if prompts is None else prompts.shape[-2]
    tokens = weight.new_empty(B, S + N + P, D)
    if tokens.numel() == 0:
        return tokens
    first_patch, first_prompt = (S, S + N) if position == "append" else (S + P, S)
    if N:
        _embed_patches(tokens, first_patch, images, weight, bias, pos_embed, scale, shift)
    if logits is not None and token_library is not None:
        rows = tokens[:, first_prompt : first_prompt + P]
        mix_prompts_into(rows, logits, token_library, activation)
    copied = P if prompts is not None else 0
    if S + copied:
        grid = (B * (S + copied), triton.cdiv(D, ROW_CONFIG.blocks["BLOCK_D"]))
        _rows_kernel[grid](
            *(prefix, prompts if copied else prefix, tokens),
            *(S, copied, D, S + N + P, first_prompt),
            P * D if copied and prompts.ndim == 3 else 0,
            **ROW_CONFIG.options(),
        )
    return tokens


def _embed_patches(
    tokens: Tensor,
    first_row: int,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    scale: list[float],
    shift: list[float],
) -> None:
    """Write the patch rows of ``tokens``, beginning with ``first_row`` of every image."""
    (B, C, _, width), (D, _, patch_h, patch_w) = images.shape, weight.shape
    columns = width // patch_w
    N = (images.shape[2] // patch_h) * columns
    channels_last = images.stride(1) == 1 and C > 1
    folded, offset, factor = weight, bias, 1.0
    if scale or channels_last or images.dtype == torch.uint8:
        scale, shift = scale or [1.0] * C, shift or [0.0] * C
        factor, zero = max(scale, key=abs), 128.0 if images.dtype == torch.uint8 else 0.0
        folded, offset = torch.empty_like(weight), weight.new_empty(D, dtype=torch.float32)
        _fold_kernel[(D,)](
            *(weight, bias, folded, offset),
            C=C,
            AREA=patch_h * patch_w,
            FACTORS=tuple(a / factor for a in scale),
            SHIFTS=tuple(a * zero + s for a, s in zip(scale, shift, strict=True)),
            CHANNELS_LAST=channels_last,
            **FOLD_CONFIG.options(),
        )

    def launch(config: Tile) -> None:
        blocks = config.blocks
        tiles = triton.cdiv(B * N, blocks["BLOCK_M"]) * triton.cdiv(D, blocks["BLOCK_N"])
        _patch_kernel[(tiles,)](
            *(images, folded, offset, pos_embed, tokens, B * N, N, D, tokens.shape[1]),
            *(first_row, columns, factor, *images.stride()[:3]),
            C=C,
            PATCH_H=patch_h,
            PATCH_W=patch_w,
            CHANNELS_LAST=channels_last,
            PRECISION=dot_precision(),
            **config.options(),
        )

    kind = "float" if weight.dtype == torch.float32 else "half"
    key = ("patch", images.dtype, weight.dtype, bucket(B * N), D, C, patch_h, channels_last)
    launch_tuned(PATCH_CONFIGS[kind], key, weight.device, launch)
