"""The fused operators: public contract, checks, fake implementations and gradients.

Importing a name registers its op under ``torch.ops.pgn_fast``.
"""

from .add_layer_norm import add_layer_norm
from .feedback_round import feedback_round
from .frozen_linear import frozen_linear
from .mix_prompts import mix_prompts
from .prompt_attention import prompt_attention
from .prompted_patch_embed import prompted_patch_embed

__all__ = [
    "add_layer_norm",
    "feedback_round",
    "frozen_linear",
    "mix_prompts",
    "prompt_attention",
    "prompted_patch_embed",
]
