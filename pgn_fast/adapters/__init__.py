"""What was trained, on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

``save_pretrained`` writes an adapter, ``from_pretrained`` puts it in front of its backbone again.
``baselines`` holds the two models that prompts are compared with; they are saved the same way.
"""

from .store import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    backbone_pixels,
    from_pretrained,
    read_adapter,
    save_pretrained,
)

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "backbone_pixels",
    "from_pretrained",
    "read_adapter",
    "save_pretrained",
]
