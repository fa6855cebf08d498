"""What all examples share: 64 digits in batches of 16, and a small prompted model."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import pgn_fast
from pgn_fast.digits import LEVELS, load_digits

BATCH, LR = 16, 0.1


def digits() -> tuple[Tensor, Tensor]:
    """Images (64, 3, 32, 32), normalized for ``pgn_demo_vit``, and labels (64,)."""
    found = load_digits()
    chosen = found.train[:64]
    pixels = torch.tensor(found.images[chosen], dtype=torch.float32) / LEVELS
    pixels = pixels.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    return (pixels[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5, torch.tensor(found.labels[chosen])


def prompted() -> pgn_fast.VPT:
    torch.manual_seed(0)
    return pgn_fast.VPT("pgn_demo_vit", 10, num_prompts=4)


def output() -> str:
    """The folder that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", help="folder for the adapter")
    return parser.parse_args().output
