"""Training steps with prompts in the last k blocks: tokens from the files against all blocks again.

    pytest bench/bench_cache.py --benchmark-only

"ours" is a step of a run with ``--cache``: rows read from the memory map, then the last k blocks,
loss, backward and optimizer; "uncached" the same step from images in memory, without the decoding
that it would need. Both take the same bits.
"""

from __future__ import annotations

import statistics

import level
import pytest
import torch
from models_common import NUM_CLASSES, alternate, make_backbone, training_step
from rows import DEVICE, Row, spread

import pgn_fast
from pgn_fast.backbone.schedule import FrozenTokens
from pgn_fast.train.token_store import TokenStore, row_key

ROUNDS = 2 if level.LEVEL == "chosen" else 5
BATCH, PROMPTS = 4, 10


@pytest.fixture(scope="module")
def vit(quick):
    arch = "vit_tiny_patch16_224" if quick else "vit_base_patch16_224"
    return make_backbone(arch, DEVICE, torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("k", level.measured(1, tables=(2, 4)))
def bench_last_blocks(benchmark, quick, record, vit, tmp_path, k):
    """VPT-Deep in the last k of 12 blocks, ViT-B/16, a batch of 4."""
    depth = len(vit.blocks)
    model = pgn_fast.VPT(
        vit, NUM_CLASSES, num_prompts=PROMPTS, layers=range(depth - k, depth)
    ).train()
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    labels = torch.randint(NUM_CLASSES, (BATCH,), device=DEVICE)
    made = model.below(images).tokens
    store = TokenStore(tmp_path, made.shape[1:], made.dtype, {"what": "a benchmark"})
    keys = [row_key(i) for i in range(BATCH)]
    with store.writing(lambda: None):
        store.open()
        store.add(keys, made)
    store.open()

    def cached(_: torch.Tensor) -> torch.Tensor:
        return model(FrozenTokens(store.read(keys).to(DEVICE), depth - k))

    parameters = model.trainable_parameters()
    steps = {
        "ours": training_step(cached, parameters, images, labels),
        "uncached": training_step(model, parameters, images, labels),
    }
    assert torch.equal(cached(images), model(images))
    seconds = alternate(steps, 1 if quick else ROUNDS)
    for who, rounds in seconds.items():
        case = f"VPT-Deep in the last {k} blocks, P={PROMPTS}, ViT-B/16, B={BATCH}, training step"
        facts = {"k": k, "bytes an image": store.row_bytes}
        value = statistics.median(rounds)
        record(Row("cache", case, who, value, "s", spread(rounds), len(rounds), "float32", facts))
    benchmark.pedantic(steps["ours"], rounds=1)
