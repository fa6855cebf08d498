"""One model's training step in a process of its own, by the kernels that are chosen there.

    python -m pgn_fast.autotune.whole_model DEVICE DTYPE SIZES

Prints the median milliseconds.
"""

from __future__ import annotations

import json
import sys

import torch
from timm.models.vision_transformer import VisionTransformer

from ..models import PGN
from . import cases
from .worker import milliseconds

ROUNDS = 8
DEPTH = 4  # all blocks are alike


def main(arguments: list[str]) -> int:
    name, dtype, sizes = arguments
    device, s = torch.device(name), cases.Sizes(**json.loads(sizes))
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=s.image, patch_size=s.patch, embed_dim=s.D, depth=DEPTH, num_heads=s.h
    ).to(device, getattr(torch, dtype))
    generator = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, s.P * s.K)
    )
    model = PGN(vit, 10, num_prompts=s.P, library_size=s.K, generator=generator).to(device)
    images = torch.randn(s.B, 3, s.image, s.image, device=device, dtype=getattr(torch, dtype))

    def step() -> None:
        model.zero_grad()
        model(images).float().square().mean().backward()

    times = sorted([milliseconds(step, device) for _ in range(ROUNDS + 2)][2:])
    print(times[ROUNDS // 2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
