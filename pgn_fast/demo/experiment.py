"""What prompts add to a frozen backbone: four methods on handwritten digits.

    linear       a linear layer on the frozen features
    vpt-shallow  prompts in front of the first block, and a linear layer
    vpt-deep     prompts in front of every block, and a linear layer
    pgn          prompts that a small network makes from the image, and a linear layer

1,000 images to train, 797 to test, split once and for all by a fixed seed. The test images are
looked at once a run, behind its last step. Whatever was chosen, was chosen on validation images
carved from the 1,000 (``split="validation"``, see docs/demo.md).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..digits import LEVELS, load_digits, stratified_split
from ..errors import TrainingStopped
from ..models import PGN, VPT, PromptedViT
from ..models.baselines import LinearProbe
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


def build_model(method: str, options: dict[str, Any]) -> PromptedViT | LinearProbe:
    """A model of ``RECIPES`` on the packaged backbone: images (B, 3, 32, 32) → logits (B, 10)."""
    frozen = backbone()
    if method == "linear":
        return LinearProbe(frozen, NUM_CLASSES)
    # the probe's initial head for all: VPT's own (Kaiming fan-out) starts at a loss of 5, and its
    # hundred epochs have the time to forgive that
    options = {**options, "head": nn.Linear(frozen.num_features, NUM_CLASSES)}
    if method == "pgn":
        return PGN(frozen, NUM_CLASSES, **options)
    return VPT(frozen, NUM_CLASSES, deep=method == "vpt-deep", **options)


def run(method: str, seed: int, *, split: str = "test", recipe: Recipe | None = None) -> Result:
    """Train one method from one seed and score it once, behind its last step.

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
    model = build_model(method, recipe.options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    start = time.perf_counter()
    losses = train(model, trained, data, recipe, seed)
    seconds = time.perf_counter() - start
    correct = _count_correct(model.eval(), data)
    peak = _peak_bytes()
    return Result(
        method=method,
        seed=seed,
        correct=correct,
        images=len(data.test_labels),
        trained_parameters=sum(p.numel() for p in trained),
        seconds=seconds,
        peak_bytes=None if peak is None or loaded_bytes is None else peak - loaded_bytes,
        threads=torch.get_num_threads(),
        losses=losses,
    )


def train(
    model: PromptedViT | LinearProbe,
    trained: list[nn.Parameter],
    data: Digits,
    recipe: Recipe,
    seed: int,
) -> list[float]:
    """Train ``trained``, parameters of ``model``, by ``recipe``; the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    cache = _cached_features(model, data, recipe.cached_views, generator)
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    count = len(data.train_labels)
    # every batch is full: the few images left over wait for the next epoch's order
    steps_per_epoch = max(1, count // recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))),
        ),
    )
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        order = torch.randperm(count, generator=generator)
        total = 0.0
        for step in range(steps_per_epoch):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            if cache:
                logits = model.head(cache[epoch % len(cache)][chosen])
            else:
                logits = model(augment(data.train_images[chosen], generator))
            loss = functional.cross_entropy(logits, data.train_labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps_per_epoch)
        if not math.isfinite(losses[-1]):
            raise TrainingStopped(f"the loss of {recipe.label} is {losses[-1]} in epoch {epoch}")
    return losses


@torch.no_grad()
def _cached_features(
    model: PromptedViT | LinearProbe, data: Digits, views: int, generator: torch.Generator
) -> list[Tensor]:
    """Features (n, D) of ``views`` augmented copies of the training images."""
    return [
        torch.cat(
            [model.backbone(augment(part, generator)) for part in data.train_images.split(256)]
        )
        for _ in range(views)
    ]


@torch.no_grad()
def _count_correct(model: nn.Module, data: Digits) -> int:
    return sum(
        int((model(images).argmax(dim=1) == labels).sum())
        for images, labels in zip(
            data.test_images.split(256), data.test_labels.split(256), strict=True
        )
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
