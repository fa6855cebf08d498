"""Pretrain the packaged backbone: ``python -m pgn_fast.demo.pretrain --seed 0 --output DIR``.

Two objectives, each read by a linear layer that is thrown away afterwards: the class token names
the drawing rule (256 classes) behind a procedural image, and every patch token tells which of its
64 pixels the object covers. The second one gets learning going: without it the loss stands still
for twice as long. AdamW, float32. A killed run continues to the bit from its last
checkpoint, since images and learning rate depend on the step alone. The output folder gets
``demo_vit.safetensors`` (the backbone), ``demo_vit.json`` (settings, versions, seconds, learning
curve) and ``log.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from .._files import write_files
from . import PRETRAINED_CFG, RECORD, WEIGHTS, build
from .procedural import FAMILIES, NUM_CLASSES, ProceduralImages

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


class Pretrained(nn.Module):
    """The backbone with its two throw-away heads: normalized images → rule and mask logits."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build()
        width, patch = self.backbone.embed_dim, self.backbone.patch_embed.patch_size[0]
        self.name_rule = nn.Linear(width, NUM_CLASSES)
        self.draw_mask = nn.Linear(width, patch * patch)
        # logits near zero at the start
        nn.init.trunc_normal_(self.name_rule.weight, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 32, 32) → rule logits (B, 256) and mask logits (B, N, 64)."""
        tokens = self.backbone.forward_features(images)  # (B, 1 + N, D)
        return self.name_rule(tokens[:, 0]), self.draw_mask(tokens[:, 1:])


def patches(masks: Tensor, size: int = 8) -> Tensor:
    """Cut masks (B, H, W) into the backbone's patches: (B, N, size²), row by row."""
    blocks = masks.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (B, h, 8, w, 8)
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


class Pretraining:
    """A run: model, optimizer, step and log, all of which ``checkpoint`` keeps.

    Args:
        settings: the recipe.
        output: a folder, made where missing; an unfinished run in it is continued.

    Raises:
        ValueError: the folder holds a run with other settings.
    """

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings, self.output = settings, output
        output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.model = Pretrained()
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
        )
        self.data = ProceduralImages(settings.seed)
        self.step, self.wall_seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.log: list[dict[str, float]] = []
        if self._checkpoint.exists():
            self._restore()

    @property
    def _checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def _restore(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{self.output} holds a run with {state['settings']}, asked for "
                f"{asdict(self.settings)}. Repeat its settings to continue it, or name another "
                "output folder."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], state["log"]
        self.wall_seconds, self.cpu_seconds = state["wall_seconds"], state["cpu_seconds"]

    def checkpoint(self) -> None:
        """Write the whole state aside, then put it in place: a kill leaves the old one whole."""
        aside = self._checkpoint.with_suffix(".part")
        torch.save(
            {
                "settings": asdict(self.settings),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "log": self.log,
                "wall_seconds": self.wall_seconds,
                "cpu_seconds": self.cpu_seconds,
            },
            aside,
        )
        os.replace(aside, self._checkpoint)

    def train_step(self) -> tuple[float, float]:
        """One step of AdamW; returns the losses of naming and of drawing."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        batch = self.data.batch(self.step, self.settings.batch_size)
        rule, mask = self.model(normalize(batch.images))
        naming = functional.cross_entropy(
            rule, batch.labels, label_smoothing=self.settings.label_smoothing
        )
        drawing = functional.binary_cross_entropy_with_logits(mask, patches(batch.masks))
        loss = naming + self.settings.mask_weight * drawing
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.step}; lower --lr")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.step += 1
        return naming.item(), drawing.item()

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Top-1 on 2,048 images that no training step draws."""
        self.model.eval()
        right = total = 0
        for step in HELD_OUT:
            batch = self.data.batch(step, 256)
            rule, _ = self.model(normalize(batch.images))
            right += int((rule.argmax(1) == batch.labels).sum())
            total += len(batch.labels)
        self.model.train()
        return right / total

    def run(self, *, log_every: int, show: bool = True) -> None:
        """Train to the end, logging and checkpointing every ``log_every`` steps."""
        self.model.train()
        wall, cpu = time.perf_counter(), time.process_time()
        losses: list[tuple[float, float]] = []
        while self.step < self.settings.steps:
            losses.append(self.train_step())
            if self.step % log_every and self.step < self.settings.steps:
                continue
            held_out = self.held_out_accuracy()
            now_wall, now_cpu = time.perf_counter(), time.process_time()
            self.wall_seconds += now_wall - wall
            self.cpu_seconds += now_cpu - cpu
            wall, cpu = now_wall, now_cpu
            naming, drawing = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            row = {
                "step": self.step,
                "images": self.step * self.settings.batch_size,
                "naming_loss": round(naming, 5),
                "drawing_loss": round(drawing, 5),
                "held_out_top1": round(held_out, 5),
                "lr": round(self.settings.rate(self.step - 1), 8),
                "wall_seconds": round(self.wall_seconds, 1),
                "cpu_seconds": round(self.cpu_seconds, 1),
            }
            losses.clear()
            self.log.append(row)
            self.checkpoint()
            if show:
                left = self.wall_seconds / self.step * (self.settings.steps - self.step)
                print(
                    f"step {self.step}/{self.settings.steps}  loss {naming:.3f} + {drawing:.3f}  "
                    f"held-out top-1 {held_out:.1%}  {self.wall_seconds:.0f} s, {left:.0f} s to go",
                    flush=True,
                )

    def export(self) -> None:
        """Write the backbone, the record and the log; the throw-away classifier stays behind."""
        weights = self.output / WEIGHTS.name
        state = {
            name: tensor.contiguous() for name, tensor in self.model.backbone.state_dict().items()
        }
        write_files({weights: save(state)})
        record: dict[str, Any] = {
            "settings": asdict(self.settings),
            "classes": FAMILIES,
            "images_seen": self.step * self.settings.batch_size,
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "wall_seconds": round(self.wall_seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": version("timm"),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "log": self.log,
        }
        (self.output / RECORD.name).write_text(json.dumps(record, indent=1) + "\n")
        with open(self.output / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.log[0]))
            writer.writeheader()
            writer.writerows(self.log)


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pgn_fast.demo.pretrain",
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
    pretraining = Pretraining(settings, options.output)
    pretraining.run(log_every=options.log_every)
    pretraining.export()


if __name__ == "__main__":
    main()
