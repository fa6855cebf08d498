"""The one schema of every stored figure: a JSON object a line, ``bench/results/*.jsonl``.

suite      "ops", "models", "memory", "server", "inversion", "demo", "tasks", "tune", "input",
           "watch" or "gpu"
case       what was measured, with its sizes, in words; rows of one case are comparable
contender  who did it: "eager", "compile", "timm", "official", "cpu", "ours", ...
value      the figure: a median where it is a time
unit       "s", "bytes", "images/s", "%", ...
spread     (highest - lowest) / median of a time's rounds; null where one round was all
rounds     how often it was measured
dtype      "float32", "bfloat16", ...; null where it has no meaning
facts      what explains the figure: flops, bytes, share of the GEMM peak, sizes
machine    device, cores, threads, versions, and the commit that was measured
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    suite: str
    case: str
    contender: str
    value: float
    unit: str = "s"
    spread: float | None = None
    rounds: int | None = None
    dtype: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine())


@functools.cache
def machine() -> dict[str, Any]:
    """Device, versions, threads and commit."""
    import timm

    return {
        "device": os.environ.get("PGN_FAST_BENCH_MACHINE") or _device(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
        "cuda": torch.version.cuda if DEVICE.type == "cuda" else None,
        "timm": timm.__version__,
        "python": platform.python_version(),
        # a copy without its history is told
        "commit": os.environ.get("PGN_FAST_BENCH_COMMIT") or _commit(),
    }


def _device() -> str:
    """The processor's or the GPU's name; a cloud's processor may hide its model."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    # family and model say which generation an "AMD EPYC" is
    return (
        f"{facts.get('model name', platform.machine())}, "
        f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    )


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def spread(seconds: Iterable[float]) -> float | None:
    """(highest - lowest) / median of a time's rounds."""
    ordered = sorted(seconds)
    if len(ordered) < 2:
        return None
    return round((ordered[-1] - ordered[0]) / ordered[len(ordered) // 2], 4)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file of rows."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read(*paths: Path) -> list[Row]:
    """All rows of the files; where none is named of every stored one, and of the demonstration."""
    rows = [] if paths else _demo(RESULTS / "demo.json")
    for path in paths or sorted(RESULTS.glob("*.jsonl")):
        rows += [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def _demo(path: Path) -> list[Row]:
    """What ``pgn-fast demo --record`` wrote, as rows."""
    told = json.loads(path.read_text(encoding="utf-8"))
    facts = {"device": told["machine"], "threads": told["threads"], **told["versions"]}
    return [
        Row(
            "demo",
            f"digits, {told['split']} split",
            _recipe(told["recipes"][row["method"]]),
            row["top1_mean"],
            "%",
            rounds=len([r for r in told["results"] if r["method"] == row["method"]]),
            facts={
                "sd": row["top1_sd"],
                "trained parameters": row["trained_parameters"],
                "seconds": row["seconds_mean"],
                "peak MB": row["peak_bytes"] / 1e6,
            },
            machine=facts,
        )
        for row in told["rows"]
    ]


def _recipe(recipe: dict[str, Any]) -> str:
    """ "PGN (P=8, K=64)"."""
    letters = {"num_prompts": "P", "library_size": "K"}
    sizes = [f"{s}={recipe['options'][n]}" for n, s in letters.items() if n in recipe["options"]]
    return f"{recipe['label']} ({', '.join(sizes)})" if sizes else recipe["label"]
