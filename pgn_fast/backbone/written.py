"""timm's blocks written out by timm's own modules, with what their forwards do not take: further
keys and values, and a bias on the scores that has rows for prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.nn import functional as F

from .schedule import KeyValues

if TYPE_CHECKING:
    from .families import Family


def run_block(
    family: Family,
    block: Any,
    x: Tensor,
    *,
    keys: KeyValues | None = None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One block on tokens (B, T, D): (B, T, D).

    Args:
        keys: keys and values that the tokens attend to beside their own.
        rope: rotary rows of the tokens after the prefix (EVA).
        bias: added to the scores of the tokens' keys, (1, h, T, T) (BEiT).
    """
    y = attend(family, block.attn, block.norm1(x), keys=keys, rope=rope, bias=bias)
    x = x + block.drop_path1(family.scale(block, 1, y))
    return x + block.drop_path2(family.scale(block, 2, block.mlp(block.norm2(x))))


def attend(
    family: Family,
    attention: Any,
    x: Tensor,
    *,
    keys: KeyValues | None = None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A block's attention on normalized tokens; the arguments are those of ``run_block``."""
    q, k, v = (
        t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for t in family.project(attention, x)
    )
    q, k = _normalize(attention, "q_norm", q), _normalize(attention, "k_norm", k)
    if rope is not None:
        q, k = (_rotate(attention, t, rope).type_as(v) for t in (q, k))
    if keys is not None:
        k, v = (
            torch.cat([t, own.to(t.dtype).expand(t.shape[0], -1, -1, -1)], dim=2)
            for t, own in ((k, keys.k), (v, keys.v))
        )
    if bias is not None:
        bias = F.pad(bias, (0, k.shape[-2] - bias.shape[-1])).to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    return attention.proj(_normalize(attention, "norm", y.transpose(1, 2).flatten(2)))


def _normalize(attention: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attention, name, None)
    return x if norm is None else norm(x)


def _rotate(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    return torch.cat(
        [x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], dim=2
    )
