"""One run: its epochs, evaluation, what is written when, and how it continues after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..adapters import CONFIG_FILE, read_adapter, save_pretrained
from ..errors import TrainingStopped, UserError, as_user_error
from . import checkpoints
from .config import TrainConfig
from .data import Split
from .distributed import Processes
from .evaluation import Autocast, Score, evaluate
from .failures import out_of_memory, what_is_kept
from .given import GivenLoader
from .head_init import start_head
from .loader import (
    EpochBatches,
    eval_transform,
    make_loader,
    pixels_to_keep,
    set_position,
    train_transform,
)
from .parts import Parts, seed_everything
from .recipe import Schedule, learning_rate, make_optimizer
from .reports import (
    ProgressReport,
    TensorBoard,
    plot_learning_curve,
    write_csv,
    write_json,
)
from .run_folder import RunFolder
from .saving import restore_state, save_state
from .signals import Asked, Interrupted, StopRequest
from .state import Position, Record
from .step import Stepper, too_few_for_batchnorm
from .summary import summarize


class Run:
    """One training run: built from its configuration, or continued from a checkpoint's state."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        processes: Processes,
        parts: Parts,
        state: dict[str, Any] | None,
        stop: StopRequest,
        show: bool,
    ) -> None:
        config = dataclasses.replace(config, lr=learning_rate(config, processes.world))
        self.config, self.folder, self.output = config, folder, folder.path
        self.processes, self.device, self.stop = processes, processes.device, stop
        self.show = show and processes.first
        self.splits, self.pixels, self.model = parts.splits, parts.pixels, parts.model
        self.model.preprocessing = self.pixels
        self.model.class_names = self.splits.class_names
        self.model.to(self.device).train()
        if config.grad_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        self.loader = self._training_loader()
        self._try_out()
        if parts.fresh and state is None:
            self._start_head()
        self.stepper = Stepper(config, self.model, self.splits.num_classes, processes)
        if self.stepper.needs_two and self._smallest_batch() * processes.world < 2:
            raise UserError(too_few_for_batchnorm(config))
        self.stepper.optimizer = self.optimizer = make_optimizer(self.model, config)
        self.schedule = Schedule(config, self.optimizer, self.updates_per_epoch)
        self.position, self.record = Position(), Record()
        # losses that were not looked at yet, as (update, loss * images, correct, images)
        self._pending: list[tuple[int, Tensor, Tensor, int]] = []
        # the same weights on all processes, but dropout of their own
        torch.manual_seed(config.seed + processes.rank)
        if state is not None:
            restore_state(self, state)

    def _training_loader(self) -> Any:
        config = self.config
        if isinstance(self.splits.train.images, GivenLoader):
            return self.splits.train.images.batches(config.seed, self.processes.world)
        return make_loader(
            self.splits.train,
            train_transform(config, self.pixels),
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            rank=self.processes.rank,
            world=self.processes.world,
            accumulate=config.grad_accum_steps,
            at_least=pixels_to_keep(config, self.pixels),
        )

    def _try_out(self) -> None:
        """One blank image forward, which leaves no trace: what cannot run is said before training.

        Raises:
            UserError: a named backend that cannot run here, images that the backbone cannot take.
        """
        blank = torch.zeros(1, *self.pixels["input_size"], device=self.device)
        config = self.config
        with torch.no_grad(), as_user_error(RuntimeError):
            try:
                with torch.autocast(
                    self.device.type, getattr(torch, config.amp_dtype), enabled=config.amp
                ):
                    self.model.eval()(blank)
            except torch.OutOfMemoryError as error:
                raise TrainingStopped(out_of_memory(config, self.output, error)) from error
        self.model.train()

    def _start_head(self) -> None:
        # augmented as in the first epoch: on clean images the probe would be too sure of itself
        loader = self.loader
        set_position(loader, 0)
        classes = self.splits.num_classes
        autocast = Autocast(self.device, self.config.amp, self.config.amp_dtype)
        start_head(self.model, self.config, loader, classes, autocast, self.processes)
        seed_everything(self.config.seed)

    def _smallest_batch(self) -> int:
        return self.config.batch_size if self._sampler is None else self._sampler.smallest

    @property
    def batches_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def updates_per_epoch(self) -> int:
        if self._sampler is not None:
            return len(self._sampler.starts)
        return max(1, -(-self.batches_per_epoch // self.config.grad_accum_steps))

    @property
    def _sampler(self) -> EpochBatches | None:
        """Of the training images; None where they are streamed."""
        sampler = self.loader.batch_sampler
        return sampler if isinstance(sampler, EpochBatches) else None

    def _batches_of_step(self) -> int:
        if self._sampler is not None:
            return max(1, self._sampler.batches_of_step(self.position.batch))
        return self.config.grad_accum_steps

    def _updates_done(self) -> int:
        """Steps of this epoch before the one that comes next."""
        if self._sampler is not None:
            return bisect_left(self._sampler.starts, self.position.batch)
        return self.position.batch // self.config.grad_accum_steps

    @property
    def epochs(self) -> int:
        """Of the whole run; some schedules make it longer than was asked for."""
        return self.schedule.epochs

    def fit(self) -> None:
        """Train from where the run stands to its last epoch."""
        config, begin = self.config, self.position
        total = self.epochs * self.batches_per_epoch
        done = begin.epoch * self.batches_per_epoch + begin.batch
        board = TensorBoard(
            self.output, config.tensorboard and self.processes.first, begin.epoch + 1
        )
        with ProgressReport(total, done, self.show) as report:
            self._announce(report)
            while self.position.epoch < self.epochs:
                self._train_epoch(report)
                row = self._close_epoch(report)
                report.epoch(row, self.epochs)
                board.log(row)
        board.close()

    def _announce(self, report: ProgressReport) -> None:
        if self.folder.took_over:
            report.say(self.folder.took_over)
        for split in (self.splits.train, self.splits.validation, self.splits.test):
            if split is not None:
                report.say(f"{split.name}: {len(split)} images: {split.origin}")
                for note in split.notes:
                    report.say(f"{split.name}: {note}")
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        report.say(
            f"{self.config.method} on {self.config.model}: {count:,} trained parameters, "
            f"{self.splits.num_classes} classes, {self.device}"
        )
        if self._sampler is not None and self._sampler.batch_size < self.config.batch_size:
            report.say(
                f"{len(self.splits.train)} images are fewer than a batch of "
                f"{self.config.batch_size}: batches have {self._sampler.batch_size}"
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
        while group := list(islice(batches, self._batches_of_step())):
            self._note_unreadable([name for batch in group for name in batch.unreadable], report)
            self._update([(b.images, b.labels) for b in group], report)
            position.batch += len(group)
            report.batches(
                len(group), sum(len(b.labels) for b in group), position.epoch + 1, self.epochs
            )
            looks = len(self._pending) >= config.log_interval
            if looks:
                loss = self._check_losses()
                report.step(position.epoch + 1, position.batch, self.batches_per_epoch, loss)
            now = time.perf_counter()
            position.seconds += now - start
            start = now
            interval = config.recovery_interval
            if interval and position.batch // interval > (position.batch - len(group)) // interval:
                self._save_checkpoint()
            # several processes agree on stopping when they look at the losses
            if self.processes.world == 1 or looks:
                self._stop_where_asked()
        self._check_losses()
        position.seconds += time.perf_counter() - start
        if self.processes.sum(position.seen)[0] == 0:
            raise UserError(
                f"data: none of the {len(self.splits.train)} training images can be read, such as "
                f"{self.record.unreadable[0] if self.record.unreadable else 'none'}."
            )

    def _update(self, group: list[tuple[Tensor, Tensor]], report: ProgressReport) -> None:
        """One optimizer step on the mean loss of all images in ``group``."""
        alone = self.processes.world == 1
        if alone and self.stepper.needs_two:
            # unreadable neighbors have left one image, too few for the generator's BatchNorm
            group = [part for part in group if len(part[1]) != 1]
        if alone:
            group = [part for part in group if len(part[1])]
            if not group:
                return
        self.schedule.set(self.position.epoch, self._updates_done())
        self.position.updates += 1
        self._pending.append(
            (
                self.position.updates,
                *self.stepper.step(group, self.position.epoch, self.position.updates),
            )
        )

    def _check_losses(self) -> float:
        """Add the losses since the last look to the epoch's sums; stop at one that is not finite.

        Looking waits for the device, so it is done every ``log_interval`` updates and before
        anything is written: a bad state never takes a good checkpoint's place.

        Returns:
            The mean loss of the images since the last look.
        """
        loss, images = 0.0, 0
        for update, loss_sum, correct, total in self._pending:
            value = float(loss_sum)
            if not math.isfinite(value):
                self._fail(f"the loss is {value} at step {update}")
            self.position.loss_sum += value
            self.position.correct += int(correct)
            self.position.seen += total
            loss, images = loss + value, images + total
        self._pending.clear()
        return loss / max(images, 1)

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
                self._fail(f"{name} is not finite after step {self.position.updates}")

    def _fail(self, what: str) -> None:
        raise TrainingStopped(
            f"{what} (epoch {self.position.epoch + 1}); {what_is_kept(self.output)}. "
            "A lower `lr`, `clip_grad` 1 or `amp_dtype` bfloat16 may help."
        )

    def _stop_where_asked(self) -> None:
        """End here, with a checkpoint, where a signal came to one of the processes.

        Raises:
            Interrupted: one did.
        """
        if number := max(self.processes.collect(self.stop.number or 0)):
            self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        if self.position.epoch == self.epochs:
            kept = "with the test images still to be read"
        elif self.splits.train.streamed and self.position.batch:
            kept = f"{what_is_kept(self.output)} (streamed data resume where an epoch begins)"
        else:
            self._save_checkpoint()
            kept = f"saved at step {self.position.updates}"
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}, {kept}. Continue with: "
            f"pgn-fast train --resume {self.output}",
            number,
        )

    def _close_epoch(self, report: ProgressReport) -> dict[str, Any]:
        """Validate, write everything, the checkpoint last, and move on to the next epoch."""
        position, record = self.position, self.record
        loss_sum, correct, seen = self.processes.sum(
            position.loss_sum, position.correct, position.seen
        )
        row: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "lr": self.schedule.rate,
            "train_loss": loss_sum / seen,
            "train_top1": 100 * correct / seen,
        }
        value: float | None = None  # larger is better
        last = position.epoch + 1 == self.epochs
        if self.splits.validation is None:
            # nothing to choose by: the last epoch is the best
            value = math.inf
        elif last or (position.epoch + 1) % self.config.val_interval == 0:
            score = self._evaluate(self.splits.validation)
            self._note_unreadable(score.unreadable, report)
            row |= {"validation_loss": score.loss, "validation_top1": score.top1}
            value = score.value(self.config.eval_metric)
        row |= {
            "images_per_second": round(seen / max(position.seconds, 1e-9), 1),
            "seconds": round(position.seconds, 3),
        }
        record.history.append(row)
        self.schedule.end_epoch(position.epoch, value)
        best = value is not None and (value > record.best_score or math.isinf(value))
        if best:
            assert value is not None
            record.best_epoch, record.best_score = row["epoch"], value
        self.position = Position(epoch=position.epoch + 1, updates=position.updates)
        self._check_weights()
        if self.processes.first:
            with self.stepper.average.applied():
                self._save_adapter("last")
                if best:
                    record.best_digest = self._save_adapter("best")
                if value is not None:
                    self._keep(value, row["epoch"])
            write_csv(self.output, record.history)
        self._save_checkpoint()
        return row

    def _keep(self, value: float, epoch: int) -> None:
        """Keep the adapters of the ``checkpoint_hist`` best epochs, the earlier of equals."""
        count = self.config.checkpoint_hist
        kept = sorted([*self.record.kept, [value, epoch]], key=lambda row: (-row[0], row[1]))
        self.record.kept = kept[:count]
        if [value, epoch] in self.record.kept:
            self._save_adapter(f"epochs/{epoch:04d}")
        for _, old in kept[count:]:
            shutil.rmtree(self.output / "epochs" / f"{old:04d}", ignore_errors=True)

    def _ordered(self, split: Split) -> Any:
        """Every image of a split once, as in evaluation, spread over the processes."""
        if isinstance(split.images, GivenLoader):
            return split.images.batches(self.config.seed, self.processes.world)
        return make_loader(
            split,
            eval_transform(self.pixels),
            self.config.validation_batch_size or self.config.batch_size,
            workers=self.config.workers,
            rank=self.processes.rank,
            world=self.processes.world,
        )

    def _evaluate(self, split: Split) -> Score:
        """The score of the model, or of its average, on a split; a single process stops within."""
        try:
            with self.stepper.average.applied():
                return evaluate(
                    self.model,
                    self._ordered(split),
                    self.splits.num_classes,
                    self.stepper.autocast,
                    self.processes,
                    self._between_batches,
                )
        except Asked as request:
            self._stop(request.number)

    def _between_batches(self) -> None:
        number = self.stop.number if self.processes.world == 1 else None
        if number:
            raise Asked(number)

    def _note_unreadable(self, names: Iterable[str], report: ProgressReport) -> None:
        for name in names:
            if name not in self.record.unreadable:
                self.record.unreadable.append(name)
                report.say(f"warning: unreadable image, left out: {name}")

    def _save_adapter(self, name: str) -> str:
        """Write ``last/`` or ``best/``; the digest of its tensors."""
        folder = self.output / name
        save_pretrained(self.model, folder)
        return json.loads((folder / CONFIG_FILE).read_text())["weights_digest"]

    def _save_checkpoint(self) -> None:
        self._check_losses()
        self._check_weights()
        save_state(self)

    def finish(self) -> dict[str, Any]:
        """Touch the test split, once, with the best adapter; write the summary and the plot."""
        record, splits = self.record, self.splits
        # best/ is there only once the first process has come here
        record.unreadable = self.processes.gather(record.unreadable)
        digest = self.processes.collect(record.best_digest)[0]
        adapter, tensors = read_adapter(self.output / "best")
        if adapter["weights_digest"] != digest:
            raise TrainingStopped(
                f"{self.output / 'best'} is no longer the adapter that this run wrote; something "
                f"else wrote into {self.output}. The run's own last state is in "
                f"{self.output / checkpoints.FILE}."
            )
        self.model.load_adapter_state_dict(tensors)
        test = None
        if splits.test is not None:
            test = self._evaluate(splits.test)
            record.unreadable = self.processes.gather(record.unreadable + test.unreadable)
        summary = summarize(self, test)
        if self.processes.first:
            write_json(self.output / "summary.json", summary)
            plot_learning_curve(
                self.output, record.history, f"{self.config.method} on {self.config.model}"
            )
        return summary
