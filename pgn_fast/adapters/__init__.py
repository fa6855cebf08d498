"""What was trained, on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

``save_pretrained`` writes an adapter, ``from_pretrained`` puts it in front of its backbone again;
``read_adapter`` and ``build`` are its two halves. A directory may come from a stranger: ``schema``
says what a configuration may say, ``header`` what a weights file may hold, ``files`` how the two
prove that they belong together, ``identity`` which backbone they were trained on.
"""

from .files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .identity import backbone_name
from .load import build, from_pretrained
from .pixels import backbone_pixels
from .save import save_pretrained

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "backbone_name",
    "backbone_pixels",
    "build",
    "from_pretrained",
    "read_adapter",
    "save_pretrained",
]
