"""Training steps and inference of PGN and VPT against their peers, in one alternating run a case.

Peers: "timm" (timm's blocks with scaled_dot_product_attention, as forward_reference runs them),
"timm compiled" (torch.compile: block by block in training, whole and with frozen weights in
inference), "official" (unfused attention), and as yardsticks "full fine-tuning" and "linear probe"
of the same backbone.

    pytest bench/bench_models.py --benchmark-only                the chosen cases
    pytest bench/bench_models.py --benchmark-only -k "deep and P50"      one case
    PGN_FAST_BENCH=tables pytest bench/bench_models.py --benchmark-only  those of README's tables
    PGN_FAST_BENCH=all pytest bench/bench_models.py --benchmark-only     every case and peer
    PGN_FAST_BENCH_ROUNDS=9, PGN_FAST_BENCH_DTYPE=float32,bfloat16

Peak memory is measured by bench/bench_memory.py, which gives every figure a process of its own.
"""

from __future__ import annotations

import functools
import os
import statistics
from dataclasses import replace

import pytest
import torch
from level import ALL, LEVEL, name
from models_common import (
    NUM_CLASSES,
    Case,
    Step,
    alternate,
    count_flops,
    gemm_peak,
    inference_step,
    make_backbone,
    make_batch,
    set_fused_attention,
    training_step,
    where_time_goes,
)
from rows import DEVICE, Row, spread
from torch import nn

from pgn_fast.backbone.options import FastOptions
from pgn_fast.ops import onednn

