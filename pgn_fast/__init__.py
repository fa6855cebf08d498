"""pgn_fast: Prompt Generation Networks and Visual Prompt Tuning for frozen vision transformers.

The public names are loaded when they are first used, so that ``import pgn_fast`` is quick and needs
neither timm nor torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "PGN": "models",
    "VPT": "models",
    "PromptedViT": "models",
    "PromptGenerator": "prompts",
    "Prompter": "prompts",
    "PromptSchedule": "backbone.schedule",
    "Mixture": "backbone.schedule",
    "KeyValues": "backbone.schedule",
    "register_method": "methods",
    "create_model": "methods",
    "GamutLibrary": "inversion",
    "invert": "inversion",
    "from_pretrained": "adapters.repository",
    "load_backbone": "backbone.load",
    "TaskBank": "tasks",
    "capture": "cuda_graphs",
    "fit": "train.fit",
    "RunResult": "train.fit",
    "encode_class_names": "words",
    "backends": "ops.dispatch",
}
# what PEFT has, and what does it here
_ELSEWHERE = {
    "get_peft_model": "pgn_fast.VPT(backbone, num_classes, num_prompts=50) builds the model",
    "PeftModel": "pgn_fast.from_pretrained(directory, backbone) loads an adapter",
    "PeftConfig": "adapter_config.json holds the settings; from_pretrained reads it",
    "VPTConfig": "pgn_fast.VPT takes its settings as arguments: VPT(backbone, 10, num_prompts=50)",
    "PGNConfig": "pgn_fast.PGN takes its settings as arguments: PGN(backbone, 10, num_prompts=16)",
}
_MODULES = (
    "adapters",
    "client",
    "inversion",
    "kernels",
    "models",
    "ops",
    "prompts",
    "reference",
    "tasks",
)

__all__ = ["__version__", *_EXPORTS, *_MODULES]

if TYPE_CHECKING:
    from .adapters.repository import from_pretrained as from_pretrained
    from .backbone.load import load_backbone as load_backbone
    from .backbone.schedule import KeyValues as KeyValues
    from .backbone.schedule import Mixture as Mixture
    from .backbone.schedule import PromptSchedule as PromptSchedule
    from .cuda_graphs import capture as capture
    from .inversion import GamutLibrary as GamutLibrary
    from .inversion import invert as invert
    from .methods import create_model as create_model
    from .methods import register_method as register_method
    from .models import PGN as PGN
    from .models import VPT as VPT
    from .models import PromptedViT as PromptedViT
    from .ops.dispatch import backends as backends
    from .prompts import Prompter as Prompter
    from .prompts import PromptGenerator as PromptGenerator
    from .tasks import TaskBank as TaskBank
    from .train.fit import RunResult as RunResult
    from .train.fit import fit as fit
    from .words import encode_class_names as encode_class_names


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        instead = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
