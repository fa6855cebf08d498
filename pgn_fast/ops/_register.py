"""The one wrapper over torch.library: define, implement, fake, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("pgn_fast", "FRAGMENT")


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``schema`` in the namespace ``pgn_fast`` and return the callable op.

    ``torch.library.custom_op`` does the same at about twice the cost of a call. An op without
    ``backward`` is a backward itself; it raises when somebody differentiates through it.
    """
    name = schema.partition("(")[0]
    qualified = f"pgn_fast::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is None:
        backward, setup_context = _no_second_derivative(name), None
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.pgn_fast, name).default


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"pgn_fast.{name} has no derivative of its own. For second derivatives run the "
            "forward op with backend='reference'."
        )

    return backward


def follow_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating-point tensors to the autocast dtype, as torch does for a matrix product.

    Custom ops do not follow autocast by themselves. float64 stays, as in torch.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
