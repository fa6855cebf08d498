"""Input space: prompts as 8-bit pixels, through an ordinary image API.

    prompter = pgn_fast.invert(model)        # a trained PGN or VPT-Shallow
    canvases = prompter(images)              # uint8, for the untouched backbone

A model that is to be deployed so is best trained in gamut:
``PGN(backbone, token_library=GamutLibrary(256, PatchMap.from_backbone(backbone)))``.
"""

from .deploy import invert as invert
from .errors import CodecError as CodecError
from .errors import ExposureWarning as ExposureWarning
from .errors import InversionError as InversionError
from .errors import LayoutError as LayoutError
from .errors import SaturationWarning as SaturationWarning
from .errors import UnreachablePromptError as UnreachablePromptError
from .find_patches import invert_library as invert_library
from .gamut import GamutLibrary as GamutLibrary
from .layout import CanvasLayout as CanvasLayout
from .library import InvertedLibrary as InvertedLibrary
from .patch_map import PatchMap as PatchMap
from .prompter import RgbPrompter as RgbPrompter
from .prompter import verify as verify
from .report import InversionReport as InversionReport
from .report import ReachabilityReport as ReachabilityReport
from .report import analyze as analyze
from .server_spec import ServerSpec as ServerSpec
