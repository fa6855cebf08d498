"""The training run: epochs, evaluation, what is written when, and how it continues after a kill."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters import read_adapter, save_pretrained
from ..errors import TrainingStopped, UserError, as_user_error
from . import checkpoints
from .config import TrainConfig
from .data import Split, Splits, load_splits
from .distributed import Processes
from .evaluation import Autocast, Score, check_labels, evaluate
from .loader import (
    eval_transform,
    make_loader,
    pixels_to_keep,
    preprocessing,
    set_position,
    train_transform,
)
from .methods import build_model, deployment_library, load_backbone_for
from .recipe import make_optimizer, make_schedule, set_learning_rate
from .reports import (
    ProgressReport,
    TensorBoard,
    plot_learning_curve,
    write_csv,
    write_json,
)

# choices that do not change what is computed; a resumed run may differ in them
FREE = {
    "data_dir",
    "dataset_download",
    "workers",
    "log_interval",
    "recovery_interval",
    "tensorboard",
}


@dataclass
class Position:
    """How far a run is, and the running sums of the epoch it is in."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """What a run has found so far."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_top1: float = -1.0
    unreadable: list[str] = field(default_factory=list)


def resume_config(output: Path, given: dict[str, Any]) -> TrainConfig | None:
    """The configuration of the run in ``output``; None where it has no checkpoint yet.

    Args:
        given: fields that the user names again; those that do not change the result may differ.

    Raises:
        UserError: a field that would change the result differs, or the checkpoint is damaged.
    """
    state = checkpoints.load(output)
    if state is None:
        return None
    saved = state["config"]
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    for name, value in wanted.items():
        if name not in FREE and saved[name] != value:
            raise UserError(
                f"--resume: the run in {output} has {name} = {saved[name]!r}, now {value!r} is "
                "asked for. Leave it out to continue the run, or start a new one with --output."
            )
    return TrainConfig.make(**saved | wanted)


def train(
    config: TrainConfig,
    output: Path,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    show: bool = True,
) -> dict[str, Any]:
    """Run a training to its end and return its summary, which is also ``output/summary.json``.

    Args:
        config: what to train on what, and how.
        output: folder for ``best/`` and ``last/`` (adapters), ``checkpoint.pt``, ``history.csv``,
            ``learning_curve.png`` and ``summary.json``.
        device: the CPU where None; under torchrun each process takes its own accelerator.
        resume: continue from ``output/checkpoint.pt``; from the beginning where there is none.
        show: print progress.

    Raises:
        UserError: the arguments or the data do not work.
        TrainingStopped: the loss or a trained weight is not finite, or the device's memory is
            full; the checkpoint is the last good one.
        OSError: a file could not be written; the older one is whole.
    """
    with Processes(device or torch.device("cpu")) as processes:
        output.mkdir(parents=True, exist_ok=True)
        state = checkpoints.load(output) if resume else None
        try:
            run = Run(config, output, processes, state, show)
            run.fit()
            return run.finish()
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(_out_of_memory(config, output, error)) from error


def _what_is_kept(output: Path) -> str:
    path = output / checkpoints.FILE
    return f"the last good checkpoint is {path}" if path.exists() else "nothing is saved yet"


def _out_of_memory(config: TrainConfig, output: Path, error: Exception) -> str:
    # torch's first sentence says how much was asked for; the rest is advice on its allocator
    reason = str(error).partition(". ")[0].rstrip(".")
    half, steps = config.batch_size // 2, 2 * config.grad_accum_steps
    smaller = (
        f"a smaller batch, such as -b {half} --grad-accum-steps {steps} for {half * steps} "
        "images a step"
        if half
        else "--amp or a smaller --model: -b is 1 already"
    )
    return (
        f"the device's memory is full with -b {config.batch_size} ({reason}); "
        f"{_what_is_kept(output)}. Start anew with {smaller}, or --resume once other programs "
        "have left the device."
    )


