"""timm's ``Beit``: BEiT and BEiT v2."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Attention, Block
from timm.models.beit import Beit as TimmBeit
from torch import Tensor

from .base import BareParameters, BiasedScores, after_class_token


class Beit(BiasedScores, BareParameters):
    """A relative position bias of each block, one that all share, or both."""

    kind = TimmBeit
    blocks = (Block,)
    attentions = (Attention,)
    position_modules = ("rel_pos_bias",)

    def tokens(self, backbone: Any, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        x = after_class_token(backbone, patches)
        return x if backbone.pos_embed is None else x + backbone.pos_embed, None

    def biases_scores(self, backbone: Any) -> bool:
        tables = (block.attn.relative_position_bias_table for block in backbone.blocks)
        return backbone.rel_pos_bias is not None or any(t is not None for t in tables)

    def score_bias(self, backbone: Any, i: int) -> Tensor | None:
        shared, attention = backbone.rel_pos_bias, backbone.blocks[i].attn
        bias = None if shared is None else shared()
        if attention.relative_position_bias_table is None:
            return bias
        own = attention._get_rel_pos_bias()
        return own if bias is None else own + bias
