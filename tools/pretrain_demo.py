"""Pretrain the packaged backbone: ``python tools/pretrain_demo.py --seed 0 --output DIR``.

Two objectives, each read by a linear layer that is thrown away afterwards: the class token names
the drawing rule (256 classes) of a procedural image, and every patch token tells which of its
64 pixels the object covers. The second one gets learning going: without it the loss stands still
for twice as long. AdamW, float32.

The steps are those of ``pgn-fast train``: this file has the images, the loss and the rate of each
step. A killed run continues to the bit from its last checkpoint, since images and learning rate
depend on the step alone. The output folder is a run's, and gets ``demo_vit.safetensors`` (the
backbone) and ``demo_vit.json`` (settings, versions, seconds, learning curve).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from procedural import FAMILIES, NUM_CLASSES, ProceduralImages
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from pgn_fast._files import write_files
from pgn_fast.adapters import read_adapter
from pgn_fast.demo import NAME, PRETRAINED_CFG, RECORD, WEIGHTS, build
from pgn_fast.errors import UserError
from pgn_fast.models.baselines import FineTuned
from pgn_fast.train import checkpoints
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.given import given_split
from pgn_fast.train.loader import preprocessing
from pgn_fast.train.loop import run
from pgn_fast.train.parts import Parts, seed_everything
from pgn_fast.train.split import Splits
from pgn_fast.train.state import resume_config

# far past any training step: these batches are never trained on
HELD_OUT = range(1 << 40, (1 << 40) + 8)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, but the number of threads (see the record)."""

    seed: int = 0
    steps: int = 2400
    cosine_steps: int = 5000
    cooldown_steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    mask_weight: float = 2.0
    clip_grad: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``: linear warm-up; a cosine that would reach zero at
        ``cosine_steps``; and over the last ``cooldown_steps`` a straight line that takes it there
        by ``steps``. One slow cosine thus serves shorter runs too: they only start to cool earlier.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.cosine_steps - self.warmup_steps)
        cooling = min(1.0, (self.steps - step) / max(1, self.cooldown_steps))
        return self.lr * 0.5 * (1 + math.cos(math.pi * done)) * cooling


