"""The one wrapper over torch.library: define, implement, fake, gradient, and a short way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_library = torch.library.Library("pgn_fast", "FRAGMENT")


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``schema`` in the namespace ``pgn_fast`` and return a function that calls the op.

    ``torch.library.custom_op`` does the same at about twice the cost of a call. An op without
    ``backward`` is a backward itself; it raises when somebody differentiates through it.
    """
    name = schema.partition("(")[0]
    qualified = f"pgn_fast::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, _no_vmap(name), lib=_library)
    torch.library.register_autograd(
        qualified,
        backward or _no_second_derivative(name),
        setup_context=setup_context if backward else None,
        lib=_library,
    )
    op = getattr(torch.ops.pgn_fast, name).default
    return _short_way(op, kernel, _function(name, kernel, setup_context, backward))


def _short_way(
    op: Callable[..., Any],
    kernel: Callable[..., Any],
    function: type[torch.autograd.Function] | None,
) -> Callable[..., Any]:
    """Call the kernel without the dispatcher where nobody but autograd looks on.

    The dispatcher's way through a Python op costs 20 to 40 us, as much as a small kernel.
    """

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, arguments)
        if not _unobserved(arguments):
            return op(*arguments)
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        ):
            return op(*arguments) if function is None else function.apply(*arguments)
        return kernel(*arguments)

    return call


def _refuse_tangents(op: Any, arguments: tuple[Any, ...]) -> None:
    """torch would drop the tangents of an op without a forward-mode rule, and say nothing."""
    tensors = (a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op.name().replace('::', '.')} has no forward-mode derivative (torch.func.jvp, "
            "jacfwd, hessian). Run it with backend='reference'."
        )


def _unobserved(arguments: tuple[Any, ...]) -> bool:
    """Only plain tensors; no functorch transform and no dispatch mode is active."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(a) in (Tensor, torch.nn.Parameter) for a in arguments if isinstance(a, Tensor))
    )


def _function(
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> type[torch.autograd.Function] | None:
    """The op as an autograd function: the same kernel, context and backward."""
    if setup_context is None or backward is None:
        return None

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = kernel(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(name, (torch.autograd.Function,), members)


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"pgn_fast.{name} has no derivative of its own. For second derivatives run the "
            "forward op with backend='reference'."
        )

    return backward


def _no_vmap(name: str) -> Callable[..., Any]:
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"pgn_fast.{name} takes whole batches and has no rule for torch.func.vmap. Put the "
            "batch into its first dimension, or run it with backend='reference'."
        )

    return vmap


def follow_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
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
