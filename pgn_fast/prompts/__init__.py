"""Where prompts come from: a generator that looks at the image (PGN), or parameters (VPT)."""

from .base import Prompter
from .generator import PromptGenerator
from .learned import VisualPrompts
from .pixels import PixelPrompts

__all__ = ["PixelPrompts", "PromptGenerator", "Prompter", "VisualPrompts"]
