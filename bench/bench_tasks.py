"""Many tasks on one backbone: what mixing them in a batch costs, in one alternating run.

    pytest bench/bench_tasks.py --benchmark-only

"own": the fastest honest alternative without a bank, each task's model on its images, one after the
other; "one task": a batch of the same size that belongs to one task. A ratio is the median over the
rounds of each round's own, so that what slows the machine down meets both sides.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from level import LEVEL
from models_common import Step, alternate, make_backbone
from rows import DEVICE, Row, spread
from torch import Tensor, nn

from pgn_fast import PGN, VPT, PromptGenerator, TaskBank
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.ops import prompt_attention

# images of a batch and tasks in memory: few in the default run, which is short
BATCH, ROUNDS, RESIDENTS = (4, 3, 200) if LEVEL == "chosen" else (16, 5, 2000)
RAGGED = (1, 10, 50, 100)
Seconds = dict[str, list[float]]


@pytest.fixture(scope="module")
def vit(quick):
    arch = "vit_tiny_patch16_224" if quick else "vit_base_patch16_224"
    return make_backbone(arch, DEVICE, torch.float32).eval().requires_grad_(False)


@pytest.fixture
def compare(benchmark, quick, record) -> Iterator[Callable[..., None]]:
    """``compare(case, steps, peers)``: time the steps in turn, and ours against others' means."""

    def timed(case: str, steps: dict[str, Step], peers: dict[str, Sequence[str]]) -> None:
        with torch.no_grad():
            seconds = alternate(steps, 1 if quick else ROUNDS)
        keep(record, case, seconds)
        for name, members in peers.items():
            rounds = zip(seconds["ours"], *(seconds[m] for m in members), strict=True)
            ratios = [statistics.mean(others) / ours for ours, *others in rounds]
            row = Row("tasks", case, name, statistics.median(ratios), "ratio")
            record(row)

    yield timed
    benchmark.pedantic(lambda: None, rounds=1)


def keep(record: Callable[[Row], None], case: str, seconds: Seconds) -> None:
    for who, rounds in seconds.items():
        value = statistics.median(rounds)
        record(Row("tasks", case, who, value, spread=spread(rounds), rounds=len(rounds)))


def bank_of(models: Sequence[nn.Module]) -> tuple[TaskBank, dict[str, nn.Module]]:
    """A bank of models on one backbone, named after their places."""
    named = {str(n): model.eval() for n, model in enumerate(models)}
    bank = TaskBank(models[0].backbone)
    for name, model in named.items():
        bank.add(name, model)
    return bank, named


def one_by_one(models: dict[str, nn.Module], images: Tensor) -> Step:
    def run() -> None:
        for name, image in zip(models, images, strict=True):
            models[name](image[None])

    return run


def bench_equal_prompts(compare, quick, vit) -> None:
    """A batch of as many tasks as images, VPT-Deep P=10, beside one of one task."""
    B = 2 if quick else BATCH
    bank, models = bank_of([VPT(vit, 100, num_prompts=10) for _ in range(B)])
    images, names = torch.randn(B, 3, 224, 224, device=DEVICE), list(models)
    steps = {
        "ours": lambda: bank(images, names),
        "one task": lambda: models["0"](images),
        "own": one_by_one(models, images),
    }
    peers = {"ours over one task": ["one task"], "ours over own": ["own"]}
    compare(f"{B} images of {B} tasks, VPT-Deep P=10, ViT-B/16", steps, peers)


def bench_gemms(compare, quick, vit) -> None:
    """The blocks' GEMMs alone, by the rows of all images or of one at a time: what a
    batch can win on a machine that one image keeps busy."""
    B = 2 if quick else BATCH
    T, depth = vit.patch_embed.num_patches + vit.num_prefix_tokens, len(vit.blocks)
    block = FastBackbone(vit).cache.weights(torch.float32)[1]  # as the engine packs them
    layers = (block.qkv, block.out, block.fc1, block.fc2)
    inputs = [torch.randn(B, T, layer.weight.shape[1], device=DEVICE) for layer in layers]

    def products(rows: int) -> None:
        for _ in range(depth):
            for layer, x in zip(layers, inputs, strict=True):
                for part in x.split(rows):
                    layer(part.flatten(0, 1))

    steps = {"ours": lambda: products(B), "own": lambda: products(1)}
    case = f"of that the GEMMs: {B} images at once, or one by one"
    compare(case, steps, {"ours over own": ["own"]})


def bench_unequal_prompts(compare, quick, vit) -> None:
    """P from {1, 10, 50, 100} in one batch, beside the mean of batches of one P each."""
    B = 4 if quick else BATCH
    bank, models = bank_of([VPT(vit, 100, num_prompts=RAGGED[n % 4]) for n in range(B)])
    images, names = torch.randn(B, 3, 224, 224, device=DEVICE), list(models)
    steps = {"ours": lambda: bank(images, names), "own": one_by_one(models, images)}
    parts = {f"P={P} alone": names[n::4] * 4 for n, P in enumerate(RAGGED)}
    for part, chosen in parts.items():
        steps[part] = lambda chosen=chosen: bank(images, chosen)
    peers = {"ours over the mean of its parts": list(parts), "ours over own": ["own"]}
    compare(f"{B} images, P in {{1, 10, 50, 100}}, VPT-Deep, ViT-B/16", steps, peers)