def normalize(images: Tensor) -> Tensor:
    """Pixels in [0, 1] → what the backbone takes."""
    mean, std = (torch.tensor(PRETRAINED_CFG[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


class Pretrained(FineTuned):
    """The backbone with two throw-away layers: the head names the rule, the other draws the mask.

    Normalized images (B, 3, 32, 32) to rule logits (B, 256); in training with the mask's logits
    after them, (B, 256 + N * 64).
    """

    def __init__(self) -> None:
        super().__init__(build(), NUM_CLASSES)
        width, patch = self.backbone.embed_dim, self.backbone.patch_embed.patch_size[0]
        self.draw_mask = nn.Linear(width, patch * patch)
        # logits near zero at the start
        head: Any = self.head
        nn.init.trunc_normal_(head.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)  # (B, 1 + N, D)
        rules = self.head(tokens[:, 0])
        if not self.training:
            return rules
        return torch.cat([rules, self.draw_mask(tokens[:, 1:]).flatten(1)], dim=1)


def patches(masks: Tensor, size: int = 8) -> Tensor:
    """Cut masks (B, H, W) into the backbone's patches: (B, N, size²), row by row."""
    blocks = masks.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (B, h, 8, w, 8)
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


class Batches:
    """The training batches of a run, ``log_every`` an epoch.

    A target (B, 1 + N * 64) is the rule's number, and the mask by patches.
    """

    def __init__(self, settings: Settings, log_every: int) -> None:
        self._images, self._settings = ProceduralImages(settings.seed), settings
        self._epoch, self._length = 0, log_every
        # as torch's loaders: whoever is told the epoch, and how many images there are
        self.sampler, self.dataset = self, range(log_every * settings.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self._epoch * self._length, (self._epoch + 1) * self._length):
            batch = self._images.batch(step, self._settings.batch_size)
            drawn = patches(batch.masks).flatten(1)
            yield normalize(batch.images), torch.cat([batch.labels[:, None], drawn], dim=1)


class NameAndDraw:
    """The loss: cross entropy of the rule, and binary cross entropy of the mask."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check(self, labels: Tensor) -> None:
        """All targets are this file's own."""

    def mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return images, labels

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits[:, :NUM_CLASSES].argmax(dim=1) == labels[:, 0]).sum()

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        naming = functional.cross_entropy(
            logits[:, :NUM_CLASSES],
            targets[:, 0].long(),
            reduction="sum",
            label_smoothing=self._settings.label_smoothing,
        )
        drawing = functional.binary_cross_entropy_with_logits(
            logits[:, NUM_CLASSES:], targets[:, 1:], reduction="none"
        )
        return naming + self._settings.mask_weight * drawing.mean(dim=1).sum()


def pretrain(
    settings: Settings, output: Path, *, log_every: int = 100, show: bool = True
) -> dict[str, Any]:
    """Train to the end, from the beginning or from where a run in ``output`` stands; its summary.

    Args:
        settings: the recipe.
        output: the run's folder.
        log_every: steps from one score, and checkpoint, to the next.

    Raises:
        UserError: the folder holds a run with other settings, or ``log_every`` does not divide the
            steps.
    """
    if settings.steps % log_every:
        raise UserError(f"`log_every` {log_every} does not divide `steps` {settings.steps}.")
    given: dict[str, Any] = {
        "data": "images from formulas",
        "model": NAME,
        "method": "full",
        "seed": settings.seed,
        "epochs": settings.steps // log_every,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "opt_betas": (0.9, 0.95),
        "clip_grad": settings.clip_grad,
        "smoothing": settings.label_smoothing,
    }
    config = resume_config(output, given) or TrainConfig.make(**given)

    def parts() -> Parts:
        seed_everything(settings.seed)
        model = Pretrained()
        images = ProceduralImages(settings.seed)
        held_out = [images.batch(step, 256) for step in HELD_OUT]
        scored = TensorDataset(
            torch.cat([normalize(batch.images) for batch in held_out]),
            torch.cat([batch.labels for batch in held_out]),
        )
        splits = Splits(
            given_split("train", Batches(settings, log_every), task=None),
            given_split("validation", scored),
            None,
            NUM_CLASSES,
        )
        pixels = preprocessing(model.backbone, config)
        return Parts(splits, model, pixels, False, NameAndDraw(settings), settings.rate)

    return run(config, output, parts, torch.device("cpu"), resume=True, show=show)


def export(settings: Settings, output: Path, *, log_every: int = 100) -> None:
    """Write the backbone and the record beside the run; the throw-away layers stay behind."""
    _, tensors = read_adapter(output / "last")
    weights = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    state = checkpoints.load(output)
    assert state is not None
    seconds, log = 0.0, []
    for row in state["record"]["history"]:
        seconds += row["seconds"]
        step = row["epoch"] * log_every
        log.append(
            {
                "step": step,
                "images": step * settings.batch_size,
                "loss": round(row["train_loss"], 5),
                "held_out_top1": round(row["validation_top1"] / 100, 5),
                "lr": round(row["lr"], 8),
                "wall_seconds": round(seconds, 1),
            }
        )
    record: dict[str, Any] = {
        "settings": asdict(settings),
        "classes": FAMILIES,
        "images_seen": log[-1]["images"],
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "wall_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "log": log,
    }
    text = json.dumps(record, indent=1) + "\n"
    write_files({output / WEIGHTS.name: save(weights), output / RECORD.name: text.encode()})


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python tools/pretrain_demo.py",
        description="Pretrain the packaged backbone on procedural images.",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--output", type=Path, required=True, help="folder; resumes a run in it")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--threads", type=int, default=1, help="1 repeats the packaged run")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        seed=options.seed, steps=options.steps, batch_size=options.batch_size, lr=options.lr
    )
    pretrain(settings, options.output, log_every=options.log_every)
    export(settings, options.output, log_every=options.log_every)


if __name__ == "__main__":
    main()
