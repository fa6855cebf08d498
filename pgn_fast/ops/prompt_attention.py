"""Attention over keys of prompts that the whole batch shares and each image's own keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._register import follow_autocast, register_op, transformed
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes

# What every kernel of this op gets and may rely on:
#
#   prompt_attention(q, k, v, prompt_k, prompt_v, scale) -> (out, lse)
#   prompt_attention_backward(grad_out, q, k, v, prompt_k, prompt_v, out, lse, scale,
#                             grad_q, grad_kv, grad_prompts)
#       -> (grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v)
#
#   q (B, h, Q, d); k, v (B, h, T, d); prompt_k, prompt_v (h, P, d), shared by the batch, or
#   (B, h, P, d). One dtype and device. The last stride of each is 1; the others are free: q, k and
#   v are often views of one (B, T, 3, h, d) buffer, and prompts of a (P, 2, h, d) one. k and v
#   have equal shapes but need not have equal strides, likewise prompt_k and prompt_v. An expanded
#   dimension (stride 0) is possible. h, T, d >= 1, d up to what ``devices`` says of the
#   backend; B, Q and P may be 0.
#   out (B, h, Q, d): the transpose(1, 2) of a contiguous (B, Q, h, d), so that joining the heads
#   costs nothing. lse (B, h, Q), contiguous float32: natural logarithm of the sum over all keys of
#   exp(scale * q.k).
#   grad_out (B, h, Q, d): last stride 1, others free. out and lse come as the forward gave them.
#   The three flags say which gradients are wanted; what is not wanted is returned as an empty
#   tensor of shape (0,). grad_q, grad_k, grad_v: the shapes of q, k, v, laid out as `out` is.
#   grad_prompt_k, grad_prompt_v: the shapes of prompt_k, prompt_v, contiguous; for shared prompts
#   summed over the batch in an order that depends on nothing but the sizes (no atomics).
#   Products accumulate in float32, and so does the sum over the batch.
#
#   prompt_attention_ragged(q, k, v, prompt_k, prompt_v, ranges, scale) -> (out, lse)
#
#   The same forward for prompt_k, prompt_v (h, P, d) of which image b sees the rows from
#   ranges[b, 0] up to ranges[b, 1]: (B, 2), contiguous int64 on the tensors' device, 0 <= begin <=
#   end <= P. Ranges may be empty, overlap, and leave rows out. No other row may show in an image's
#   result, whatever numbers stand in it.


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float | None = None,
    *,
    ranges: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the prompts' and the tokens' keys together.

        out[b, h] = softmax(scale * q[b, h] @ [prompt_k[h]; k[b, h]]^T) @ [prompt_v[h]; v[b, h]]

    With ``ranges`` the prompts of many tasks lie one after the other in prompt_k and prompt_v, and
    image b attends to rows ranges[b, 0] up to ranges[b, 1] of them alone: tasks of unequal P share
    a batch, and no row is padded or copied.

    Args:
        q: queries, (B, h, Q, d); float32, float16 or bfloat16 (float64 in eager PyTorch). Q is
            often T; one query (the class token's) is fine. Any strides; views of one
            (B, T, 3, h, d) buffer are read in place.
        k: keys of each image's own tokens, (B, h, T, d).
        v: values of the same, (B, h, T, d).
        prompt_k: keys of the prompts, (h, P, d), shared by the batch, or (B, h, P, d). P may be 0.
        prompt_v: values of the prompts, same shape.
        scale: of the scores; None: 1 / sqrt(d).
        ranges: for prompts (h, P, d): the rows that each image sees, [begin, end), (B, 2) int64.
            Images may share rows and may see none. Forward only: where a gradient is wanted, plain
            torch runs, which scores all P rows for every image.
        backend: "reference", "cpu", "triton" or "cuda" for forward and backward; None runs the
            fastest that accepts the inputs.

    Returns:
        (B, h, Q, d) in the dtype of the arguments (under autocast: the autocast dtype), laid out
        so that ``transpose(1, 2).flatten(2)`` is a view. Differentiable in all five tensors,
        twice in eager PyTorch; gradients that are not needed are not computed. No (Q, P + T) matrix
        is kept.

    Raises:
        ValueError: the shapes, dtypes or devices disagree, or a range leaves the prompts (on other
            devices than the CPU, and in a compiled program: a RuntimeError, on a GPU when it is
            waited for).
        RuntimeError: the named backend cannot run these inputs; the message says why.

    Source: Jia et al., ECCV 2022 (arXiv:2203.12119), equation 6: of VPT-Deep's prompts only keys
    and values matter. Dao, arXiv:2307.08691, section 3 (the log-sum-exp kept for the backward).
    """
    q, k, v, prompt_k, prompt_v = follow_autocast(q, k, v, prompt_k, prompt_v)  # type: ignore[assignment]
    _check(q, k, v, prompt_k, prompt_v)  # before the head width is taken for granted
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = q, k, v, prompt_k, prompt_v
    if ranges is None:
        return _op(*tensors, scale, backend=backend)[0]
    _check_ranges(ranges, q, prompt_k)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if backend not in (None, "reference"):
            raise RuntimeError(
                f"prompt_attention: backend={backend!r} cannot run: with ranges its kernels have "
                "no backward, and a gradient is wanted. Leave backend=None to run it in plain "
                "torch, or call it under torch.no_grad()."
            )
        return _ragged_op.plain(*tensors, ranges, scale)[0]
    return _ragged_op(*tensors, ranges, scale, backend=backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    """Refuse what does not fit together, naming the argument and the way out."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or _but_rows(q) != _but_rows(k):
        raise ValueError(
            "prompt_attention takes q (B, h, Q, d) and k, v (B, h, T, d), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. From a fused projection: "
            "qkv.reshape(B, T, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)."
        )
    B, h, _, d = q.shape
    if (
        prompt_k.ndim not in (3, 4)
        or prompt_k.shape != prompt_v.shape
        or _but_rows(prompt_k) != ((h, d) if prompt_k.ndim == 3 else (B, h, d))
    ):
        raise ValueError(
            f"prompt_attention takes prompt_k and prompt_v ({h}, P, {d}), shared by the batch, or "
            f"({B}, {h}, P, {d}), got {tuple(prompt_k.shape)} and {tuple(prompt_v.shape)}."
        )
    if 0 in (h, k.shape[2], d):
        raise ValueError(
            "prompt_attention takes at least one token and head, and a head width d of at least "
            f"1; got k {tuple(k.shape)}."
        )
    named = {"k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    for name, tensor in named.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"prompt_attention: q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on "
                f"{tensor.device}. Convert one, e.g. {name}.to(q)."
            )
    if not q.is_floating_point():
        raise ValueError(f"prompt_attention takes floating-point tensors, got {q.dtype}.")


def _check_ranges(ranges: Tensor, q: Tensor, prompt_k: Tensor) -> None:
    """Refuse ranges that are none, or that leave the prompts."""
    B, P = q.shape[0], prompt_k.shape[-2]
    if ranges.shape != (B, 2) or ranges.dtype != torch.int64 or ranges.device != q.device:
        raise ValueError(
            f"prompt_attention takes ranges ({B}, 2) of torch.int64 on {q.device}, begin and end "
            f"for each image, got {tuple(ranges.shape)} of {ranges.dtype} on {ranges.device}."
        )
    if prompt_k.ndim != 3:
        raise ValueError(
            "prompt_attention: ranges choose rows of prompts (h, P, d) that lie one after the "
            f"other, got {tuple(prompt_k.shape)}. Without ranges every image has its own P rows."
        )
    begin, end = ranges.unbind(1)
    inside = ((begin >= 0) & (begin <= end) & (end <= P)).all()
    said = f"prompt_attention: ranges must lie in the {P} prompts, 0 <= begin <= end <= {P}"
    if ranges.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        torch._assert_async(inside, said)  # the host does not wait for the device
    elif not inside:
        wrong = next(r for r in ranges.tolist() if not 0 <= r[0] <= r[1] <= P)
        raise ValueError(f"{said}, got {wrong}.")


def _but_rows(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-2], x.shape[-1])


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(op: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of the op or of its ragged form, which has ranges before its scale."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *ranges, scale, backend = rest
        tensors = q, k, v, prompt_k, prompt_v
        run = select_kernel(op, backend, *tensors, **_sizes(q))
        out, lse = run(*map(_unit_columns, tensors), *(r.contiguous() for r in ranges), scale)
        return _heads_last(out), lse

    return kernel


def _sizes(q: Tensor) -> dict[str, int]:
    """What the kernels' limits depend on."""
    return {"head_width": q.shape[3], "rows": q.shape[0] * q.shape[2]}


def _heads_last(x: Tensor) -> Tensor:
    """(B, h, Q, d) as the transpose of a contiguous (B, Q, h, d)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads_last(x: Tensor) -> Tensor:
    B, h, Q, d = x.shape
    return x.new_empty(B, Q, h, d).transpose(1, 2)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_heads_last(q), q.new_empty(q.shape[:3], dtype=dtype)


def _backward_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = q, k, v, prompt_k, prompt_v
    kernel = select_kernel("prompt_attention_backward", backend, *tensors, **_sizes(q))
    inputs = map(_unit_columns, (grad_out, *tensors))
    grads = kernel(*inputs, out, lse, scale, grad_q, grad_kv, grad_prompts)
    return *(_heads_last(g) if g.ndim == 4 else g for g in grads[:3]), *grads[3:]


def _backward_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = q.new_empty(0)
    return (
        _empty_heads_last(q) if grad_q else none,
        _empty_heads_last(k) if grad_kv else none.clone(),
        _empty_heads_last(v) if grad_kv else none.clone(),
        prompt_k.new_empty(prompt_k.shape) if grad_prompts else none.clone(),
        prompt_v.new_empty(prompt_v.shape) if grad_prompts else none.clone(),
    )


def _plain_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as functions of the inputs alone: ``out`` and ``lse``, which depend on the
    inputs too, are computed again where somebody differentiates through them."""
    if torch.is_grad_enabled():
        out, lse = reference.prompt_attention(q, k, v, prompt_k, prompt_v, scale)
    inputs = q, k, v, prompt_k, prompt_v
    return reference.prompt_attention_backward(grad_out, *inputs, out, lse, scale, *wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    flags = needs[0], needs[1] or needs[2], needs[3] or needs[4]
    tensors = grad_out, *ctx.saved_tensors
    grads = _backward_op.run(*tensors, ctx.scale, *flags, backend=ctx.backend)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, None, None  # scale and backend have no gradient


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    q, k, v = (draw(s.B, s.h, s.tokens, s.D // s.h) for _ in range(3))
    prompt_k, prompt_v = (draw(s.h, s.P, s.D // s.h) for _ in range(2))
    own = {"k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    yield {"q": q, **own}
    yield {"q": q.detach()[:, :, :1].requires_grad_(), **own}  # the class token's alone


def _ragged_examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    q, k, v = (draw(s.B, s.h, s.tokens, s.D // s.h, grad=False) for _ in range(3))
    prompt_k, prompt_v = (draw(s.h, s.P, s.D // s.h, grad=False) for _ in range(2))
    # image b sees the first b rows, at most all of them
    ends = draw.permutation(s.B).sort().values.clamp(max=s.P)
    ranges = torch.stack([torch.zeros_like(ends), ends], dim=1)
    own = {"k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    yield {"q": q, **own, "ranges": ranges}


def _eager(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """Keys and values of the prompts copied beside those of every image."""
    k = torch.cat([prompt_k.expand(len(k), -1, -1, -1), k], dim=2)
    v = torch.cat([prompt_v.expand(len(v), -1, -1, -1), v], dim=2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


_LARGEST = {
    "cpu": {"head_width": 256},
    "triton": {"head_width": 256},
    "cuda": {"head_width": 128},
}
_backward_op = register_op(
    "prompt_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor prompt_k, "
    "Tensor prompt_v, Tensor out, Tensor lse, float scale, bool grad_q, bool grad_kv, "
    "bool grad_prompts, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_backward_fake,
    plain=_plain_backward,
)
_op = register_op(
    "prompt_attention(Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _forward("prompt_attention"),
    fake=_fake,
    plain=reference.prompt_attention,
    row=OpRow(_examples, {"cpu": ("cpu",), "sm_90": ("triton",)}, largest=_LARGEST, eager=_eager),
    setup_context=_setup_context,
    backward=_backward,
)
_ragged_op = register_op(
    "prompt_attention_ragged(Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, "
    "Tensor ranges, float scale, str backend) -> (Tensor, Tensor)",
    _forward("prompt_attention_ragged"),
    fake=_fake,
    plain=reference.prompt_attention_ragged,
    # tasks of unequal P in one call; where nothing is preferred they run one P after the other
    row=OpRow(_ragged_examples, {"cpu": ("cpu",)}, largest=_LARGEST, timed=False),
)
