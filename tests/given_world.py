"""Small data as people have them, and a small model to train on them by ``pgn_fast.fit``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from small_world import tiny_vit

import pgn_fast
from pgn_fast.adapters import backbone_pixels

OPTIONS = {"batch_size": 6, "lr": 0.05, "workers": 0, "show": False}


def model(classes=3):
    torch.manual_seed(0)
    return pgn_fast.VPT(tiny_vit(), classes, num_prompts=2)


def pictures(count=14):
    """Noise of three tints and its classes, as PIL images."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        levels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        levels[..., i % 3] //= 3
        found.append((Image.fromarray(levels), i % 3))
    return found


def tensors(pairs):
    """The same images as the model's input."""
    pixels = backbone_pixels(tiny_vit())
    mean, std = (torch.tensor(pixels[k]).view(3, 1, 1) for k in ("mean", "std"))
    images = [torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x, _ in pairs]
    return torch.stack([(x - mean) / std for x in images]), torch.tensor([y for _, y in pairs])


class Batches:
    """A loader that is no torch DataLoader: batches and their number."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)
