"""Bytes of many tasks on one backbone, beside as many fine-tuned copies of it.

    python bench/storage.py [--rows bench/results/storage.jsonl]

Counted from the tensors that an adapter holds, ViT-B/16, 100 classes a task; no machine matters.
VPT's own accounting (Jia et al., arXiv:2203.12119, table 1) is the total over one backbone: 1.18
for 24 tasks with Deep, 1.04 with Shallow, each with the P that its search found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows
import torch
from models_common import make_backbone
from torch import nn

from pgn_fast import PGN, VPT
from pgn_fast.models import LinearProbe

CLASSES, TASKS = 100, (1, 24, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    vit = make_backbone("vit_base_patch16_224", torch.device("cpu"), torch.float32)
    backbone = sum(t.nbytes for t in vit.state_dict().values())
    models = {
        "linear probe": LinearProbe(vit, CLASSES),
        "VPT-Shallow, P=50": VPT(vit, CLASSES, num_prompts=50, deep=False),
        "VPT-Deep, P=50": VPT(vit, CLASSES, num_prompts=50),
        "PGN, P=16, K=256": PGN(vit, CLASSES),
    }
    # what is there once, and what each task takes
    shares = {"the backbone alone": (backbone, 0)}
    for name, model in models.items():
        shares[name] = backbone, sum(t.nbytes for t in model.adapter_state_dict().values())
    head = nn.Linear(vit.embed_dim, CLASSES)
    shares["fine-tuned copies"] = 0, backbone + sum(t.nbytes for t in head.state_dict().values())
    kept = []
    for name, (once, size) in shares.items():
        for count in TASKS:
            total = once + count * size
            facts = {"tasks": count, "of the backbone": total / backbone, "a task": size}
            kept.append(
                rows.Row(
                    "storage",
                    f"{count:,} task{'s' * (count > 1)}",
                    name,
                    total,
                    "bytes",
                    facts=facts,
                )
            )
            print(f"{name:20s} {count:5d} tasks {total / 2**20:10.1f} MiB {total / backbone:8.2f}x")
    if args.rows:
        rows.write(args.rows, kept)


if __name__ == "__main__":
    main()
