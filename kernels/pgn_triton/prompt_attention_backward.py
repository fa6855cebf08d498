"""Triton kernels of the backward of pgn_fast.ops.prompt_attention.

With w the weights and delta = <grad_out, out> (Dao, arXiv:2307.08691, section 3.1.2):

    grad_s = w * (grad_out v^T - delta)
    grad_q = scale * grad_s k;   grad_k = scale * grad_s^T q;   grad_v = w^T grad_out

One kernel loops over the keys for the gradient of the queries, one over the queries for those
of keys and values. To a shared prompt it makes no difference whose query it meets: the batch is
one sequence of B * Q queries, cut into fixed ranges, and the shares are added in a fixed order.
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
from ._common import (
    Tile,
    bucket,
    cast,
    dot,
    launch_tuned,
    on_their_device,
    split_rows,
    sum_splits,
    tile,
)

# by kind of problem: see _attention.kind_of
QUERY_CONFIGS = {
    "half": [
        tile(BLOCK_Q=64, BLOCK_T=64, warps=4, stages=2),
        tile(BLOCK_Q=128, BLOCK_T=64, warps=8, stages=2),
    ],
    "wide": [
        tile(BLOCK_Q=64, BLOCK_T=64, warps=8, stages=2),
        tile(BLOCK_Q=64, BLOCK_T=32, warps=4, stages=2),
    ],
    "one-query": [tile(BLOCK_Q=16, BLOCK_T=64, warps=4, stages=2)],
    "float": [tile(BLOCK_Q=32, BLOCK_T=32, warps=8, stages=2)],
}
# BLOCK_Q cuts the sum over queries: one value a kind, so that tuning does not change its order
KEY_CONFIGS = {
    "half": [
        tile(BLOCK_Q=64, BLOCK_T=64, warps=4, stages=2),
        tile(BLOCK_Q=64, BLOCK_T=128, warps=8, stages=2),
    ],
    "wide": [tile(BLOCK_Q=64, BLOCK_T=64, warps=8, stages=2)],
    "one-query": [tile(BLOCK_Q=16, BLOCK_T=64, warps=4, stages=2)],
    "float": [tile(BLOCK_Q=16, BLOCK_T=16, warps=8, stages=2)],
}


@triton.jit
def _grad_query_kernel(
    q_ptr,  # (B, H, Q, HEAD)
    k_ptr,  # (B, H, T, HEAD)
    v_ptr,  # (B, H, T, HEAD)
    prompt_k_ptr,  # (B, H, P, HEAD); stride 0 over the batch where shared
    prompt_v_ptr,  # (B, H, P, HEAD)
    out_ptr,  # (B, H, Q, HEAD)
    grad_out_ptr,  # (B, H, Q, HEAD)
    lse_ptr,  # (B, H, Q) float32
    delta_ptr,  # (B, H, Q) float32, written
    grad_q_ptr,  # (B, H, Q, HEAD), written if GRAD_Q
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
    grad_out_b,
    grad_out_h,
    grad_out_t,
    GRAD_Q: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    image_head = tl.program_id(0) // q_blocks  # divided in 32 bits
    b, h = (image_head // H).to(tl.int64), (image_head % H).to(tl.int64)
    bh = image_head.to(tl.int64)
    i = (tl.program_id(0) % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows, d = i.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i[:, None] < Q) & (d < HEAD)
    out_rows = b * out_b + h * out_h + rows * out_t + d  # grad_q is laid out as out is
    out = tl.load(out_ptr + out_rows, mask=inside, other=0.0)
    grad_out_ptr += b * grad_out_b + h * grad_out_h
    grad_out = tl.load(grad_out_ptr + rows * grad_out_t + d, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + bh * Q + i, delta, mask=i < Q)

    if GRAD_Q:
        q = tl.load(q_ptr + b * q_b + h * q_h + rows * q_t + d, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + bh * Q + i, mask=i < Q, other=0.0) * LOG2_E
        k_ptr += b * k_b + h * k_h
        v_ptr += b * v_b + h * v_h
        prompt_k_ptr += b * prompt_k_b + h * prompt_k_h
        prompt_v_ptr += b * prompt_v_b + h * prompt_v_h
        grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for start in range(0, T + P, BLOCK_T):
            j = start + tl.arange(0, BLOCK_T)
            zeros = tl.zeros([BLOCK_Q, BLOCK_T], tl.float32)
            k = load_rows(k_ptr, prompt_k_ptr, j, T, P, k_t, prompt_k_t, d, HEAD, ALIGNED)
            v = load_rows(v_ptr, prompt_v_ptr, j, T, P, v_t, prompt_v_t, d, HEAD, ALIGNED)
            scores = dot(q, tl.trans(k), zeros, PRECISION)
            weights = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            # keys past the last have score 0, whose weight overflows where all true scores are low
            weights = tl.where(j[None, :] < T + P, weights, 0.0)
            grad_s = weights * (dot(grad_out, tl.trans(v), zeros, PRECISION) - delta[:, None])
            grad_q = dot(cast(grad_s, k.dtype), k, grad_q, PRECISION)
        grad_q = cast(grad_q * scale, grad_q_ptr.dtype.element_ty)
        tl.store(grad_q_ptr + out_rows, grad_q, mask=inside)


@triton.jit
def _grad_key_kernel(
    q_ptr,  # (B, H, Q, HEAD)
    k_ptr,  # (parts, H, T, HEAD)
    v_ptr,  # (parts, H, T, HEAD)
    grad_out_ptr,  # (B, H, Q, HEAD)
    lse_ptr,  # (B, H, Q) float32
    delta_ptr,  # (B, H, Q) float32
    grad_k_ptr,  # (parts, H, T, HEAD)
    grad_v_ptr,  # (parts, H, T, HEAD), laid out as grad_k is
    H,
    Q,
    T,
    queries,  # B * Q
    queries_per_part,
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
    grad_out_b,
    grad_out_h,
    grad_out_t,
    grad_k_b,
    grad_k_h,
    grad_k_t,
    SHARED: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values of one part meet the part's range of the batch's B * Q queries.

    An image's own keys (or prompts of its own): part b, the queries of image b. Prompts shared by
    the batch: part s, range s of all queries, and k_b = v_b = 0.
    """
    t_blocks = tl.cdiv(T, BLOCK_T)
    part = (tl.program_id(0) // (t_blocks * H)).to(tl.int64)
    h = ((tl.program_id(0) // t_blocks) % H).to(tl.int64)
    j = (tl.program_id(0) % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows, d = j.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (j[:, None] < T) & (d < HEAD)
    k = tl.load(k_ptr + part * k_b + h * k_h + rows * k_t + d, mask=inside, other=0.0)
    v = tl.load(v_ptr + part * v_b + h * v_h + rows * v_t + d, mask=inside, other=0.0)

    # counted in 32 bits: the compiler has a function for each division of 64, and calls it
    first = (tl.program_id(0) // (t_blocks * H)) * queries_per_part
    end = tl.minimum(first + queries_per_part, queries)
    grad_k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        if SHARED:
            b, t = (i // Q).to(tl.int64), (i % Q).to(tl.int64)
        else:  # the part is the image
            b, t = part, (i - first).to(tl.int64)
        mask = (i[:, None] < end) & (d < HEAD)
        q = tl.load(q_ptr + (b * q_b + h * q_h + t * q_t)[:, None] + d, mask=mask, other=0.0)
        grad_out = tl.load(
            grad_out_ptr + (b * grad_out_b + h * grad_out_h + t * grad_out_t)[:, None] + d,
            mask=mask,
            other=0.0,
        )
        of_query = (b * H + h) * Q + t
        # other=inf: a query past the range gives every key the weight zero
        lse = tl.load(lse_ptr + of_query, mask=i < end, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + of_query, mask=i < end, other=0.0)
        zeros = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
        scores = dot(k, tl.trans(q), zeros, PRECISION)  # [BLOCK_T, BLOCK_Q]
        weights = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
        grad_v = dot(cast(weights, grad_out.dtype), grad_out, grad_v, PRECISION)
        grad_s = weights * (dot(v, tl.trans(grad_out), zeros, PRECISION) - delta[None, :])
        grad_k = dot(cast(grad_s, q.dtype), q, grad_k, PRECISION)

    offset = part * grad_k_b + h * grad_k_h + rows * grad_k_t + d
    tl.store(grad_k_ptr + offset, cast(grad_k * scale, grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + offset, cast(grad_v, grad_v_ptr.dtype.element_ty), mask=inside)


@on_their_device
def prompt_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_q: bool,
    grad_kv: bool,
    grad_prompts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch. The inputs are checked, see pgn_fast.ops.prompt_attention; their last stride is 1.

    What is not wanted comes back as an empty tensor. Gradients of shared prompts are summed in a
    fixed order: the same inputs give the same bits.
    """
    (B, H, Q, HEAD), T, P = q.shape, k.shape[2], prompt_k.shape[-2]
    nothing = q.new_empty(0)
    dq = empty_heads_last(q) if grad_q else nothing
    dk, dv = (empty_heads_last(k), empty_heads_last(v)) if grad_kv else (nothing, nothing)
    prompt_shape = prompt_k.shape if grad_prompts else (0,)
    if q.numel() == 0:
        zero = [g.zero_() for g in (dq, dk, dv)]
        return *zero, q.new_zeros(prompt_shape), q.new_zeros(prompt_shape)
    kind, sizes = kind_of(q), sizes_of(q)
    key = (q.dtype, bucket(B * H), bucket(Q), bucket(T + P), HEAD)
    delta = torch.empty_like(lse)

    def launch_query(config: Tile) -> None:
        grid = (B * H * triton.cdiv(Q, config.blocks["BLOCK_Q"]),)
        _grad_query_kernel[grid](
            *(q, k, v, prompt_k, prompt_v, out, grad_out, lse, delta, dq, H, Q, T, P, scale),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(*batch_strides(prompt_k), *batch_strides(prompt_v)),
            *(*out.stride()[:3], *grad_out.stride()[:3]),
            GRAD_Q=grad_q,
            ALIGNED=aligned(k, v, prompt_k, prompt_v),
            **sizes,
            **config.options(),
        )

    launch_tuned(QUERY_CONFIGS[kind], ("grad_q", grad_q, *key), q.device, launch_query)

    def launch_key(
        config: Tile,
        parts: int,
        per_part: int,
        shared: bool,
        k: Tensor,
        v: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        t_blocks = triton.cdiv(k.shape[-2], config.blocks["BLOCK_T"])
        _grad_key_kernel[(parts * H * t_blocks,)](
            *(q, k, v, grad_out, lse, delta, dk, dv, H, Q, k.shape[-2], B * Q, per_part, scale),
            *(*q.stride()[:3], *batch_strides(k), *batch_strides(v)),
            *(*grad_out.stride()[:3], *dk.stride()[:3]),
            SHARED=shared,
            **sizes,
            **config.options(),
        )

    if grad_kv:
        launch_tuned(
            KEY_CONFIGS[kind],
            ("grad_kv", *key),
            q.device,
            lambda config: launch_key(config, B, Q, False, k, v, dk, dv),
        )
    if not grad_prompts or prompt_k.numel() == 0:
        return dq, dk, dv, q.new_zeros(prompt_shape), q.new_zeros(prompt_shape)
    # a block of keys no wider than the prompts
    config = KEY_CONFIGS[kind][0]
    block = min(config.blocks["BLOCK_T"], max(16, bucket(P)))
    config = config._replace(blocks={**config.blocks, "BLOCK_T": block})
    if prompt_k.ndim == 4:
        parts, per_part, dtype = B, Q, q.dtype
    else:
        programs = H * triton.cdiv(P, block)
        parts, per_part = split_rows(B * Q, config.blocks["BLOCK_Q"], programs)
        dtype = torch.float32
    dpk, dpv = q.new_empty(2, parts, H, P, HEAD, dtype=dtype).unbind(0)
    launch_tuned(
        [config],
        ("grad_prompts", *key, bucket(P)),
        q.device,
        lambda config: launch_key(
            *(config, parts, per_part, prompt_k.ndim == 3, prompt_k, prompt_v, dpk, dpv)
        ),
    )
    if prompt_k.ndim == 4:
        return dq, dk, dv, dpk, dpv
    return dq, dk, dv, sum_splits(dpk).to(q.dtype), sum_splits(dpv).to(q.dtype)
