"""The fused operators: public contract, checks, fake implementations and gradients.

Importing a name registers its op under ``torch.ops.pgn_fast``.
"""

from .feedback_round import feedback_round
from .mix_prompts import mix_prompts

__all__ = ["feedback_round", "mix_prompts"]
