"""Where prompts come from: a generator that looks at the image (PGN), or parameters (VPT)."""

from .generator import PromptGenerator
from .pixels import PixelPrompts
from .visual import VisualPrompts

__all__ = ["PixelPrompts", "PromptGenerator", "VisualPrompts"]
