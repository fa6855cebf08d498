"""Which kernels to use on this very device: verified, measured, remembered (``ops/measured.py``).

Every op, backend and dtype is tried in a process of its own with a time limit: a kernel that hangs,
crashes or gives wrong numbers costs its own result, bars its backend here and is reported.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..ops import dispatch, measured
from . import cases

OPS = tuple(name for name, row in dispatch.OPS.items() if row.timed)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
FASTER = 1.05  # a win by less is noise
CASE_SECONDS = 40.0
WHOLE_ROUNDS = 2  # processes for each side of the comparison of whole models


def autotune(
    device: torch.device,
    *,
    model: str = "vit_base_patch16_224",
    sizes: cases.Sizes | None = None,
    minutes: float = 3.0,
    case_seconds: float = CASE_SECONDS,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Verify and time every kernel on a device.

    Args:
        device: a CPU or CUDA device.
        model: recorded with the result; whose sizes these are.
        sizes: a model's sizes; None: those of ViT-B/16 at batch 8.
        minutes: for all cases; those that do not fit are left out and said to be.
        case_seconds: for one.
        tell: called with one line on each case.

    Returns:
        What ``measured.save`` keeps: "results", one row a case, with a "verdict": "preferred" (the
        op takes this backend here from now on), "slower", "barred", "refused" or "not reached",
        and a "reason"; and "whole_model", where what won is not what runs by default.
    """
    end, sizes = time.monotonic() + minutes * 60, sizes or cases.Sizes()
    rows: list[dict[str, Any]] = []
    tiles: dict[str, Any] = {}
    for dtype in DTYPES[device.type]:
        for op in OPS:
            for backend in BACKENDS[device.type]:
                name = str(dtype).removeprefix("torch.")
                row: dict[str, Any] = {"op": op, "backend": backend, "dtype": name}
                left = min(case_seconds, end - time.monotonic())
                row |= _try(op, backend, dtype, device, sizes, left, whole=left == case_seconds)
                tiles |= row.pop("tiles", {})
                rows.append(row)
                tell(f"{op} {name} {backend}: {row['verdict']} ({row['reason']})")
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = {"measured_at": at, "model": model, "sizes": asdict(sizes), "results": rows}
    found |= {"tiles": tiles} if tiles else {}
    whole = _whole_model(device, sizes, found, end - time.monotonic())
    if whole is not None:
        found["whole_model"] = whole
        tell(f"the whole model: {whole['reason']}")
    return found


def _whole_model(
    device: torch.device, sizes: cases.Sizes, found: dict[str, Any], seconds: float
) -> dict[str, Any] | None:
    """A training step of a model of these sizes by what won and by the defaults, in turns.

    Returns:
        "verdict": "kept", "slower" (the defaults stay) or "not reached", a "reason", and both
        times; None where what won is what runs by default.
    """
    dtype = _first_other_choice(found["results"], device)
    if dtype is None:
        return None
    left = min(seconds, 2 * CASE_SECONDS)
    if left < 1:
        return {"verdict": "not reached", "reason": "not compared, the time was up"}
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as cache:
        measured.save(device, found, Path(cache))
        for tuned in (False, True) * WHOLE_ROUNDS:
            changes = {"PGN_FAST_PREFERENCE": "" if tuned else "off", "XDG_CACHE_HOME": cache}
            words = [str(device), dtype, json.dumps(asdict(sizes))]
            words = command(words, "pgn_fast.autotune.whole_model")
            status, output = run(words, left / (2 * WHOLE_ROUNDS), changes)
            try:
                times[tuned].append(float(output.strip().splitlines()[-1]))
            except (ValueError, IndexError):
                how = f"no answer or exit code {status}"
                if tuned:
                    return {"verdict": "slower", "reason": f"fails by what won ({how}): defaults"}
                return {"verdict": "not reached", "reason": f"fails by the defaults, too ({how})"}
    ours, plain = min(times[True]), min(times[False])
    verdict = "kept" if ours <= plain else "slower"
    reason = f"{ours:.2f} ms a step by what won, {plain:.2f} ms by the defaults: " + (
        "kept" if verdict == "kept" else "the defaults stay"
    )
    return {"verdict": verdict, "reason": reason, "ms": ours, "default_ms": plain}


def _first_other_choice(rows: list[dict[str, Any]], device: torch.device) -> str | None:
    """The first dtype in which what was found is not what runs by default."""
    for row in rows:
        dtype = getattr(torch, row["dtype"])
        default = row["backend"] in dispatch.shipped_preference(row["op"], device, dtype)
        if row["verdict"] == ("slower" if default else "preferred"):
            return str(row["dtype"])
    return None


def _try(
    op: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    sizes: cases.Sizes,
    seconds: float,
    whole: bool = True,
) -> dict[str, Any]:
    """One case; ``whole``: that many seconds are what a kernel may take, not what is left."""
    like = torch.empty(0, dtype=dtype, device=device)
    if reason := dispatch.unsupported_reason(backend, op, like):
        return {"verdict": "refused", "reason": reason}
    if seconds < 1:
        return {"verdict": "not reached", "reason": "the time was up"}
    name = str(dtype).removeprefix("torch.")
    words = [op, backend, name, str(device), json.dumps(asdict(sizes))]
    status, output = run(command(words), seconds)
    if status is None:
        verdict = "barred" if whole else "not reached"
        return {"verdict": verdict, "reason": f"no answer within {seconds:.0f} s"}
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = None
    if status or not isinstance(found, dict):
        last = output.strip().splitlines()[-1:] or ["no output"]
        return {"verdict": "barred", "reason": f"crashed, exit code {status}: {last[0][:200]}"}
    if "wrong" in found:
        return {"verdict": "barred", "reason": found["wrong"]}
    speedup = found["plain_ms"] / found["ms"]
    verdict = "preferred" if speedup >= FASTER else "slower"
    reason = f"{found['ms']:.3f} ms, eager PyTorch {found['plain_ms']:.3f} ms, {speedup:.2f}x"
    return {"verdict": verdict, "reason": reason, "speedup": speedup, **found}


def command(words: list[str], module: str = "pgn_fast.autotune.worker") -> list[str]:
    """The command line of a process that measures."""
    return [sys.executable, "-m", module, *words]


def run(
    words: list[str], seconds: float, changes: Mapping[str, str] = MappingProxyType({})
) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output; the whole process group ends with the time.

    ``changes``: of the environment, in which nothing that was found before counts.
    """
    environment = {**os.environ, "PGN_FAST_PREFERENCE": "off", **changes}
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    return process.returncode, output


def sizes_of(model: str, batch: int) -> cases.Sizes:
    """The sizes of a timm vision transformer; no weights are loaded.

    Raises:
        ValueError: the model is not a vision transformer of timm.
    """
    import timm

    with torch.device("meta"):
        backbone: Any = timm.create_model(model, pretrained=False)
    try:
        height, _ = backbone.patch_embed.img_size
        patch, _ = backbone.patch_embed.patch_size
        heads = backbone.blocks[0].attn.num_heads
    except (AttributeError, TypeError) as error:
        raise ValueError(f"autotune measures vision transformers of timm, not {model}") from error
    return cases.Sizes(B=batch, D=backbone.embed_dim, h=heads, patch=patch, image=height)


def export(device: torch.device, path: Path, results: dict[str, Any]) -> None:
    """Write results with their key, for others to read."""
    path.write_text(json.dumps({"key": measured.key(device), **results}, indent=1) + "\n")
