"""Where the time of training input goes, on 2,000 photos: of an image, and of a training step.

    python bench/profile_input.py [--images 2000] [--size 500 375] [--model-size 224]
    python bench/profile_input.py --train vit_tiny_patch16_224 pgn_demo_vit --rows input.jsonl

The first prints what decoding, transforms and batching take of an image, in CPU time of one thread
(``time.process_time``), so that a busy machine does not distort it. The second trains VPT-Deep on
the photos for an epoch, with ``--stats``, one thread and two processes that read images; the
weights of timm's models are random. Photos are made up: smooth fields with some grain, which JPEG
compresses as it does photos.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rows
import timm
import torch
from PIL import Image

from pgn_fast.backbone.load import DEMO_NAME
from pgn_fast.images import read_image
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.loader import collate, eval_transform, pixels_to_keep, train_transform
from pgn_fast.train.loop import train
from pgn_fast.train.seeding import seeded

WORKERS = 2


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEGs of quality 90, in the folders of two classes."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = rng.integers(0, 256, (9, 12, 3), np.uint8)
        field = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, field.shape, np.int16)
        paths.append(folder / "ab"[i % 2] / f"{i}.jpg")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray((field + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def per_image(work: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
    """CPU milliseconds an item, and the results."""
    began = time.process_time()
    results = [work(item) for item in items]
    return 1000 * (time.process_time() - began) / len(items), results


def split_of_a_step(photos: Path, model: str, batch_size: int) -> list[rows.Row]:
    """What ``--stats`` tells of an epoch: the phases of a step, and the share outside of forward
    and backward."""
    given: dict[str, Any] = {"model": model}
    with tempfile.TemporaryDirectory() as name:
        if model != DEMO_NAME:  # which is no model of timm's, and has its weights in the package
            given["pretrained_path"] = str(Path(name) / "weights.pt")
            torch.save(timm.create_model(model).state_dict(), given["pretrained_path"])
        config = TrainConfig.make(
            data=str(photos),
            method="vpt-deep",
            num_prompts=10,
            head_init="zero",
            epochs=1,
            batch_size=batch_size,
            workers=WORKERS,
            stats=True,
            **given,
        )
        told = train(config, Path(name) / "run")["stats"]
    case = f"VPT-Deep P=10, {model}, B={batch_size}, {WORKERS} workers"
    facts = {"step ms": told["step_ms"], "photos": sum(1 for _ in photos.glob("*/*.jpg"))}
    row = lambda who, value, unit: rows.Row(
        *("input", case, who, value, unit), rounds=told["steps"], dtype="float32", facts=facts
    )
    found = [row(phase, ms / 1000, "s") for phase, ms in told["phases_ms"].items()]
    share = 100 * told["phases_ms"]["loader"] / told["step_ms"]
    found.append(row("loader's share", share, "%"))
    return [*found, row("outside of forward and backward", told["outside_forward_backward"], "%")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375))
    parser.add_argument("--model-size", type=int, default=224)
    parser.add_argument("--train", nargs="+", metavar="MODEL", help="timm's names")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write, of --train")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), args.images, tuple(args.size))
            for model in args.train:
                made = split_of_a_step(Path(folder), model, args.batch_size)
                for one in made:
                    print(f"{one.case}: {one.contender} {one.value:.4g} {one.unit}", flush=True)
                found += made
                if args.rows:  # what is measured is kept, whatever becomes of the next model
                    rows.write(args.rows, found)
        return
    pixels = {
        "input_size": (3, args.model_size, args.model_size),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    config = TrainConfig.make(data="photos")
    # as a run takes them (bytes, normalized on the device), and normalized here
    transforms: dict[str, Any] = {
        "training": train_transform(config, pixels, normalize=False),
        "evaluation": eval_transform(pixels, normalize=False),
        "training, normalized": train_transform(config, pixels),
        "evaluation, normalized": eval_transform(pixels),
    }
    keep = pixels_to_keep(config, pixels)
    totals: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), args.images, tuple(args.size))
        bytes_ = sum(path.stat().st_size for path in paths) / len(paths)
        for begin in range(0, len(paths), 64):
            batch = paths[begin : begin + 64]
            per_image(read_image, batch)  # files and memory are fresh the first time
            whole_ms, images = per_image(read_image, batch)
            keep_ms, _ = per_image(lambda path: read_image(path, at_least=keep), batch)
            found = {"decode, whole": whole_ms, f"decode, {keep} px kept": keep_ms}
            for name, transform in transforms.items():
                with seeded(begin):
                    found[f"transform, {name}"], tensors = per_image(transform, images)
                samples = [(tensor, 0, i) for i, tensor in enumerate(tensors)]
                collate_ms, _ = per_image(lambda _, samples=samples: collate(samples), [None])
                found[f"batch, {name}"] = collate_ms / len(batch)
            for name, value in found.items():
                totals.setdefault(name, []).append(value)
    print(f"{args.images} JPEGs of {args.size[0]} × {args.size[1]}, {bytes_ / 1000:.0f} kB each")
    for name, values in totals.items():
        mean = sum(values) / len(values)
        print(f"{name:<26}{mean:8.3f} ms an image  {1000 / mean:10,.0f} a second and core")


if __name__ == "__main__":
    main()
