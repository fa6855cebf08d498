"""The one wrapper over torch.library: define, implement, fake, gradient, and who runs a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch

_library = torch.library.Library("pgn_fast", "FRAGMENT")
_compiled = torch.library.Library("pgn_fast_C", "FRAGMENT")  # what csrc implements


class Op:
    """A registered op.

    Call it with the schema's arguments and ``backend``: the arguments are checked, and what runs is

    - PyTorch's own ops, ``plain``: for backend "reference"; in an exported or traced program, which
      has to run where this package is not; under torch.func's transforms and forward-mode
      derivatives, which no kernel has; for a gradient that the op's row leaves to torch's autograd;
    - the op of ``torch.ops.pgn_fast``, where a compiler or a dispatch mode has to see it;
    - else its kernel, inside of an autograd function where a gradient is wanted. The dispatcher's
      way through an op in Python costs 20 to 40 us, as much as a small kernel.

    The three run the same kernel on the same arguments: their results are the same bits.

    Attributes:
        op: the op of ``torch.ops.pgn_fast``; its last argument is a backend's name or "auto".
        kernel: the same without a gradient.
        function: the autograd function; None for a backward.
        plain: the op in differentiable PyTorch; it takes no backend.
    """

    def __init__(
        self,
        name: str,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        check: Callable[..., None] | None,
        function: type[torch.autograd.Function] | None,
    ) -> None:
        self.name, self.kernel, self.plain, self.function = name, kernel, plain, function
        self.op = getattr(torch.ops.pgn_fast, name).default
        self._check = check
        self._trains_in_torch = dispatch.row(name).trains_in_torch if function else ()

    def __call__(self, *arguments: Any, backend: str | None) -> Any:
        if self._check is not None:
            self._check(*arguments)
        if backend is None and self._trains_in_torch and _wants_gradient(arguments):
            device = next(a.device for a in arguments if isinstance(a, Tensor))
            if device.type in self._trains_in_torch:
                return self.plain(*arguments)
        return self.run(*arguments, backend=backend or "auto")

    def run(self, *arguments: Any, backend: str) -> Any:
        """The same unchecked; the gradient is the op's own, whatever its row says."""
        if backend == "reference" or leaves_this_package():
            return self.plain(*arguments)
        if torch.compiler.is_compiling():
            return self.op(*arguments, backend)
        if transformed():
            return self.plain(*arguments)
        wants_gradient = _wants_gradient(arguments)
        if wants_gradient and self.function is None:
            # second derivatives (create_graph=True): by torch's own autograd
            return self.plain(*arguments)
        if not _unobserved(arguments):
            return self.op(*arguments, backend)
        if wants_gradient and self.function is not None:
            return self.function.apply(*arguments, backend)
        return self.kernel(*arguments, backend)


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    row: dispatch.OpRow | None = None,
    check: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Register ``schema`` in the namespace ``pgn_fast``, and without its backend in ``pgn_fast_C``,
    where the compiled libraries implement it.

    ``torch.library.custom_op`` does the same at about twice the cost of a call.

    Args:
        schema: its last argument is ``str backend``.
        kernel: runs it, backend included.
        fake: shapes and dtypes of the results.
        plain: the op in PyTorch, without the backend; it is differentiated for second derivatives.
        row: what the dispatcher and the measurements have to know of the op; None for a backward,
            which has that of its forward.
        check: of the arguments without the backend; raises ValueError.
        setup_context, backward: as in torch.autograd.Function; none for an op that is a backward.
            ``backward`` is run with gradients enabled for second derivatives (create_graph=True)
            and must then be differentiable in all that it depends on: made of PyTorch's own ops and
            of ``Op.run``, from saved inputs and outputs alone.
    """
    name = schema.partition("(")[0]
    qualified = f"pgn_fast::{name}"
    if row is not None:
        dispatch.OPS[name] = row
    _compiled.define(schema.replace(", str backend)", ")"))
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
    return Op(name, kernel, plain, check, _function(name, kernel, setup_context, backward))


def leaves_this_package() -> bool:
    """Whether what runs is recorded to run where this package is not: torch.export, and ONNX after
    it, or torch.jit.trace."""
    if torch.compiler.is_compiling():
        # is_exporting() itself is answered True by Dynamo of torch 2.11, whatever it compiles for
        return torch.compiler._is_exporting_flag
    return torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is active."""
    return forward_ad._current_level >= 0 or (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


def plain_call(*tensors: Tensor | None) -> bool:
    """Whether nobody looks at what runs on these tensors, so that any operation may: no compiler,
    recording, transform, dispatch mode or tensor subclass, and no gradient is wanted."""
    recorded = torch.compiler.is_compiling() or leaves_this_package() or transformed()
    return not recorded and _unobserved(tensors) and not _wants_gradient(tensors)


def _wants_gradient(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    )


def _unobserved(arguments: tuple[Any, ...]) -> bool:
    """Only plain tensors, and no dispatch mode is active."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(a) in (Tensor, torch.nn.Parameter) for a in arguments if isinstance(a, Tensor)
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

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"torch.ops.pgn_fast.{name} has no derivative of its own. For second derivatives call "
            "the function of pgn_fast.ops, outside of dispatch modes."
        )

    return backward


def _no_vmap(name: str) -> Callable[..., Any]:
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"torch.ops.pgn_fast.{name} takes whole batches and has no rule for torch.func.vmap. "
            "Call the function of pgn_fast.ops, which is PyTorch's own ops there."
        )

    return vmap


def follow_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating-point tensors to the autocast dtype, as torch does for a GEMM.

    Custom ops do not follow autocast by themselves. float64 stays, as in torch.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch has no autocast there
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