class Run:
    """One training run: built from its configuration, or continued from a checkpoint's state."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        processes: Processes,
        state: dict[str, Any] | None,
        show: bool,
    ) -> None:
        self.config, self.output, self.processes = config, output, processes
        self.device = processes.device
        self.show = show and processes.first
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.splits: Splits = load_splits(config)
        backbone = load_backbone_for(config)
        self.pixels = preprocessing(backbone, config)
        self.model: Any = build_model(
            config,
            backbone,
            self.splits.num_classes,
            token_library=deployment_library(config, backbone, self.pixels),
        )
        self.model.to(self.device).train()
        self.autocast = Autocast(self.device, config.amp, config.amp_dtype)
        self._try_out()
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(config)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.amp and config.amp_dtype == "float16"
        )
        self.loader = make_loader(
            self.splits.train,
            train_transform(config, self.pixels),
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
            at_least=pixels_to_keep(config, self.pixels),
        )
        self.position, self.record = Position(), Record()
        # losses that nobody has looked at yet, as (update, loss * images, correct, images)
        self._pending: list[tuple[int, Tensor, Tensor, int]] = []
        # the same weights on all processes, but dropout of their own
        torch.manual_seed(config.seed + processes.rank)
        if state is not None:
            self._restore(state)
        self.forward = self._wrap()

    def _try_out(self) -> None:
        """One blank image forward, which leaves no trace: what cannot run is said before training.

        Raises:
            UserError: a named backend that cannot run here, images that the backbone cannot take.
        """
        blank = torch.zeros(1, *self.pixels["input_size"], device=self.device)
        with torch.no_grad(), self.autocast(), as_user_error(RuntimeError):
            try:
                self.model.eval()(blank)
            except torch.OutOfMemoryError as error:
                raise TrainingStopped(_out_of_memory(self.config, self.output, error)) from error
        self.model.train()

    def _wrap(self) -> nn.Module:
        """The model as it is called in training: compiled, and with gradients that are averaged."""
        model = self.model
        if self.config.torchcompile:
            model = torch.compile(model, backend=self.config.torchcompile)  # type: ignore[assignment]
        if self.processes.world > 1:
            index = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=index)
        return model

    @property
    def batches_per_epoch(self) -> int:
        return len(self.loader)

    def fit(self) -> None:
        """Train from where the run stands to its last epoch."""
        config, begin = self.config, self.position
        total = config.epochs * self.batches_per_epoch
        done = begin.epoch * self.batches_per_epoch + begin.batch
        board = TensorBoard(
            self.output, config.tensorboard and self.processes.first, begin.epoch + 1
        )
        with ProgressReport(total, done, self.show) as report:
            self._announce(report)
            while self.position.epoch < config.epochs:
                self._train_epoch(report)
                row = self._close_epoch(report)
                report.epoch(row, config.epochs)
                board.log(row)
        board.close()

    def _announce(self, report: ProgressReport) -> None:
        splits = [self.splits.train, self.splits.validation, self.splits.test]
        for split in splits:
            if split is not None:
                report.say(f"{split.name}: {len(split)} images: {split.origin}")
                for note in split.notes:
                    report.say(f"{split.name}: {note}")
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        report.say(
            f"{self.config.method} on {self.config.model}: {count:,} trained parameters, "
            f"{self.splits.num_classes} classes, {self.device}"
        )
        if self.position.updates:
            report.say(
                f"continues at epoch {self.position.epoch + 1}, batch {self.position.batch + 1}"
            )

    def _train_epoch(self, report: ProgressReport) -> None:
        config, position = self.config, self.position
        self.model.train()
        set_position(self.loader, position.epoch, position.batch)
        start = time.perf_counter()
        batches = iter(self.loader)
        while group := list(islice(batches, config.grad_accum_steps)):
            self._note_unreadable([name for batch in group for name in batch.unreadable], report)
            self._update([(b.images, b.labels) for b in group if len(b.labels)])
            position.batch += len(group)
            report.batches(
                len(group), sum(len(b.labels) for b in group), position.epoch + 1, config.epochs
            )
            if len(self._pending) >= config.log_interval:
                self._check_losses()
            interval = config.recovery_interval
            if interval and position.batch // interval > (position.batch - len(group)) // interval:
                now = time.perf_counter()
                position.seconds += now - start
                start = now
                self._save_checkpoint()
        self._check_losses()
        position.seconds += time.perf_counter() - start
        if position.seen == 0:
            raise UserError(
                f"data: none of the {len(self.splits.train)} training images can be read, such as "
                f"{self.record.unreadable[0] if self.record.unreadable else 'none'}."
            )

    def _update(self, group: list[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step on the mean loss of all images in ``group``."""
        config, position = self.config, self.position
        total = sum(len(labels) for _, labels in group)
        if total == 0:
            return
        progress = min(position.batch / self.batches_per_epoch, 1.0)
        set_learning_rate(self.optimizer, self.schedule(position.epoch + progress))
        position.updates += 1
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, (images, labels) in enumerate(group):
            check_labels(labels, self.splits.num_classes)
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            last = i == len(group) - 1
            with self._sync(last):
                with self.autocast():
                    logits = self.forward(images)
                loss = F.cross_entropy(
                    logits.float(), labels, reduction="sum", label_smoothing=config.smoothing
                )
                self.scaler.scale(loss / total).backward()
            loss_sum += loss.detach()
            correct += (logits.argmax(dim=1) == labels).sum()
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trained, config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.append((position.updates, loss_sum, correct, total))

    def _sync(self, last: bool) -> Any:
        """Average gradients over processes at the last part of an accumulated batch only."""
        waits = isinstance(self.forward, DistributedDataParallel) and not last
        return self.forward.no_sync() if waits else nullcontext()  # type: ignore[operator]

    def _check_losses(self) -> None:
        """Add the losses since the last look to the epoch's sums; stop at one that is not finite.

        Looking waits for the device, so it is done every ``log_interval`` updates and before
        anything is written: a bad state never takes a good checkpoint's place.
        """
        for update, loss_sum, correct, total in self._pending:
            value = float(loss_sum)
            if not math.isfinite(value):
                self._stop(f"the loss is {value} at step {update}")
            self.position.loss_sum += value
            self.position.correct += int(correct)
            self.position.seen += total
        self._pending.clear()

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
                self._stop(f"{name} is not finite after step {self.position.updates}")

    def _stop(self, what: str) -> None:
        raise TrainingStopped(
            f"{what} (epoch {self.position.epoch + 1}); {_what_is_kept(self.output)}. "
            "A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 may help."
        )

    def _close_epoch(self, report: ProgressReport) -> dict[str, Any]:
        """Validate, write everything, the checkpoint last, and move on to the next epoch."""
        position, record = self.position, self.record
        loss_sum, correct, seen = self.processes.sum(
            position.loss_sum, position.correct, position.seen
        )
        row: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "lr": self.schedule(position.epoch),
            "train_loss": loss_sum / seen,
            "train_top1": 100 * correct / seen,
        }
        if self.splits.validation is not None:
            score = self._evaluate(self.splits.validation)
            self._note_unreadable(score.unreadable, report)
            row |= {"validation_loss": score.loss, "validation_top1": score.top1}
        row |= {
            "images_per_second": round(seen / max(position.seconds, 1e-9), 1),
            "seconds": round(position.seconds, 3),
        }
        record.history.append(row)
        # without validation there is nothing to choose by: the last epoch is the best
        top1 = row.get("validation_top1", math.inf)
        best = top1 > record.best_top1 or math.isinf(top1)
        if best:
            record.best_epoch, record.best_top1 = row["epoch"], top1
        self.position = Position(epoch=position.epoch + 1, updates=position.updates)
        self._check_weights()
        if self.processes.first:
            self._save_adapter("last")
            if best:
                self._save_adapter("best")
            write_csv(self.output, record.history)
        self._save_checkpoint()
        return row

    def _evaluate(self, split: Split) -> Score:
        loader = make_loader(
            split,
            eval_transform(self.pixels),
            self.config.batch_size,
            workers=self.config.workers,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        return evaluate(self.model, loader, self.splits.num_classes, self.autocast, self.processes)

    def _note_unreadable(self, names: Iterable[str], report: ProgressReport) -> None:
        for name in names:
            if name not in self.record.unreadable:
                self.record.unreadable.append(name)
                report.say(f"warning: unreadable image, left out: {name}")

    def _save_adapter(self, name: str) -> None:
        save_pretrained(
            self.model,
            self.output / name,
            class_names=self.splits.class_names,
            preprocessing=self.pixels,
        )

    def _save_checkpoint(self) -> None:
        self._check_losses()
        self._check_weights()
        if not self.processes.first:
            return
        checkpoints.save(
            self.output,
            {
                "config": self.config.as_dict(),
                "images": len(self.splits.train),
                "model": self.model.adapter_state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": checkpoints.random_state(self.device),
                "position": vars(self.position),
                "record": vars(self.record),
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        if state["images"] != len(self.splits.train):
            raise UserError(
                f"--resume: the run began with {state['images']} training images, "
                f"{self.splits.train.origin} now has {len(self.splits.train)}. Put the data back, "
                "or start a new run with --output."
            )
        self.model.load_adapter_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.position, self.record = Position(**state["position"]), Record(**state["record"])
        if self.processes.first:
            checkpoints.set_random_state(state["random"], self.device)
        else:
            # the checkpoint is the first process's; the others only must differ from it
            torch.manual_seed(self.config.seed + self.processes.rank + self.position.updates)

    def finish(self) -> dict[str, Any]:
        """Touch the test split, once, with the best adapter; write the summary and the plot."""
        record, splits = self.record, self.splits
        # best/ is there only once the first process has come here
        record.unreadable = self.processes.gather(record.unreadable)
        self.model.load_adapter_state_dict(read_adapter(self.output / "best")[1])
        test = None
        if splits.test is not None:
            test = self._evaluate(splits.test)
            record.unreadable = self.processes.gather(record.unreadable + test.unreadable)
        best_row = record.history[record.best_epoch - 1]
        summary = {
            "method": self.config.method,
            "model": self.config.model,
            "trained_parameters": sum(
                p.numel() for p in self.model.parameters() if p.requires_grad
            ),
            "num_classes": splits.num_classes,
            "best_epoch": record.best_epoch,
            "chosen_by": "validation top-1" if splits.validation else "last epoch",
            "train": {
                "split": splits.train.origin,
                "images": len(splits.train),
                "top1": best_row["train_top1"],
                "loss": best_row["train_loss"],
            },
            "validation": splits.validation
            and {
                "split": splits.validation.origin,
                "images": len(splits.validation),
                "top1": best_row["validation_top1"],
                "loss": best_row["validation_loss"],
            },
            "test": test and splits.test and {"split": splits.test.origin, **test.as_dict()},
            "seconds": round(sum(row["seconds"] for row in record.history), 1),
            "unreadable": {"count": len(record.unreadable), "images": record.unreadable},
            "notes": {
                split.name: list(split.notes)
                for split in (splits.train, splits.validation, splits.test)
                if split is not None and split.notes
            },
            "config": self.config.as_dict(),
        }
        if self.processes.first:
            write_json(self.output / "summary.json", summary)
            plot_learning_curve(
                self.output, record.history, f"{self.config.method} on {self.config.model}"
            )
        return summary
