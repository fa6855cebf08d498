"""Checkpoints of the official PGN code (github.com/jochemloedeman/PGN) in this package's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .._stored import check_kind, check_numbers, read_archive
from ..errors import UserError, as_user_error, brief, shown

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
_DIMENSIONS = {
    "token_library": 2,
    "generator.stem.0.weight": 4,
    "generator.head.bias": 1,
}


def read_official(
    source: str | PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and renamed tensors of an official checkpoint; see ``convert_official``.

    Args:
        source: the path of a ``.pt`` or Lightning ``.ckpt`` file, or its state dict.

    Raises:
        UserError: (a ValueError) no such file, damaged, or no official PGN; it names the file.
    """
    if isinstance(source, Mapping):
        return convert_official(source)
    path = Path(source)
    content = read_archive(path)
    try:
        return convert_official(content)
    except ValueError as error:
        raise UserError(f"{path}: {brief(error, 1000)}") from error


def official_name(name: Any) -> str:
    """The name in ``PromptGenerator`` of a tensor of the official ``TLPGN``."""
    for pattern, ours in _RENAMED if isinstance(name, str) else ():
        renamed, count = re.subn(pattern, ours, name)
        if count:
            return renamed
    raise ValueError(f"{shown(name)} is no tensor of the official PGN with a ResNet-10")


def convert_official(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and renamed tensors of an official state dict, the PGN's or a whole Lightning model's.

    Returns:
        ``PromptGenerator``'s arguments as far as tensors tell them, and its state dict.

    Raises:
        ValueError: a tensor is missing, has no place in a ResNet-10 with token library, or holds
            numbers that are not finite.
    """
    # a Lightning checkpoint holds the whole model's state; the PGN is its pgn_module
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"no official PGN checkpoint: it holds a {type(checkpoint).__name__}")
    inner = {
        name: value
        for name, value in checkpoint.items()
        if isinstance(name, str) and name.startswith(_MODULE)
    } or checkpoint
    state: dict[str, Tensor] = {}
    for name, value in inner.items():
        ours = official_name(name.removeprefix(_MODULE) if isinstance(name, str) else name)
        check_kind(shown(name), value)
        state[ours] = value
    if missing := [name for name in _DIMENSIONS if name not in state]:
        raise ValueError(f"no official PGN checkpoint: it lacks {', '.join(missing)}")
    for name, dimensions in _DIMENSIONS.items():
        if state[name].ndim != dimensions or 0 in state[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(state[name].shape)}, not {dimensions} dimensions of "
                "at least 1"
            )
    with as_user_error():
        check_numbers(state)
    library_size, embed_dim = state["token_library"].shape
    num_prompts, rest = divmod(len(state["generator.head.bias"]), library_size)
    if rest or not num_prompts:
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
