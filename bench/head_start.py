"""Where each method starts and where it ends, by the command's defaults: no prompt method may start
below a linear probe.

    python bench/head_start.py digits --seeds 3
    python bench/head_start.py photos --images cifar10.npz --weights vit_s14.safetensors --size 56

``digits`` are the packaged ones on the packaged backbone. ``photos`` are some classes of an .npz of
x_train (n, h, w, 3) uint8, y_train, x_test and y_test, on timm's ViT-S/14 with weights from a file.
Every run is ``pgn_fast.fit`` with the defaults of ``pgn-fast train``; the start is a first epoch at
a rate of nothing. Scores are of test images, read once a run, at its end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rows import RESULTS, Row, write
from safetensors.torch import load_file

import pgn_fast
from pgn_fast.demo import backbone as demo_backbone
from pgn_fast.demo import experiment

METHODS = ("linear", "vpt-shallow", "vpt-deep", "pgn")
ARGUMENTS = {
    "digits": {"pgn": {"resolution": 32, "generator_kwargs": {"max_pool": False}}},
    "photos": {},
}


def digits(args: argparse.Namespace) -> tuple[Any, Any, int, Any]:
    data = experiment.load("test")
    train = experiment.Turned(data, 64, seed=0)
    test = torch.utils.data.TensorDataset(data.test_images, data.test_labels)
    return train, test, 10, demo_backbone


def photos(args: argparse.Namespace) -> tuple[Any, Any, int, Any]:
    found = np.load(args.images)

    def pairs(part: str, each: int) -> list[tuple[Image.Image, int]]:
        images, labels = found[f"x_{part}"], found[f"y_{part}"]
        chosen = [np.flatnonzero(labels == c)[:each] for c in range(args.classes)]
        return [(Image.fromarray(images[i]), int(labels[i])) for i in np.concatenate(chosen)]

    def backbone() -> Any:
        model = timm.create_model(
            "vit_small_patch14_dinov2", pretrained=False, img_size=args.size, num_classes=0
        )
        weights = load_file(args.weights)
        model.load_state_dict(weights | {"pos_embed": resampled(weights["pos_embed"], model)})
        return model.eval()

    return pairs("train", args.count or 40), pairs("test", args.test), args.classes, backbone


def resampled(positions: torch.Tensor, model: Any) -> torch.Tensor:
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, list(model.patch_embed.grid_size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=("digits", "photos"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--count", type=int, help="training images of each class of photos")
    parser.add_argument("--test", type=int, default=50, help="test images of each class of photos")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--record", type=Path, help=f"rows, for {RESULTS}")
    args = parser.parse_args()
    options = {k: float(v) for k, v in (word.split("=") for word in args.option)}
    train, test, classes, backbone = {"digits": digits, "photos": photos}[args.data](args)
    images = len(getattr(train, "dataset", train))
    rows = []
    for method in args.methods:
        found: dict[str, list[float]] = {"start": [], "end": []}
        for seed in range(args.seeds):
            for point, more in (
                ("start", {"lr": 1e-12, "epochs": 1, "warmup_epochs": 0}),
                ("end", {"epochs": args.epochs, **options}),
            ):
                torch.manual_seed(seed)
                model = pgn_fast.create_model(
                    method, backbone(), classes, **ARGUMENTS[args.data].get(method, {})
                )
                with tempfile.TemporaryDirectory() as folder:
                    result = pgn_fast.fit(
                        model,
                        train,
                        test=test,
                        output=Path(folder) / "run",
                        seed=seed,
                        workers=0,
                        show=False,
                        **more,
                    )
                found[point].append(result.test["top1"])
        start, end = (np.array(found[point]) for point in ("start", "end"))
        print(
            f"{method:<12} start {start.mean():6.2f}  {np.round(start, 2)}  "
            f"end {end.mean():6.2f}  {np.round(end, 2)}",
            flush=True,
        )
        rows.append(
            Row(
                "training",
                f"{args.data}, {images} training images, {args.epochs} epochs",
                method,
                float(end.mean()),
                "%",
                rounds=args.seeds,
                facts={"start": start.tolist(), "end": end.tolist(), **options},
            )
        )
    if args.record:
        write(args.record, rows)


if __name__ == "__main__":
    main()
