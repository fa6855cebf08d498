"""Triton kernel of pgn_fast.ops.prompt_attention: flash attention over two sources of keys.

    out[b, h] = softmax(scale * q[b, h] @ [k[b, h]; prompt_k[h]]^T) @ [v[b, h]; prompt_v[h]]

Q queries and T keys of an image, P of the prompts. The keys form one sequence, an image's own
first, then the prompts: a tile takes each row from where it lies, so no key is ever copied, and
197 + 50 keys fill four tiles of 64 and not five. Online softmax in base 2; ``lse`` is natural.
In the ragged form the prompts of an image are a range of the rows that all images share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    LOG2_E,
    aligned,
    batch_strides,
    empty_heads_last,
    kind_of,
    load_rows,
    sizes_of,
)
from ._common import Tile, bucket, cast, dot, launch_tuned, on_their_device, tile
from .prompt_attention_backward import KEY_CONFIGS, QUERY_CONFIGS, prompt_attention_backward

__all__ = [
    "FORWARD_CONFIGS",
    "KEY_CONFIGS",
    "QUERY_CONFIGS",
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_ragged",
]

# by kind of problem: see _attention.kind_of
FORWARD_CONFIGS = {
    "half": [
        tile(BLOCK_Q=64, BLOCK_T=64, warps=4, stages=2),
        tile(BLOCK_Q=128, BLOCK_T=64, warps=8, stages=2),
        tile(BLOCK_Q=64, BLOCK_T=32, warps=4, stages=3),
    ],
    "wide": [
        tile(BLOCK_Q=64, BLOCK_T=64, warps=4, stages=2),
        tile(BLOCK_Q=128, BLOCK_T=64, warps=8, stages=2),
    ],
    "one-query": [
        tile(BLOCK_Q=16, BLOCK_T=64, warps=2, stages=2),
        tile(BLOCK_Q=16, BLOCK_T=128, warps=4, stages=2),
    ],
    "float": [tile(BLOCK_Q=32, BLOCK_T=32, warps=8, stages=2)],
}


@triton.jit
def _forward_kernel(
    q_ptr,  # (B, H, Q, HEAD); here and below the last stride is 1, others are free
    k_ptr,  # (B, H, T, HEAD)
    v_ptr,  # (B, H, T, HEAD)
    prompt_k_ptr,  # (B, H, P, HEAD); stride 0 over the batch where shared
    prompt_v_ptr,  # (B, H, P, HEAD)
    out_ptr,  # (B, H, Q, HEAD)
    lse_ptr,  # (B, H, Q) float32
    ranges_ptr,  # (B, 2) int64, the rows of the prompts that an image sees; None: all
    H,
    Q,
    T,
    P,
    scale,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    prompt_k_b,
    prompt_k_h,
    prompt_k_t,
    prompt_v_b,
    prompt_v_h,
    prompt_v_t,
    out_b,
    out_h,
    out_t,
    ALIGNED: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # query blocks of one image and head are neighbors: its keys are then read from the L2 cache
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    image_head = tl.program_id(0) // q_blocks  # divided in 32 bits
    b, h = (image_head // H).to(tl.int64), (image_head % H).to(tl.int64)
    bh = image_head.to(tl.int64)
    i = (tl.program_id(0) % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows, d = i.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i[:, None] < Q) & (d < HEAD)
    q = tl.load(q_ptr + b * q_b + h * q_h + rows * q_t + d, mask=inside, other=0.0)

    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    prompt_k_ptr += b * prompt_k_b + h * prompt_k_h
    prompt_v_ptr += b * prompt_v_b + h * prompt_v_h
    if ranges_ptr is not None:
        begin = tl.load(ranges_ptr + 2 * b)
        prompt_k_ptr += begin * prompt_k_t
        prompt_v_ptr += begin * prompt_v_t
        P = (tl.load(ranges_ptr + 2 * b + 1) - begin).to(tl.int32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, T + P, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        k = load_rows(k_ptr, prompt_k_ptr, j, T, P, k_t, prompt_k_t, d, HEAD, ALIGNED)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_T], tl.float32), PRECISION)
        scores = tl.where(j[None, :] < T + P, scores * (scale * LOG2_E), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])  # [BLOCK_Q, BLOCK_T]
        rescale = tl.exp2(largest - new_largest)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        largest = new_largest
        v = load_rows(v_ptr, prompt_v_ptr, j, T, P, v_t, prompt_v_t, d, HEAD, ALIGNED)
        acc = dot(cast(weights, v.dtype), v, acc, PRECISION)

    out = cast(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + b * out_b + h * out_h + rows * out_t + d, out, mask=inside)
    tl.store(lse_ptr + bh * Q + i, (largest + tl.log2(total)) / LOG2_E, mask=i < Q)


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch. The inputs are checked, see pgn_fast.ops.prompt_attention; their last stride is 1."""
    return _forward(q, k, v, prompt_k, prompt_v, None, scale)


def prompt_attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    ranges: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch. The same with ranges (B, 2) of prompts (H, P, HEAD), contiguous int64."""
    return _forward(q, k, v, prompt_k, prompt_v, ranges, scale)


@on_their_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    ranges: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (B, H, Q, HEAD), T, P = q.shape, k.shape[2], prompt_k.shape[-2]
    out = empty_heads_last(q)
    lse = q.new_empty(B, H, Q, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    kind, sizes = kind_of(q), sizes_of(q)
    prompt_strides = (*batch_strides(prompt_k), *batch_strides(prompt_v))

    def launch(config: Tile) -> None:
        grid = (B * H * triton.cdiv(Q, config.blocks["BLOCK_Q"]),)
        _forward_kernel[grid](
            *(q, k, v, prompt_k, prompt_v, out, lse, ranges, H, Q, T, P, scale),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *prompt_strides,
            *out.stride()[:3],
            ALIGNED=aligned(k, v, prompt_k, prompt_v),
            **sizes,
            **config.options(),
        )

    name = "prompt_attention" if ranges is None else "prompt_attention_ragged"
    key = (name, q.dtype, bucket(B * H), bucket(Q), bucket(T + P), HEAD)
    launch_tuned(FORWARD_CONFIGS[kind], key, q.device, launch)
    return out, lse
