"""The fused operators: public contract, checks, fake implementations and gradients.

Importing a name registers its op under ``torch.ops.pgn_fast``.
"""

from .mix_prompts import mix_prompts

__all__ = ["mix_prompts"]
