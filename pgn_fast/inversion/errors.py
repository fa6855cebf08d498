"""What can go wrong on the way from latent prompts to pixels.

All are ``ValueError``s: the inputs (library, backbone, layout, server) do not allow what was asked.
The messages give the figures that decide it and what would work. The classes are those that a
caller answers in different ways.
"""

from __future__ import annotations


class InversionError(ValueError):
    """Base of all errors of :mod:`pgn_fast.inversion`; by itself: backbone, prompts, mixing or
    preprocessing do not allow it, or the backbone changed since."""


class UnreachablePromptError(InversionError):
    """No patch of this backbone produces the library's tokens: train in gamut."""


class LayoutError(InversionError):
    """The cells of a canvas do not add up, are not those of the training, or do not fit the
    server: choose another layout."""


class CodecError(InversionError):
    """The image codec cannot carry the prompts: choose another one."""


class ExposureWarning(UserWarning):
    """A prompt was dimmed so far that the epsilon of the following LayerNorm attenuates it."""


class SaturationWarning(UserWarning):
    """Prompt pixels ran into 0 or 255 while rounding, where they can absorb no more error."""