def bench_ragged_attention(compare, quick) -> None:
    """Attention of 16 images whose tasks have unequal P: one call, or one for each P.

    What the second has to do beside the op is counted: keys put together by P, results joined.
    """
    B, h, T, d = (4, 2, 20, 16) if quick else (16, 12, 197, 64)
    q, k, v = torch.randn(B, T, 3, h, d, device=DEVICE).permute(2, 0, 3, 1, 4).unbind(0)
    tasks = [torch.randn(RAGGED[n * 4 // B], 2, h, d, device=DEVICE) for n in range(B)]
    ends = torch.tensor([len(t) for t in tasks]).cumsum(0)
    ranges = torch.stack([ends - torch.tensor([len(t) for t in tasks]), ends], dim=1).to(DEVICE)

    def one_call() -> Tensor:
        keys, values = torch.cat(tasks).permute(1, 2, 0, 3).unbind(0)
        return prompt_attention(q, k, v, keys, values, ranges=ranges)

    def by_length() -> Tensor:
        done = []
        for n in range(0, B, B // 4):
            at = slice(n, n + B // 4)
            keys, values = torch.stack(tasks[at]).permute(2, 0, 3, 1, 4).unbind(0)
            out = prompt_attention(q[at], k[at], v[at], keys, values)
            done.append(out.transpose(1, 2).flatten(2))
        return torch.cat(done)

    steps = {"ours": repeated(one_call, quick), "a call for each P": repeated(by_length, quick)}
    peers = {"ours over a call for each P": ["a call for each P"]}
    compare(f"attention of {B} images, P in {{1, 10, 50, 100}}, ten times", steps, peers)


def repeated(step: Step, quick: bool) -> Step:
    return lambda: [step() for _ in range(1 if quick else 10)]


def bench_every(compare, quick, vit) -> None:
    """Many tasks on one image, prompts in the last 4 blocks: what lies below runs once."""
    count, depth = (2 if quick else BATCH), len(vit.blocks)
    last = range(depth - 4, depth)
    bank, models = bank_of([VPT(vit, 100, num_prompts=10, layers=last) for _ in range(count)])
    image = torch.randn(1, 3, 224, 224, device=DEVICE)
    own = one_by_one(models, image.expand(count, -1, -1, -1))
    case = f"{count} tasks on one image, prompts in the last 4 blocks, ViT-B/16"
    compare(case, {"ours": lambda: bank.every(image), "own": own}, {"ours over own": ["own"]})


def bench_generators(compare, quick, vit) -> None:
    """As many PGN tasks as images, and of that the generators: one after the other, or as one."""
    B = 2 if quick else BATCH
    bank, models = bank_of([PGN(vit, 100) for _ in range(B)])
    images, names = torch.randn(B, 3, 224, 224, device=DEVICE), list(models)
    steps = {"ours": lambda: bank(images, names), "own": one_by_one(models, images)}
    compare(f"{B} images of {B} tasks, PGN P=16, ViT-B/16", steps, {"ours over own": ["own"]})

    makers = [PromptGenerator(vit.embed_dim).eval().generator.to(DEVICE) for _ in range(B)]

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(makers[0], (weights, buffers), (image[None],))[0]

    def as_one() -> Tensor:
        # another batch has other tasks: their weights come together for it
        return torch.func.vmap(call)(*torch.func.stack_module_state(makers), images)

    one_after_the_other = lambda: [m(x[None]) for m, x in zip(makers, images, strict=True)]
    steps = {
        "ours": repeated(one_after_the_other, quick),
        "vmap, grouped convolutions": repeated(as_one, quick),
    }
    peers = {"ours over vmap": ["vmap, grouped convolutions"]}
    compare(f"of that the generators: {B} ResNet-10, ten times", steps, peers)


def bench_residents(benchmark, quick, record, vit) -> None:
    """Thousands of tasks in memory: what they take, and whether any of it depends on the others."""
    sizes = (2, 20) if quick else (2, RESIDENTS)
    bank, seconds = TaskBank(vit), {}
    make = lambda: VPT(vit, 100, num_prompts=10).eval()
    gc.collect()
    before = resident_bytes()
    for size in sizes:
        for n in range(len(bank), size):
            bank.add(str(n), make())
        names = [str(n * size // 100 % size) for n in range(100)]
        new = {f"new {n}": make() for n in range(20)}
        seconds |= {
            f"look-up among {size:,}": times(bank.nbytes, [(name,) for name in names]),
            f"add among {size:,}": times(bank.add, list(new.items())),
            f"remove among {size:,}": times(bank.remove, [(name,) for name in new]),
        }
        del new
    gc.collect()
    case = f"{sizes[-1]:,} tasks, VPT-Deep P=10, 100 classes, ViT-B/16"
    keep(record, case, seconds)
    record(Row("tasks", case, "bytes they are said to take", bank.resident_bytes, "bytes"))
    record(Row("tasks", case, "growth of the process", resident_bytes() - before, "bytes"))
    benchmark.pedantic(lambda: None, rounds=1)


def times(call: Callable[..., object], calls: Sequence[tuple[object, ...]]) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for arguments in calls:
        start = time.perf_counter()
        call(*arguments)
        seconds.append(time.perf_counter() - start)
    return seconds


def resident_bytes() -> int:
    """Of this process, in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
