"""The smallest world that can be trained in: a tiny ViT with weights on disk, folders of images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from pgn_fast.train.config import TrainConfig

MODEL = "vit_tiny_patch16_224"
SIZES = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def tiny_vit(seed: int = 0, **changes: Any) -> Any:
    """A vision transformer of random weights: 4 patches, D = 32, 2 blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(MODEL, pretrained=False, **SIZES | changes).eval()


def skip_what_older_timm_cannot(name: str) -> None:
    """timm before 1.0.31 has mixed rotary positions in float32 alone."""
    if "rope_mixed" in name:
        pytest.importorskip("timm", minversion="1.0.31")


def transformers_of_the_twins() -> Any:
    """transformers as of the extra "hf": the twins know its layers; else the test is skipped."""
    return pytest.importorskip("transformers", minversion="5.24")


def tiny_vit_kwargs(folder: Path) -> dict[str, Any]:
    """What makes timm load the same tiny ViT from a file in ``folder``."""
    path = folder / "tiny_vit.safetensors"
    if not path.exists():
        safetensors.torch.save_file(tiny_vit().state_dict(), path)
    return {**SIZES, "pretrained": False, "checkpoint_path": str(path)}


def write_images(
    root: Path, per_class: int, classes: tuple[str, ...] = ("blue", "green", "red"), seed: int = 0
) -> Path:
    """Noise of three tints, 12 × 14 pixels, in one folder a class."""
    rng = random.Random(seed)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            levels = bytearray(rng.randbytes(12 * 14 * 3))
            for at in range(c % 3, len(levels), 3):
                levels[at] //= 3
            Image.frombytes("RGB", (14, 12), bytes(levels)).save(root / name / f"{i}.png")
    return root


def tiny_config(world: Path, **values: Any) -> TrainConfig:
    """A run of the tiny ViT on the images in ``world``/data."""
    own = {
        "data": str(world / "data"),
        "model": MODEL,
        "model_kwargs": tiny_vit_kwargs(world),
        "num_prompts": 2,
        "workers": 0,
    }
    return TrainConfig.make(**own | values)
