"""Many tasks on one backbone: what mixing them in a batch costs, in one alternating run.

    pytest bench/bench_tasks.py --benchmark-only

"own": the fastest honest alternative without a bank, each task's model on its images, one after the
other; "one task": a batch of the same size that belongs to one task.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from models_common import alternate, make_backbone
from rows import DEVICE, Row, spread

import pgn_fast
from pgn_fast import VPT, TaskBank

ROUNDS = 5
RAGGED = (1, 10, 50, 100)


def bank_of(vit, prompts: list[int], **options) -> tuple[TaskBank, dict[str, torch.nn.Module]]:
    bank, models = TaskBank(vit), {}
    for i, P in enumerate(prompts):
        models[str(i)] = VPT(vit, 100, num_prompts=P, **options).eval()
        bank.add(str(i), models[str(i)])
    return bank, models


def one_by_one(models, images, names):
    def run() -> None:
        with torch.no_grad():
            for image, name in zip(images, names, strict=True):
                models[name](image[None])

    return run


def keep(record, case: str, seconds: dict[str, list[float]]) -> None:
    for who, rounds in seconds.items():
        value = statistics.median(rounds)
        row = Row("tasks", case, who, value, spread=spread(rounds), rounds=len(rounds))
        record(row)


@pytest.fixture(scope="module")
def vit(quick):
    arch = "vit_tiny_patch16_224" if quick else "vit_base_patch16_224"
    return make_backbone(arch, DEVICE, torch.float32).eval().requires_grad_(False)


def bench_equal_prompts(benchmark, quick, record, vit) -> None:
    """A batch of 16 images of 16 tasks, VPT-Deep P=10, beside one of one task."""
    B = 2 if quick else 16
    bank, models = bank_of(vit, [10] * B)
    images, names = torch.randn(B, 3, 224, 224, device=DEVICE), [str(i) for i in range(B)]
    steps = {
        "ours": lambda: bank(images, names),
        "one task": lambda: models["0"](images),
        "own": one_by_one(models, images, names),
    }
    with torch.no_grad():
        seconds = alternate(steps, 1 if quick else ROUNDS)
    keep(record, f"{B} images of {B} tasks, VPT-Deep P=10, ViT-B/16", seconds)
    benchmark.pedantic(steps["ours"], rounds=1)


def bench_unequal_prompts(benchmark, quick, record, vit) -> None:
    """P from {1, 10, 50, 100} in one batch, beside the mean of batches of one P each."""
    B = 4 if quick else 16
    prompts = [RAGGED[i % 4] for i in range(B)]
    bank, models = bank_of(vit, prompts)
    images, names = torch.randn(B, 3, 224, 224, device=DEVICE), [str(i) for i in range(B)]
    steps = {"ours": lambda: bank(images, names), "own": one_by_one(models, images, names)}
    for P in RAGGED:
        same = [str(n) for n in range(B) if prompts[n] == P]
        steps[f"P={P} alone"] = lambda chosen=(same * B)[:B]: bank(images, chosen)
    with torch.no_grad():
        seconds = alternate(steps, 1 if quick else ROUNDS)
    keep(record, f"{B} images, P in {{1, 10, 50, 100}}, VPT-Deep, ViT-B/16", seconds)
    benchmark.pedantic(steps["ours"], rounds=1)


def bench_every(benchmark, quick, record, vit) -> None:
    """16 tasks on one image, prompts in the last 4 blocks: what lies below runs once."""
    count, depth = (2 if quick else 16), len(vit.blocks)
    bank, models = bank_of(vit, [10] * count, layers=range(depth - 4, depth))
    image = torch.randn(1, 3, 224, 224, device=DEVICE)
    names = list(models)
    steps = {
        "ours": lambda: bank.every(image),
        "own": one_by_one(models, image.expand(count, -1, -1, -1), names),
    }
    with torch.no_grad():
        seconds = alternate(steps, 1 if quick else ROUNDS)
    keep(record, f"{count} tasks on one image, prompts in the last 4 blocks, ViT-B/16", seconds)
    benchmark.pedantic(steps["ours"], rounds=1)


def bench_lookup(benchmark, quick, record, vit) -> None:
    """Finding a task among 2 and among 2,000: one batch of no images, names only."""
    sizes, tiny = (2, 20) if quick else (2, 2000), pgn_fast.VPT("pgn_demo_vit", 2, num_prompts=1)
    seconds: dict[str, list[float]] = {}
    for size in sizes:
        bank = TaskBank(tiny.backbone)
        for i in range(size):
            bank.add(str(i), VPT(tiny.backbone, 2, num_prompts=1))
        rounds = []
        for _ in range(200):
            start = time.perf_counter()
            bank.nbytes(str(size // 2))
            rounds.append(time.perf_counter() - start)
        seconds[f"among {size}"] = rounds
    keep(record, "looking a task up", seconds)
    benchmark.pedantic(lambda: None, rounds=1)
