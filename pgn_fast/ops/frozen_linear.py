"""A linear layer whose weights never get a gradient: the GEMM of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import onednn
from ._register import follow_autocast, plain_call, register_op
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes

# What every kernel of this op gets and may rely on:
#
#   frozen_linear(x, weight, bias) -> (..., O), contiguous
#
#   x (..., I); weight (O, I), of any strides: a backward passes the transpose of a forward's;
#   bias (O,) or None. One dtype and device. Any size may be zero.
# The backward needs no kernel of its own: it is the op with the weight transposed.


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Multiply by a frozen weight.

        y = x @ weight.T + bias

    Args:
        x: (..., I), floating point.
        weight: (O, I), same dtype and device, any strides. It must not require a gradient.
        bias: (O,) or None, likewise.
        backend: "reference" or "cpu" (oneDNN, float32, which uses the widest vectors of any x86
            processor where MKL does so on Intel's alone); None runs the fastest that accepts the
            inputs.

    Returns:
        (..., O) in the dtype of the arguments (under autocast: the autocast dtype). Differentiable
        in ``x`` alone, any number of times; ``x`` is not kept for the backward.

    Raises:
        ValueError: the shapes, dtypes or devices disagree, or the weight requires a gradient.
        RuntimeError: the named backend cannot run these inputs; the message says why.
    """
    x, weight, bias = follow_autocast(x, weight, bias)  # type: ignore[assignment]
    return _op(x, weight, bias, backend=backend)


# The GELU that the library computes in the call of its product: cuBLAS has tanh's form alone. On
# CPUs there is none that pays: torch's call is the product and GELU one after the other, and
# oneDNN's is slower than that (ViT-B, batch 8: 76 to 81 ms against 75).
GELU_IN_PRODUCT = {"cuda": "tanh"}


def frozen_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
) -> Tensor | None:
    """GELU of ``frozen_linear`` in one call of the library that multiplies, without a gradient.

    Args:
        x, weight, bias: as of ``frozen_linear``.
        approximate: "none" or "tanh", as of ``torch.nn.functional.gelu``.

    Returns:
        (..., O), or None where there is no such call, or a gradient, a compiler or a dispatch mode
        wants to see the two apart.
    """
    halves = x.dtype in (torch.float16, torch.bfloat16)
    if GELU_IN_PRODUCT.get(x.device.type) != approximate or bias is None or not halves:
        return None
    if not plain_call(x, weight, bias):
        return None
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what does not fit together, naming the argument and the way out."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "frozen_linear takes x (..., I) and weight (O, I), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}. I is the layer's input width."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"frozen_linear: bias is {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}, one "
            "value a row of weight."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"frozen_linear: x is {x.dtype} on {x.device}, {name} is {tensor.dtype} on "
                f"{tensor.device}. Convert one, e.g. x.to({name})."
            )
        if tensor.requires_grad:
            raise ValueError(
                f"frozen_linear gives {name} no gradient, but it requires one. Freeze it with "
                f"{name}.requires_grad_(False), or use torch.nn.functional.linear."
            )
    if not x.is_floating_point():
        raise ValueError(f"frozen_linear takes floating-point tensors, got {x.dtype}.")


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return select_kernel("frozen_linear", backend, x, weight, bias)(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, ctx.backend = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _op.run(grad, weight.T, None, backend=ctx.backend)
    return grad_x, None, None, None  # weight and bias are frozen; backend has no gradient


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    weight, bias = draw(4 * s.D, s.D, grad=False), draw(4 * s.D, grad=False)
    yield {"x": draw(s.B, s.tokens, s.D), "weight": weight, "bias": bias}


_op = register_op(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _kernel,
    fake=_fake,
    plain=reference.frozen_linear,
    # torch's own product takes half precision to oneDNN already
    row=OpRow(
        _examples,
        {"cpu": ("cpu",)},
        dtypes=(torch.float32,),
        bundled={"cpu": onednn},
        timed=False,
    ),
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)


@register_flop_formula(torch.ops.pgn_fast.frozen_linear)
def _flops(x: torch.Size, weight: torch.Size, *rest: Any, **options: Any) -> int:
    """For torch's FlopCounterMode, from the arguments' shapes."""
    return 2 * x.numel() * weight[0]
