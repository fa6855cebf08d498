"""Residual addition and LayerNorm without its affine part, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._register import register_op
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes

# What every kernel of this op gets and may rely on:
#
#   add_layer_norm(x, y, eps) -> (total (R, D), normed (R, D), rstd (R,) float32)
#   add_layer_norm_backward(grad_total, grad_normed, normed, rstd) -> grad (R, D), of x and of y
#
#   All (R, D) tensors are contiguous and of one dtype and device. D >= 1; R may be 0. Statistics
#   are those of the sum as it is rounded, taken in float32 (float64 in eager PyTorch for float64).


def add_layer_norm(
    x: Tensor, y: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add two tensors and normalize the sum's last dimension.

        total = x + y;   normed = (total - mean(total)) / sqrt(var(total) + eps)

    A LayerNorm's scale and shift belong in the next frozen Linear, where they cost nothing.

    Args:
        x: (..., D), floating point, D >= 1.
        y: same shape, dtype and device.
        eps: added to the variance.
        backend: "reference", "cpu" or "triton" for forward and backward; None runs the fastest
            that accepts the inputs.

    Returns:
        total and normed, (..., D), in the dtype of the arguments. Differentiable in both, twice in
        eager PyTorch; backward keeps ``normed`` and one number a row.

    Raises:
        ValueError: the shapes, dtypes or devices disagree.
        RuntimeError: the named backend cannot run these inputs; the message says why.

    Source: Ba et al., arXiv:1607.06450.
    """
    total, normed, _ = _op(x, y, eps, backend=backend)
    return total, normed


def _check(x: Tensor, y: Tensor, eps: float) -> None:
    if x.shape != y.shape or x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(
            "add_layer_norm takes x and y (..., D) of one shape, D >= 1, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        raise ValueError(
            f"add_layer_norm takes floating-point tensors of one dtype and device, got {x.dtype} "
            f"on {x.device} and {y.dtype} on {y.device}. Convert one, e.g. y.to(x)."
        )


def with_rstd(
    x: Tensor, y: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``add_layer_norm`` returns, unchecked, and 1 / sqrt(var + eps), (...)."""
    return _op.run(x, y, eps, backend=backend or "auto")


def backward(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, backend: str | None
) -> Tensor:
    """The gradient of x, and of y, for a caller that kept what ``with_rstd`` returned."""
    return _backward_op.run(grad_total, grad_normed, normed, rstd, backend=backend or "auto")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _kernel(x: Tensor, y: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    kernel = select_kernel("add_layer_norm", backend, x, y, columns=x.shape[-1])
    total, normed, rstd = kernel(_rows(x), _rows(y), eps)
    return total.view(x.shape), normed.view(x.shape), rstd.view(x.shape[:-1])


def _fake(x: Tensor, y: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    new = x.new_empty(x.shape), x.new_empty(x.shape)
    return *new, x.new_empty(x.shape[:-1], dtype=wide)


def _backward_kernel(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, backend: str
) -> Tensor:
    D = normed.shape[-1]
    kernel = select_kernel("add_layer_norm_backward", backend, normed, columns=D)
    grads = _rows(grad_total), _rows(grad_normed)
    return kernel(*grads, _rows(normed), rstd.reshape(-1)).view(normed.shape)


def _backward_fake(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, backend: str
) -> Tensor:
    return normed.new_empty(normed.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *_, ctx.backend = inputs
    _, normed, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normed, rstd)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, grad_rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    normed, rstd = ctx.saved_tensors
    zeros = torch.zeros_like(normed) if grad_total is None or grad_normed is None else normed
    grad = _backward_op.run(
        zeros if grad_total is None else grad_total,
        zeros if grad_normed is None else grad_normed,
        normed,
        rstd,
        backend=ctx.backend,
    )
    if grad_rstd is not None:  # second derivatives alone: rstd is what this backward reads
        grad = grad + rstd_gradient(grad_rstd, normed, rstd)
    return grad, grad, None, None  # eps and backend have no gradient


def rstd_gradient(grad_rstd: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x, and of y, from that of 1 / std: -grad rstd^2 normed / D."""
    factor = grad_rstd * rstd.square() / normed.shape[-1]
    return (-factor.unsqueeze(-1) * normed).to(normed.dtype)


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    yield {"x": draw(s.B, s.tokens, s.D), "y": draw(s.B, s.tokens, s.D)}


_backward_op = register_op(
    "add_layer_norm_backward(Tensor grad_total, Tensor grad_normed, Tensor normed, Tensor rstd, "
    "str backend) -> Tensor",
    _backward_kernel,
    fake=_backward_fake,
    plain=reference.add_layer_norm_backward,
)
_op = register_op(
    "add_layer_norm(Tensor x, Tensor y, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _kernel,
    fake=_fake,
    plain=reference.add_layer_norm,
    # one Triton program holds a row
    row=OpRow(
        _examples, {"cpu": ("cpu",), "sm_90": ("triton",)}, largest={"triton": {"columns": 16384}}
    ),
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)