B16, B32, L14 = "vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch14_clip_224"
# small batches, so that the default run is short
CHOSEN = [Case("deep", B16, 2, P) for P in (10, 50, 100)] + [Case("pgn", B32, 4, 16)]
TABLES = [Case("deep", B16, 8, P) for P in (10, 50, 100, 200)] + [Case("pgn", B32, 16, 16)]
EVERY = [*TABLES, Case("deep", B16, 8, 1), Case("shallow", B16, 8, 50), Case("pgn", B16, 4, 16)]
EVERY += [Case("deep", L14, 2, P) for P in (10, 50, 100, 200)]
CASES = {"chosen": CHOSEN, "tables": TABLES, "all": EVERY}[LEVEL]
ROUNDS = int(os.environ.get("PGN_FAST_BENCH_ROUNDS", "3"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["train", "infer"])
def bench_model(benchmark, quick, record, dtype, case: Case, mode: str) -> None:
    if quick:  # --benchmark-disable: the same steps, small and uncompiled
        case = replace(case, arch="vit_tiny_patch16_224", batch=1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    images, labels = make_batch(case, DEVICE, dtype)

    def step(model: nn.Module, forward) -> Step:
        if mode == "infer":
            return inference_step(forward, images)
        return training_step(forward, model.trainable_parameters(), images, labels)

    vit = make_backbone(case.arch, DEVICE, dtype)
    ours = case.model(vit).train(mode == "train")
    steps = {"ours": step(ours, ours), "timm": step(ours, ours.forward_reference)}
    if ALL and mode == "train" and case.num_prompts == 50:
        for memory in ("balanced", "min"):
            model = case.model(vit, memory)
            steps[f"ours, {memory}"] = step(model, model)
    if ALL and case.num_prompts in (16, 50):
        packed = case.model(vit, FastOptions(packed=True)).train(mode == "train")
        steps["ours, packed"] = step(packed, packed)
    if case.num_prompts == 50 and _runs_in_int8(mode, dtype):
        rounded = case.model(vit, FastOptions(weights="int8")).eval()
        steps["ours, int8"] = step(rounded, rounded)
    # torch.compile takes longer than the steps themselves
    if not quick and (ALL or case.num_prompts == 50 or (LEVEL, case.method) == ("tables", "pgn")):
        steps["timm compiled"] = step(*_compiled(case, mode, dtype))
    if ALL and case.num_prompts in (16, 50, 100):
        official = case.model(make_backbone(case.arch, DEVICE, dtype), fast=False)
        set_fused_attention(official.backbone, False)
        steps["official"] = step(official.train(mode == "train"), official.forward_reference)
    if ALL and case.method == "deep" and case.num_prompts == 50:
        steps |= _yardsticks(case, mode, images, labels)

    seconds = alternate(steps, 1 if quick else ROUNDS)
    keep(record, f"{case} {mode}", seconds, dtype)
    if not quick:
        ours, flops = statistics.median(seconds["ours"]), count_flops(steps["ours"])
        facts = {
            "GEMM peak": flops / ours / _gemm_peak(dtype),
            "counted FLOPs": count_flops(steps["timm"]) / flops,
        }
        if ALL and case.num_prompts == 50 and case.method == "deep":
            facts |= where_time_goes(steps["ours"])
        for what, share in facts.items():
            record(Row("models", f"{case} {mode}", what, share, "ratio", dtype=name(dtype)))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.skipif(not ALL, reason="measured with PGN_FAST_BENCH=all")
def bench_cost_of_prompts(benchmark, quick, record, dtype) -> None:
    """Our training step at different P on one backbone, alternating: what a prompt costs."""
    arch, batch = ("vit_tiny_patch16_224", 1) if quick else (B16, 8)
    vit = make_backbone(arch, DEVICE, dtype)
    steps = {}
    for num_prompts in (1, 50, 100, 200):
        case = Case("deep", arch, batch, num_prompts)
        model = case.model(vit).train()
        images, labels = make_batch(case, DEVICE, dtype)
        steps[f"P={num_prompts}"] = training_step(
            model, model.trainable_parameters(), images, labels
        )
    seconds = alternate(steps, 1 if quick else 7)
    keep(record, "cost of prompts, deep-base/16-B8 train", seconds, dtype)
    benchmark.pedantic(lambda: None, rounds=1)


def keep(record, case: str, seconds: dict[str, list[float]], dtype: torch.dtype) -> None:
    for contender, rounds in seconds.items():
        record(
            Row(
                "models",
                case,
                contender,
                statistics.median(rounds),
                spread=spread(rounds),
                rounds=len(rounds),
                dtype=name(dtype),
            )
        )


def _runs_in_int8(mode: str, dtype: torch.dtype) -> bool:
    floats = mode == "infer" and DEVICE.type == "cpu" and dtype == torch.float32
    return floats and onednn.int8_missing() is None


@functools.cache
def _gemm_peak(dtype: torch.dtype) -> float:
    return gemm_peak(DEVICE, dtype)


def _compiled(case: Case, mode: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The reference under torch.compile, each mode as it is fastest: whole with the weights as
    constants in inference; block by block (12 blocks share one graph) in training."""
    model = case.model(make_backbone(case.arch, DEVICE, dtype), fast=False).train(mode == "train")
    if mode == "infer":
        whole = torch.compile(model, options={"freezing": True})
        return model, whole  # type: ignore[return-value]
    for block in model.backbone.blocks:
        block.compile()
    return model, model


def _yardsticks(case: Case, mode: str, images: torch.Tensor, labels: torch.Tensor):
    dtype = images.dtype
    full = make_backbone(case.arch, DEVICE, dtype)
    full.reset_classifier(NUM_CLASSES)
    full.to(DEVICE, dtype)
    if mode == "infer":
        return {"plain backbone": inference_step(full.eval(), images)}
    probe = make_backbone(case.arch, DEVICE, dtype).eval().requires_grad_(False)
    head = nn.Linear(probe.embed_dim, NUM_CLASSES).to(DEVICE, dtype)
    frozen = lambda x: head(probe(x))
    return {
        "full fine-tuning": training_step(full, list(full.parameters()), images, labels),
        "linear probe": training_step(frozen, list(head.parameters()), images, labels),
    }
