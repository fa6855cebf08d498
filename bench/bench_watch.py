"""What it costs to notice that frozen weights were written, beside an inference of one image.

    pytest bench/bench_watch.py --benchmark-only

"all" is what each forward adds; the goal is 1 % of "forward", ViT-B/16 at batch 1.
"""

from __future__ import annotations

import timm
import torch

import pgn_fast


def bench_watch(measure, quick):
    arch = "test_vit" if quick else "vit_base_patch16_224"
    backbone = timm.create_model(arch, num_classes=0)
    model = pgn_fast.VPT(backbone, 10, num_prompts=10).eval()
    images = torch.randn(1, 3, *backbone.patch_embed.img_size)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    forward()  # folds
    watch = model.engine.cache._shared.watch
    measure(
        {
            "forward": forward,
            "all": model.engine.cache.follow,
            "structure": watch.same_structure,
            "bytes": watch.same_bytes,
            "every byte": lambda: watch.same_bytes(whole=True),
        },
        suite="watch",
        case=f"frozen weights watched, {arch}, B=1",
    )
