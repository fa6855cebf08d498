"""timm's ``VisionTransformer`` (ViT, DeiT, CLIP, SigLIP, DINOv2, AIMv2), and distilled DeiT."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from .base import Family, patches_unsupported_reason


class Vit(Family):
    """Positions are added to the tokens once, by ``_pos_embed``."""

    kind = VisionTransformer
    blocks = (Block,)
    attentions = (Attention, AttentionRope)
    prefix_names = ("cls_token", "reg_token")

    def tokens(self, backbone: Any, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        return backbone.patch_drop(backbone._pos_embed(patches)), None

    def embed_unsupported_reason(self, backbone: Any) -> str | None:
        return patches_unsupported_reason(backbone)


class Distilled(Vit):
    """DeiT with a distillation token, whose head is the mean of two."""

    kind = VisionTransformerDistilled
    prefix_names = ("cls_token", "dist_token")

    def pooled_rows(self, backbone: Any) -> int | None:
        return 2

    def embed_unsupported_reason(self, backbone: Any) -> str | None:
        if backbone.reg_token is not None:
            return "its register tokens are left out by timm's own code"
        return super().embed_unsupported_reason(backbone)
