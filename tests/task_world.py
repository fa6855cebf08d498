"""Small frozen backbones of several families, images for them, and tasks on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import pgn_fast
from pgn_fast import PGN, VPT
from pgn_fast.models import LinearProbe

SIZE, DEPTH, D = 32, 4, 32
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "clip": ("vit_base_patch32_clip_224", {"num_classes": 24}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "rotary": ("vit_small_patch16_rope_224", {}),
    "relative position bias": ("beit_base_patch16_224", {}),
}


def backbone(family: str = "vit", dtype: torch.dtype = torch.float32) -> nn.Module:
    name, options = FAMILIES[family]
    sizes = {"img_size": SIZE, "patch_size": 8, "depth": DEPTH, "embed_dim": D, "num_heads": 4}
    torch.manual_seed(0)
    vit = timm.create_model(name, **{"num_classes": 0, **sizes, **options}).to(dtype)
    for parameter in vit.parameters():  # no weight that is zero or one by construction
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit.eval().requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def write_adapters(root: Path) -> tuple[Any, dict[str, nn.Module]]:
    """Three adapters of the packaged backbone, one a method; the backbone and the models."""
    vit = pgn_fast.load_backbone("pgn_demo_vit")
    made = {
        "cats": VPT(vit, 2, num_prompts=3),
        "dogs": LinearProbe(vit, 4),
        "owls": PGN(vit, 3, num_prompts=2, library_size=4, resolution=32),
    }
    for name, model in made.items():
        labels = [f"{name} {i}" for i in range(model.num_classes)]
        pgn_fast.adapters.save_pretrained(model.eval(), root / name, class_names=labels)
    return vit, made
