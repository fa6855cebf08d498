"""Prompts of block 0 inside the buffer that the patch embedding's op writes.

The buffer (B, S + N + P, D) has no gradient of its own. What is differentiable are its prompt rows,
and two autograd nodes stand for them: ``mixed_rows`` from logits and token library to the rows, and
``project_whole`` from the rows to the buffer and to queries, keys and values of all its rows. No
gradient is computed for the rows of patches in block 0's projections, nothing is concatenated, and
nothing is mixed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.mix_prompts import backward as mix_prompts_backward
from . import blocks
from .schedule import Mixture
from .weights import BlockWeights


def mixed_rows(mixture: Mixture, rows: Tensor, backend: str) -> Tensor:
    """The prompt rows (B, P, D) that an op has mixed, as a function of logits and library."""
    if not (mixture.logits.requires_grad or mixture.token_library.requires_grad):
        return rows
    found: Tensor = _MixedRows.apply(
        mixture.logits, mixture.token_library, mixture.activation, rows, backend
    )
    return found


class _MixedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, library: Tensor, activation: str, rows: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(logits, library)
        ctx.activation, ctx.backend = activation, backend
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = mix_prompts_backward.run(
            grad, *ctx.saved_tensors, ctx.activation, backend=ctx.backend
        )
        return *grads, None, None, None


def project_whole(
    w: BlockWeights, x: Tensor, prompts: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The buffer x (B, T + P, D) and its queries, keys and values, as functions of its last rows.

    Args:
        prompts: what the last P rows hold, (P, D) or (B, P, D); only its gradient is wanted.
        num_tokens: T.
    """
    if not (torch.is_grad_enabled() and prompts.requires_grad):
        return x, *blocks.project(w, x, x.shape[1])
    if torch.compiler.is_compiling():  # the same in operations that a compiler sees through
        own = blocks.project(w, x[:, :num_tokens].detach(), num_tokens)
        new = blocks.project(w, prompts, prompts.shape[-2])
        q, k, v = (torch.cat(pair, dim=-2) for pair in zip(own, new, strict=True))
        return x, q, k, v
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _ProjectWhole.apply(prompts, x, w, num_tokens)
    return found


class _ProjectWhole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prompts: Tensor, x: Tensor, w: BlockWeights, num_tokens: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(prompts)
        ctx.w, ctx.num_tokens = w, num_tokens
        return x.view_as(x), *blocks.project(w, x, x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (prompts,) = ctx.saved_tensors
        direct, *rows = (g[..., ctx.num_tokens :, :] for g in (grad_x, *grads))
        if prompts.ndim == 2:  # shared by the batch: the projections are linear in their gradients
            direct, *rows = (g.sum(dim=0) for g in (direct, *rows))
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad():
            leaf = prompts if again else prompts.detach().requires_grad_()
            outputs = blocks.project(ctx.w, leaf, leaf.shape[-2])
            (grad,) = torch.autograd.grad(outputs, leaf, rows, create_graph=again)
        return grad + direct, None, None, None
