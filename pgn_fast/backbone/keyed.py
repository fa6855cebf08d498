"""timm's blocks written out with further keys and values, which their own forwards do not take."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from .schedule import KeyValues

_BLOCKS = (Block, EvaBlock, BeitBlock)
_ATTENTION = (Attention, AttentionRope, EvaAttention, BeitAttention)


def refusal(block: Any) -> str | None:
    """Why keys and values cannot enter a block; None where they can."""
    if type(block) not in _BLOCKS:
        return f"{type(block).__name__} is not one of {', '.join(t.__name__ for t in _BLOCKS)}"
    attention = block.attn
    if type(attention) not in _ATTENTION:
        return f"its attention is a {type(attention).__name__}"
    if getattr(attention, "gate", None) is not None:
        return "its attention output is gated"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its queries share keys and values between heads (grouped-query attention)"
    for name, module in (("it", block), ("its attention", attention)):
        if any(map(len, hooks(module))) or "forward" in module.__dict__:
            return f"{name} has a hook or another forward, which would be passed over"
    return None


def hooks(module: Any) -> tuple[dict[int, Any], ...]:
    """The hooks that are registered on a module, of every kind."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def heads(block: Any) -> tuple[int, int]:
    """h and d of a block's attention."""
    attention = block.attn
    if getattr(attention, "q_proj", None) is not None:
        width = attention.q_proj.out_features
    else:
        width = attention.qkv.out_features // 3
    return attention.num_heads, width // attention.num_heads


def run_block(
    block: Any, x: Tensor, keys: KeyValues, rope: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """One block on tokens (B, T, D) that also attend to ``keys``: (B, T, D).

    Args:
        rope: rotary rows of the tokens after the prefix (EVA).
        bias: added to the scores of the tokens' keys, (1, h, T, T) (BEiT).
    """
    y = _attend(block.attn, block.norm1(x), keys, rope, bias)
    if isinstance(block, Block):
        x = x + block.drop_path1(block.ls1(y))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
    y = block.mlp(block.norm2(x))
    return x + (y if block.gamma_2 is None else block.gamma_2 * y)


def _attend(
    attention: Any, x: Tensor, keys: KeyValues, rope: Tensor | None, bias: Tensor | None
) -> Tensor:
    q, k, v = (
        t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in _qkv(attention, x)
    )
    if not isinstance(attention, BeitAttention):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = (_rotate(attention, t, rope).type_as(v) for t in (q, k))
    k, v = (
        torch.cat([t, own.to(t.dtype).expand(t.shape[0], -1, -1, -1)], dim=2)
        for t, own in ((k, keys.k), (v, keys.v))
    )
    if bias is not None:
        bias = F.pad(bias, (0, keys.k.shape[-2])).to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    y = y.transpose(1, 2).flatten(2)
    norm = getattr(attention, "norm", None)
    return attention.proj(y if norm is None else norm(y))


def _qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads side by side, (B, T, A) each."""
    if attention.qkv is None:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    qkv = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:  # outside of the Linear in BEiT and EVA
        qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return qkv.chunk(3, dim=-1)  # type: ignore[return-value]


def _rotate(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    return torch.cat(
        [x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], dim=2
    )
