"""What it costs to notice that frozen weights were written, beside an inference of one image.

    python -m pytest bench/bench_watch.py

``watch`` is what each forward adds; the goal is 1 % of ``forward``, ViT-B/16 at batch 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import pgn_fast


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    model = pgn_fast.VPT(backbone, 10, num_prompts=10).eval()
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))  # folds
    return model


def test_forward(benchmark: BenchmarkFixture, model: Any) -> None:
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        benchmark.pedantic(model, args=(images,), warmup_rounds=3, rounds=30)


@pytest.mark.parametrize("what", ["all", "structure", "bytes", "whole"])
def test_watch(benchmark: BenchmarkFixture, model: Any, what: str) -> None:
    watch = model.engine.cache._shared.watch
    run = {
        "all": model.engine.cache.follow,
        "structure": watch.same_structure,
        "bytes": watch.same_bytes,
        "whole": lambda: watch.same_bytes(whole=True),
    }[what]
    benchmark.pedantic(run, warmup_rounds=3, rounds=30 if what == "whole" else 300)
