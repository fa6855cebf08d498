"""What can go wrong on the way from latent prompts to pixels; one class for each cause.

All are ``ValueError``s: the inputs (library, backbone, layout, server) do not allow what was asked.
The messages give the figures that decide it and what would work.
"""

from __future__ import annotations


class InversionError(ValueError):
    """Base of all refusals of :mod:`pgn_fast.inversion`."""


class UnsupportedPatchEmbedError(InversionError):
    """The patch embedding is not one affine map per patch (hybrid stem, overlap, inner norm)."""


class UnsupportedPromptError(InversionError):
    """The prompts do not enter at the input only (VPT-Deep), so that no image can carry them."""


class UnreachablePromptError(InversionError):
    """Library tokens lie outside the gamut: no 8-bit patch produces them."""


class ColumnSpaceError(InversionError):
    """embed_dim exceeds 3 * patch_size**2: no image, of any amplitude, produces the library."""


class MixingError(InversionError):
    """The mixture coefficients do not sum to one, so that mixing pixels is not mixing tokens."""


class ScaleNotFreeError(InversionError):
    """scale="auto" on a backbone in which the scale of a token matters."""


class PositionCancelError(InversionError):
    """Cancelling the position embedding of a prompt's cell takes (nearly) the whole gamut."""


class LayoutError(InversionError):
    """The cells of a canvas do not add up, or the server cannot take the canvas."""


class LayoutMismatchError(InversionError):
    """A library is used in another layout than the one that it was made for."""


class PreprocessError(InversionError):
    """The server's preprocessing changed the prompts' pixels."""


class CodecError(InversionError):
    """The image codec cannot carry the prompts."""


class StaleInversionError(InversionError):
    """The backbone's input side changed since the library was inverted."""


class ExposureWarning(UserWarning):
    """A prompt was dimmed so far that the epsilon of the following LayerNorm attenuates it."""


class SaturationWarning(UserWarning):
    """Prompt pixels ran into 0 or 255 while rounding, where they can absorb no more error."""
