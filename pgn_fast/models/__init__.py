"""What users build: ``PGN`` and ``VPT``, both ``PromptedViT``s, and the two baselines."""

from .base import PromptedViT
from .baselines import FineTuned, LinearProbe
from .pgn import PGN
from .vpt import VPT

__all__ = ["PGN", "VPT", "FineTuned", "LinearProbe", "PromptedViT"]
