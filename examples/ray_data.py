"""Ray Data: images through every task, to parquet:  python examples/ray_data.py TASKS IMAGES OUT

IMAGES: a folder, or parquet files with the columns "path" and "bytes"."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray
import torch

from pgn_fast.images import UnreadableImage, read_image
from pgn_fast.serve import load_served_tasks


class EveryTask:
    """One worker: a backbone, and all tasks on it."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)  # as many as num_cpus
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tasks = load_served_tasks(folder, device=device, watch_s=0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pictures, errors = [], np.full(len(batch["path"]), "", dtype=object)
        for row, data in enumerate(batch["bytes"]):
            try:
                pictures.append(read_image(data))
            except UnreadableImage as error:  # one bad file of millions ends nothing
                errors[row] = str(error)
        read, rows = errors == "", {"path": batch["path"], "error": errors}
        for task, logits in self.tasks.every(pictures).items():
            probability, best = logits.softmax(dim=1).max(dim=1)
            labels = np.array(self.tasks.labels(task), dtype=object)
            rows[f"{task}/class"] = np.full(len(read), "", dtype=object)
            rows[f"{task}/class"][read] = labels[best.numpy()]
            rows[f"{task}/probability"] = np.full(len(read), np.nan, dtype=np.float32)
            rows[f"{task}/probability"][read] = probability.numpy()
        return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("tasks", "images", "output"):
        parser.add_argument(name)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.images.endswith(".parquet"):
        images = ray.data.read_parquet(args.images)
    else:
        images = ray.data.read_binary_files(args.images, include_paths=True)
    images.map_batches(
        EveryTask,
        fn_constructor_args=[args.tasks],
        batch_size=32,
        num_cpus=1,  # or num_gpus=1
        compute=ray.data.ActorPoolStrategy(size=args.workers),
    ).write_parquet(args.output)


if __name__ == "__main__":
    main()
