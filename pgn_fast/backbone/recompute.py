"""Activation checkpointing for frozen blocks: three memory plans.

Autograd keeps nothing for a frozen Linear, but it keeps the input of both norms, queries, keys,
values, the attention's output, and the hidden layer: 1 + 3 + 1 + 1 + 4 = 10 D numbers a token.
Here the second half of the block is one autograd node with a choice of what it keeps:

    "fast"      its norm's result and the hidden layer before the activation    10 D in all
    "balanced"  its norm's result; fc1 runs again, 8 of the step's 48 D^2 flops  6 D
    "min"       the block's input alone; the whole block runs again              1 D

Every number is the same in all three: the same operations on the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._register import leaves_this_package, transformed
from ..ops.add_layer_norm import backward as add_layer_norm_backward
from ..ops.add_layer_norm import rstd_gradient
from . import blocks
from .options import Memory
from .weights import BlockWeights


def finish_block(w: BlockWeights, x: Tensor, o: Tensor, memory: Memory) -> Tensor:
    """Residual, projection and MLP: tokens (B, M, D), attention output (B, M, A) -> (B, M, D)."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or o.requires_grad)
    if not needs_grad:
        residual = blocks.add_attention(w, x, o)
        return blocks.mlp(w, residual.sum, residual.norm)
    if torch.compiler.is_compiling() or leaves_this_package() or transformed():
        # a compiler sees torch's own operations and plans memory around the checkpoint
        run = lambda y: blocks.mlp(w, y, w.norm2(y))
        y = blocks.add(x, w.out(o), w.ls1)
        if memory == "balanced":
            return checkpoint(run, y, use_reentrant=False, preserve_rng_state=False)
        return run(y)
    return _SecondHalf.apply(x, o, w, memory != "balanced")[0]


def run_again(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``run(*tensors)``, of which backward keeps only the arguments."""
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)


class _SecondHalf(torch.autograd.Function):
    """y = x + W_o o + b_o;  u = W_1 norm(y) + b_1;  z = y + W_2 act(u) + b_2.

    What backward reads, y or norm(y) and 1 / std, comes out beside z: a gradient that somebody
    differentiates again depends on it, and that is how it finds its way back to x and o.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, o: Tensor, w: BlockWeights, keep_hidden: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, n, rstd, statistics = blocks.add_attention(w, x, o, statistics=True)
        u = w.fc1(n)
        kept = y if rstd is None else n
        ctx.w, ctx.dtype = w, o.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, rstd, u if keep_hidden else None, *statistics)
        z = w.fc2(blocks.hidden(w, u, overwrite=not keep_hidden))
        return blocks.add(y, z, w.ls2), kept, rstd

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_kept: Tensor | None, grad_rstd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        w, (kept, rstd, u, *statistics) = ctx.w, ctx.saved_tensors
        grad_n = None
        if grad_z is not None:
            if u is None or torch.is_grad_enabled():  # u as a function of what is kept
                u = w.fc1(w.norm2(kept) if rstd is None else kept)
            g = grad_z if w.ls2 is None else grad_z * w.ls2
            grad_hidden = w.fc2.input_gradient(g.to(u.dtype))
            grad_u = _hidden_gradient(w, u, grad_hidden)
            del u, grad_hidden
            grad_n = w.fc1.input_gradient(grad_u)
        if rstd is None:
            through = None
            if grad_n is not None:
                through = w.norm2.input_gradient(kept, grad_n, *statistics)
            grad_y = _sum(through, grad_z, grad_kept)
        else:
            grad_n = _sum(grad_n, grad_kept)
            zeros = torch.zeros_like(kept) if grad_z is None or grad_n is None else kept
            grad_y = add_layer_norm_backward(
                zeros if grad_z is None else grad_z,
                zeros if grad_n is None else grad_n,
                kept,
                rstd,
                w.norm2.backend,
            )
            if grad_rstd is not None:
                grad_y = grad_y + rstd_gradient(grad_rstd, kept, rstd)
        if grad_y is None:
            return None, None, None, None
        g = grad_y if w.ls1 is None else grad_y * w.ls1
        grad_o = w.out.input_gradient(g.to(ctx.dtype))
        return grad_y if ctx.needs_input_grad[0] else None, grad_o, None, None


def _sum(first: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """The sum of what is there; ``first`` is overwritten where the sum is not differentiated."""
    for other in others:
        if first is None:
            first = None if other is None else other.clone()
        elif other is not None:
            first = first + other if torch.is_grad_enabled() else first.add_(other)
    return first


def _hidden_gradient(w: BlockWeights, u: Tensor, grad: Tensor) -> Tensor:
    """The gradient of u from that of ``blocks.hidden``, which runs again; ``grad`` is used up
    unless it is differentiated."""
    if torch.is_grad_enabled():  # create_graph=True
        (grad_u,) = torch.autograd.grad(blocks.hidden(w, u), u, grad, create_graph=True)
        return grad_u
    if not w.glu and w.hidden_norm is None:
        if kind := blocks.gelu_kind(w.act):
            return torch.ops.aten.gelu_backward.grad_input(
                grad, u, approximate=kind, grad_input=grad
            )
        if isinstance(w.act, torch.nn.SiLU):
            return torch.ops.aten.silu_backward.grad_input(grad, u, grad_input=grad)
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (grad_u,) = torch.autograd.grad(blocks.hidden(w, u), u, grad)
    return grad_u
