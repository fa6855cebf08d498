"""What prompts add to a frozen backbone: four methods on handwritten digits.

    linear       a linear layer on the frozen features
    vpt-shallow  prompts in front of the first block, and a linear layer
    vpt-deep     prompts in front of every block, and a linear layer
    pgn          prompts that a small network makes from the image, and a linear layer

Each is trained by ``pgn_fast.fit``: the loop, the schedule and the start of the head are those of
``pgn-fast train``. 1,000 images to train, 797 to test, split once and for all by a fixed seed. The
test images are looked at once a run, after its last step. Whatever was chosen, was chosen on
validation images carved from the 1,000 (``split="validation"``, see docs/demo.md).
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ..digits import LEVELS, load_digits, stratified_split
from ..methods import create_model
from ..train.fit import RunResult, fit
from . import PRETRAINED_CFG, backbone
from .recipes import RECIPES, Recipe, Result

NUM_CLASSES = 10
VALIDATION_SIZE = 200


@dataclass(frozen=True)
class Digits:
    """Normalized images (n, 3, 32, 32) float32 and labels (n,) int64 of both sides of a split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(split: str = "test", seed: int = 0) -> Digits:
    """The packaged 1,797 handwritten digits, 8 × 8 gray, enlarged to what the backbone takes.

    Args:
        split: "test": 1,000 to train and 797 to test, stratified, whatever ``seed`` says.
            "validation": the same 1,000, of which ``seed`` keeps 200 back in place of the test.
    """
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; known: test, validation")
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / LEVELS  # (n, 1, 8, 8)
    images = functional.interpolate(
        images, size=PRETRAINED_CFG["input_size"][1:], mode="bilinear", align_corners=False
    ).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(PRETRAINED_CFG[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = (images - mean) / std, torch.from_numpy(digits.labels)

    train, test = digits.train, digits.test
    if split == "validation":
        train, test = stratified_split(digits.labels, train, VALIDATION_SIZE, seed)
    return Digits(images[train], labels[train], images[test], labels[test])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 10°, scale by up to 10 %, shift by up to 2 of 32 pixels: (B, 3, 32, 32)."""
    size = len(images)
    angle, scale, x, y = torch.empty(4, size).uniform_(-1, 1, generator=generator)
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, x / 8, sin, cos, y / 8], dim=1).view(size, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Turned:
    """Shuffled batches of the training images of ``Digits``, augmented again in every epoch.

    A batch is augmented at once: image by image takes longer than the small backbone.
    """

    def __init__(self, digits: Digits, batch_size: int, seed: int) -> None:
        self._images, self._labels = digits.train_images, digits.train_labels
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0
        # as torch's loaders: whoever is told the epoch, and how many images there are
        self.sampler, self.dataset = self, range(len(self._labels))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._labels) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self._epoch)
        order = torch.randperm(len(self._labels), generator=generator)
        for chosen in order.split(self._batch_size):
            yield augment(self._images[chosen], generator), self._labels[chosen]


def build_model(method: str, options: dict[str, Any]) -> Any:
    """A model of ``RECIPES`` on the packaged backbone: images (B, 3, 32, 32) → logits (B, 10)."""
    return create_model(method, backbone(), NUM_CLASSES, **options)


def run(method: str, seed: int, *, split: str = "test", recipe: Recipe | None = None) -> Result:
    """Train one method from one seed and score it once, after its last step.

    Args:
        method: a key of ``RECIPES``.
        seed: of the initial values, the order of the images and their augmentation.
        split: see ``load``.
        recipe: in place of the method's own.

    Raises:
        TrainingStopped: the loss is not finite.
    """
    loaded_bytes = _peak_bytes()
    recipe = recipe or RECIPES[method]
    data = load(split, seed)
    torch.manual_seed(seed)
    model = build_model(method, recipe.options)
    start = time.perf_counter()
    done = train(model, data, recipe, seed)
    seconds = time.perf_counter() - start
    peak = _peak_bytes()
    assert done.test is not None
    return Result(
        method=method,
        seed=seed,
        correct=round(done.test["top1"] * done.test["images"] / 100),
        images=done.test["images"],
        trained_parameters=done.summary["trained_parameters"],
        seconds=seconds,
        peak_bytes=None if peak is None or loaded_bytes is None else peak - loaded_bytes,
        threads=torch.get_num_threads(),
        losses=[row["train_loss"] for row in done.history],
    )


def train(model: nn.Module, data: Digits, recipe: Recipe, seed: int) -> RunResult:
    """``pgn_fast.fit`` by a recipe; the run's folder is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            model,
            Turned(data, recipe.batch_size, seed),
            test=TensorDataset(data.test_images, data.test_labels),
            output=Path(folder) / "run",
            epochs=recipe.epochs,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            batch_size=recipe.batch_size,
            head_init=recipe.head_init,
            seed=seed,
            workers=0,
            show=False,
        )


def _peak_bytes() -> int | None:
    """The largest resident size that this process ever had; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
