"""Checkpoints of the official PGN code (github.com/jochemloedeman/PGN) in this package's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# official name -> ours, in ResNet10 and _ResidualBlock
_RENAMED = (
    (r"^tl_vectors$", "token_library"),
    (r"^model\.input_net\.([01])\.", r"generator.stem.\1."),
    (r"^model\.blocks\.(\d+)\.net\.0\.", r"generator.blocks.\1.conv1."),
    (r"^model\.blocks\.(\d+)\.net\.1\.", r"generator.blocks.\1.norm1."),
    (r"^model\.blocks\.(\d+)\.net\.3\.", r"generator.blocks.\1.conv2."),
    (r"^model\.blocks\.(\d+)\.net\.4\.", r"generator.blocks.\1.norm2."),
    (r"^model\.blocks\.(\d+)\.downsample\.", r"generator.blocks.\1.shortcut."),
    (r"^model\.output_net\.2\.", "generator.head."),
)
_MODULE = "pgn_module."


def official_name(name: str) -> str:
    """The name in ``PromptGenerator`` of a tensor of the official ``TLPGN``."""
    for pattern, ours in _RENAMED:
        renamed, count = re.subn(pattern, ours, name)
        if count:
            return renamed
    raise ValueError(f"{name!r} is no tensor of the official PGN with a ResNet-10")


def convert_official(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and renamed tensors of an official state dict, the PGN's or a whole Lightning model's.

    Returns:
        ``PromptGenerator``'s arguments as far as tensors tell them, and its state dict.

    Raises:
        ValueError: a tensor is missing, or has no place in a ResNet-10 with token library.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"no official PGN checkpoint: it holds a {type(checkpoint).__name__}")
    # a Lightning checkpoint holds the whole model's state; the PGN is its pgn_module
    checkpoint = checkpoint.get("state_dict", checkpoint)
    inner = {n: t for n, t in checkpoint.items() if n.startswith(_MODULE)} or checkpoint
    state = {official_name(name.removeprefix(_MODULE)): value for name, value in inner.items()}
    needed = ("token_library", "generator.stem.0.weight", "generator.head.bias")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"no official PGN checkpoint: it lacks {', '.join(missing)}")
    library_size, embed_dim = state["token_library"].shape
    num_prompts, rest = divmod(len(state["generator.head.bias"]), library_size)
    if rest:
        raise ValueError(
            f"the generator's {len(state['generator.head.bias'])} outputs are no multiple of the "
            f"{library_size} library tokens"
        )
    blocks = len({name for name in state if name.endswith(".conv1.weight")})
    # every group but the first begins with a block whose shortcut is a convolution
    groups = 1 + len({name for name in state if name.endswith(".shortcut.weight")})
    channels, in_chans = state["generator.stem.0.weight"].shape[:2]
    settings = {
        "embed_dim": embed_dim,
        "num_prompts": num_prompts,
        "library_size": library_size,
        "generator_kwargs": {
            "channels": channels,
            "groups": groups,
            "blocks_per_group": blocks // groups,
            "in_chans": in_chans,
        },
    }
    return settings, state
