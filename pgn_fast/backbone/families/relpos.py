"""timm's ``VisionTransformerRelPos``: a relative position bias in place of position embeddings."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from .. import written
from .base import BiasedScores, after_class_token


class RelPos(BiasedScores):
    """A relative position bias of each block, or one that all share."""

    kind = VisionTransformerRelPos
    blocks = (RelPosBlock,)
    attentions = (RelPosAttention,)
    position_modules = ("shared_rel_pos",)

    def tokens(self, backbone: Any, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        return after_class_token(backbone, patches), None

    def biases_scores(self, backbone: Any) -> bool:
        return True

    def score_bias(self, backbone: Any, i: int) -> Tensor | None:
        own = backbone.blocks[i].attn.rel_pos
        return (backbone.shared_rel_pos if own is None else own).get_bias()

    def run_block(self, block: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        if not isinstance(block, ResPostRelPosBlock):
            return super().run_block(block, x, rope, bias)
        # its norms come after attention and MLP
        x = x + block.drop_path1(block.norm1(written.attend(self, block.attn, x, bias=bias)))
        return x + block.drop_path2(block.norm2(block.mlp(x)))
