"""Residual addition and LayerNorm without its affine part, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._register import register_op
from .dispatch import select_kernel

# What every kernel of this op gets and may rely on:
#
#   add_layer_norm(x, y, eps) -> (total (R, D), normed (R, D), rstd (R,) float32)
#   add_layer_norm_backward(grad_total, grad_normed, normed, rstd) -> grad (R, D), of x and of y
#
#   All (R, D) tensors are contiguous and of one dtype and device. D >= 1; R may be 0. Statistics
#   are those of the sum as it is rounded, taken in float32 (float64 in plain torch for float64).

_LARGEST = 16384  # columns that a Triton program holds


def add_layer_norm(
    x: Tensor, y: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add two tensors and normalize the sum's last dimension.

        total = x + y;   normed = (total - mean(total)) / sqrt(var(total) + eps)

    A LayerNorm's scale and shift belong in the next frozen Linear, where they cost nothing.

    Args:
        x: (..., D), floating point, 1 <= D <= 16384.
        y: same shape, dtype and device.
        eps: added to the variance.
        backend: "reference", "cpu" or "triton" for forward and backward; None runs the fastest
            that accepts the inputs.

    Returns:
        total and normed, (..., D), in the dtype of the arguments. Differentiable once in both;
        backward keeps ``normed`` and one number a row.

    Raises:
        ValueError: the shapes, dtypes or devices disagree.
        RuntimeError: the named backend cannot run these inputs; the message says why.

    Source: Ba et al., arXiv:1607.06450.
    """
    if x.shape != y.shape or x.ndim < 1 or not 1 <= x.shape[-1] <= _LARGEST:
        raise ValueError(
            f"add_layer_norm takes x and y (..., D) of one shape, 1 <= D <= {_LARGEST}, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        raise ValueError(
            f"add_layer_norm takes floating-point tensors of one dtype and device, got {x.dtype} "
            f"on {x.device} and {y.dtype} on {y.device}. Convert one, e.g. y.to(x)."
        )
    total, normed, _ = with_rstd(x, y, eps, backend)
    return total, normed


def with_rstd(
    x: Tensor, y: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``add_layer_norm`` returns, unchecked, and 1 / sqrt(var + eps), (...)."""
    # an exported program, and ONNX after it, has to run where this package is not
    if backend == "reference" or torch.compiler.is_exporting():
        return reference.add_layer_norm(x, y, eps)
    return _op(x, y, eps, backend or "auto")


def backward(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, backend: str | None
) -> Tensor:
    """The gradient of x, and of y, for a caller that kept what ``with_rstd`` returned."""
    return _backward_op(grad_total, grad_normed, normed, rstd, backend or "auto")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _kernel(x: Tensor, y: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    kernel = select_kernel("add_layer_norm", backend, x, y)
    total, normed, rstd = kernel(_rows(x), _rows(y), eps)
    return total.view(x.shape), normed.view(x.shape), rstd.view(x.shape[:-1])


def _fake(x: Tensor, y: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    new = x.new_empty(x.shape), x.new_empty(x.shape)
    return *new, x.new_empty(x.shape[:-1], dtype=wide)


def _backward_kernel(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, backend: str
) -> Tensor:
    kernel = select_kernel("add_layer_norm_backward", backend, normed)
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
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(normed, rstd)


def _backward(
    ctx: Any, grad_total: Tensor, grad_normed: Tensor, grad_rstd: Tensor
) -> tuple[Tensor | None, ...]:
    grad = _backward_op(grad_total, grad_normed, *ctx.saved_tensors, ctx.backend)
    return grad, grad, None, None  # eps and backend have no gradient


_backward_op = register_op(
    "add_layer_norm_backward(Tensor grad_total, Tensor grad_normed, Tensor normed, Tensor rstd, "
    "str backend) -> Tensor",
    _backward_kernel,
    fake=_backward_fake,
)
_op = register_op(
    "add_layer_norm(Tensor x, Tensor y, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
