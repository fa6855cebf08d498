"""timm's ``Eva``: EVA-02, DINOv3, Perception Encoder and ViTs with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor

from .base import BareParameters


class Eva(BareParameters):
    """Queries and keys of patches are rotated in every block; prefix tokens and prompts, which have
    no place in the image, are not."""

    kind = TimmEva
    blocks = (EvaBlock,)
    attentions = (EvaAttention, AttentionRope)
    prefix_names = ("cls_token", "reg_token")

    def tokens(self, backbone: Any, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        return backbone._pos_embed(patches)

    def rotates(self, backbone: Any) -> bool:
        return backbone.rope is not None

    def block_rope(self, backbone: Any, rope: Tensor | None, i: int) -> Tensor | None:
        own = rope is not None and getattr(backbone, "rope_mixed", False)
        return rope[i] if own else rope  # type: ignore[index]

    def run_block(self, block: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        return block(x, rope=rope)

    def qkv(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        if attention.qkv is not None:
            return super().qkv(attention)
        return _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, ...]:
        if attention.qkv is not None:
            return super().project(attention, x)
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def _side_by_side(*parts: Any) -> tuple[Tensor, Tensor | None]:
    """Three Linears as one; a bias that one of them lacks is zero where another has one."""
    weight = torch.cat([p.weight for p in parts])
    if all(p.bias is None for p in parts):
        return weight, None
    zeros = (p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts)
    return weight, torch.cat(list(zeros))
