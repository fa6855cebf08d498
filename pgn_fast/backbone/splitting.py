"""Projections taken apart into heads, with gradients that are written into one buffer.

torch's own gradient of such views is a stack and a copy into the projection's layout for each; here
it is one concatenation. And many blocks' keys and values of prompts are one product.

Letters: L blocks, P prompt tokens, D width, h heads of width d, A = h d, B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._register import leaves_this_package, transformed
from .weights import BlockWeights

# tokens of a batch up to which a GPU waits for the host: fewer launches are worth more than fewer
# multiplications and copies (estimated: 20 images of ViT-B/16)
HOST_BOUND_TOKENS = 4096


def is_host_bound(x: Tensor) -> bool:
    """Whether tokens (B, T, D) are so few. Not under torch.compile and torch.export, whose graph
    is to serve every batch size."""
    if torch.compiler.is_compiling() or leaves_this_package():
        return False
    return x.shape[0] * x.shape[1] <= HOST_BOUND_TOKENS


def split_projection(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(..., T, parts A) -> ``parts`` views (..., h, T, d)."""
    plain = torch.compiler.is_compiling() or leaves_this_package() or transformed()
    if plain or not (torch.is_grad_enabled() and x.requires_grad):
        return _split(x, parts, num_heads)
    found: tuple[Tensor, ...] = _Split.apply(x, parts, num_heads)
    return found


def _split(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (parts, num_heads, -1)).transpose(-4, -2).unbind(-3)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
        return _split(x, parts, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = [g.transpose(-3, -2).unsqueeze(-3) for g in grads]  # (..., T, 1, h, d)
        return torch.cat(rows, dim=-3).flatten(-3), None, None


def one_product_unsupported_reason(
    weights: Sequence[BlockWeights], prompts: Sequence[Any]
) -> str | None:
    """Why ``all_keys_values`` cannot be the keys and values of these; None where it can."""
    if not all(isinstance(p, Tensor) and p.ndim == 2 for p in prompts):
        return "prompts are computed, or each image has its own"
    if len({(p.shape, p.dtype) for p in prompts}) != 1:
        return "the numbers of prompts differ from block to block"
    if any(w.norm1.rms or w.k_norm is not None for w in weights):
        return "keys are normalized, or tokens by RMSNorm"
    kinds = {
        (w.norm1.eps, w.norm1.weight is None, w.norm1.bias is None, w.kv.bias is None, w.num_heads)
        for w in weights
    }
    return None if len(kinds) == 1 else "the blocks differ"


def all_keys_values(
    weights: Sequence[BlockWeights], x: Tensor, images: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each block's own prompts, in one product.

    Args:
        x: the prompts of all, (L, P, D).
        images: B: one copy an image, (B, h, P, d), whose gradients are summed once for all blocks;
            None: (h, P, d).
    """
    norms = [w.norm1 for w in weights]
    dtype = x.dtype if norms[0].weight is None else norms[0].weight.dtype
    n = F.layer_norm(x.to(dtype), x.shape[-1:], eps=norms[0].eps)
    gains, shifts = ([getattr(norm, name) for norm in norms] for name in ("weight", "bias"))
    if gains[0] is not None and shifts[0] is not None:
        n = torch.addcmul(torch.stack(shifts)[:, None], n, torch.stack(gains)[:, None])
    elif gains[0] is not None:
        n = n * torch.stack(gains)[:, None]
    elif shifts[0] is not None:
        n = n + torch.stack(shifts)[:, None]
    weight = torch.stack([w.kv.weight for w in weights])  # (L, 2 A, D)
    n = n.to(weight.dtype)
    if weights[0].kv.bias is None:
        kv = torch.bmm(n, weight.mT)
    else:
        bias = torch.stack([w.kv.bias for w in weights])  # type: ignore[misc]
        kv = torch.baddbmm(bias[:, None], n, weight.mT)
    flat = _SplitAll.apply(kv, weights[0].num_heads, images)
    return list(zip(flat[::2], flat[1::2], strict=True))


class _SplitAll(torch.autograd.Function):
    """(L, P, 2 A) -> 2 L views, keys and values by turns, each (h, P, d) or (B, h, P, d)."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, num_heads: int, images: int | None) -> tuple[Tensor, ...]:
        ctx.images = images
        each = [part for block in kv.unbind() for part in _split(block, 2, num_heads)]
        return tuple(p if images is None else p.expand(images, -1, -1, -1) for p in each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.stack(grads)  # (2 L, [B,] h, P, d)
        if ctx.images is not None:
            grad = grad.sum(dim=1)
        return grad.unflatten(0, (-1, 2)).permute(0, 3, 1, 2, 4).flatten(2), None, None
