"""Peak activation memory of one training step, each figure in a process of its own.

    python bench/bench_memory.py [--rows FILE.jsonl] [--batch 8] [--arch vit_base_patch16_224]

On the CPU: the highest resident memory during a step above that before it (Linux), freed memory
being given back at once. On CUDA: the allocator's own peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import rows

PLANS = ("timm", "official", "fast", "balanced", "min")


def measure(arch: str, batch: int, num_prompts: int, plan: str) -> int:
    """Bytes that one VPT-Deep step takes above what model and batch hold."""
    import torch
    from models_common import Case, make_backbone, make_batch, set_fused_attention, training_step

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case("deep", arch, batch, num_prompts)
    model = case.model(
        make_backbone(arch, device, torch.float32), fast=plan in PLANS[2:] and plan
    ).train()
    set_fused_attention(model.backbone, plan != "official")
    images, labels = make_batch(case, device, torch.float32)
    forward = model.forward_reference if plan in ("timm", "official") else model
    parameters = model.trainable_parameters()
    # a small step first: libraries set up their buffers, the engine folds
    training_step(forward, parameters, images[:1], labels[:1])()
    step = training_step(forward, parameters, images, labels)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--one", nargs=2, metavar=("P", "PLAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.arch, args.batch, int(args.one[0]), args.one[1]))
        return
    kept: list[rows.Row] = []
    wanted = [(50, plan) for plan in PLANS] + [(P, p) for P in (1, 200) for p in ("timm", "fast")]
    # every freed block goes back to the system, so that resident memory is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for num_prompts, plan in wanted:
        command = [sys.executable, __file__, "--arch", args.arch, "--batch", str(args.batch)]
        done = subprocess.run(
            [*command, "--one", str(num_prompts), plan],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        peak = int(done.stdout.split()[-1])
        case = f"VPT-Deep step, {args.arch}, B={args.batch}, P={num_prompts}"
        kept.append(rows.Row("memory", case, plan, peak, "bytes", dtype="float32"))
        print(f"P={num_prompts:<4d} {plan:9s} {peak / 2**20:8.1f} MiB", flush=True)
    if args.rows:
        rows.write(args.rows, kept)


if __name__ == "__main__":
    main()
