"""Input space: prompts as 8-bit pixels, through an ordinary image API."""

from .errors import (
    CodecError,
    ColumnSpaceError,
    ExposureWarning,
    InversionError,
    LayoutError,
    LayoutMismatchError,
    MixingError,
    PositionCancelError,
    PreprocessError,
    SaturationWarning,
    ScaleNotFreeError,
    StaleInversionError,
    UnreachablePromptError,
    UnsupportedPatchEmbedError,
    UnsupportedPromptError,
)
from .gamut import GamutLibrary
from .layout import CanvasLayout
from .library import InvertedLibrary, invert_library
from .patch_map import PatchMap
from .server_spec import ServerSpec
