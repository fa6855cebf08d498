"""``pgn-fast predict``: name the classes of images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from ._options import (
    add_adapter_arguments,
    add_device_argument,
    add_run_arguments,
    at_least,
    load_adapter,
    pick_device,
)

HELP = "name the classes of images, as CSV or JSON lines"
EPILOG = """\
examples:
  pgn-fast predict runs/photos/best cat.jpg dog.png
  pgn-fast predict runs/photos/best new_photos --output predictions.csv
  pgn-fast predict runs/photos/best new_photos --format jsonl --topk 3 | head
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image files, or folders of them"
    )
    parser.add_argument("--output", metavar="FILE", help="default: the terminal")
    parser.add_argument(
        "--format", choices=("csv", "jsonl"), help="default: as --output ends, else csv"
    )
    parser.add_argument(
        "--topk", type=at_least(1), default=1, metavar="K", help="classes an image (1)"
    )
    add_run_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)

    from .._files import write_files
    from ..train.data import image_files

    images = image_files(args.images).images
    rows, unreadable = _predict(args, images, load_adapter(args).to(device), device)
    suffix = Path(args.output).suffix if args.output else ""
    kind = args.format or ("jsonl" if suffix in (".jsonl", ".json") else "csv")
    text = _as_csv(rows) if kind == "csv" else _as_json_lines(rows)
    if args.output:
        write_files({Path(args.output): text.encode()})
    else:
        sys.stdout.write(text)
    for name in unreadable:
        print(f"unreadable, left out: {name}", file=sys.stderr)
    print(f"{len(rows)} of {len(images)} images classified", file=sys.stderr)
    return 0 if rows else 2


def _predict(
    args: argparse.Namespace, images: Any, model: Any, device: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row an image, {"file", "predictions": [{"class", "index", "probability"}, ...]}, and
    the images that could not be read."""
    import torch

    from ..train.data import Split
    from ..train.evaluation import Autocast
    from ..train.loader import eval_transform, make_loader

    split = Split("all", "the given files", images, range(len(images)))
    loader = make_loader(
        split, eval_transform(model.preprocessing), args.batch_size, workers=args.workers
    )
    autocast = Autocast(device, args.amp, args.amp_dtype)
    names = model.class_names or [str(c) for c in range(model.num_classes)]
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for pixels, _, indices, missing in loader:
        unreadable += missing
        if len(indices) == 0:
            continue
        with torch.no_grad(), autocast():
            logits = model(pixels.to(device))
        best = logits.float().softmax(dim=1).topk(min(args.topk, len(names)), dim=1)
        for index, values, classes in zip(
            indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
        ):
            predictions = [
                {"class": names[c], "index": c, "probability": round(p, 6)}
                for p, c in zip(values, classes, strict=True)
            ]
            rows.append({"file": images.name(index), "predictions": predictions})
    return rows, unreadable


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    count = len(rows[0]["predictions"]) if rows else 1
    numbered = [f"{name}{k}" for k in range(1, count + 1) for name in ("class", "probability")]
    writer.writerow(["file", *(numbered if count > 1 else ("class", "probability"))])
    for row in rows:
        cells = [cell for p in row["predictions"] for cell in (p["class"], p["probability"])]
        writer.writerow([row["file"], *cells])
    return text.getvalue()


def _as_json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
