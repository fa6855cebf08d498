"""One run: its epochs, evaluation, what is written when, and how it continues after a kill."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cuda_graphs import graphed_forward
from ..errors import TrainingStopped, UserError, as_user_error
from .config import TrainConfig
from .distributed import Processes
from .evaluation import Autocast, evaluate
from .failures import not_tested, out_of_memory, what_is_kept
from .frozen import FrozenCache
from .head_init import start_head
from .objective import Objective
from .parts import Parts, seed_everything
from .recipe import Schedule, learning_rate, make_optimizer
from .reports import ProgressReport, plot_learning_curve, write_csv, write_json
from .run_folder import RunFolder
from .saving import keep_adapter, load_best, restore_state, save_adapter, save_state
from .score_files import write_details
from .scores import UNDEFINED, Score, check_torchmetrics
from .signals import Asked, Interrupted, StopRequest
from .source import Source
from .split import Split
from .state import Position, Record
from .step import Stepper, too_few_for_batchnorm
from .summary import announcement, summarize
from .trackers import Trackers, check_trackers


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
        check_trackers(config.tracker)
        check_torchmetrics(config.task)
        self.splits, self.pixels, self.model = parts.splits, parts.pixels, parts.model
        self.model.preprocessing = self.pixels
        self.model.class_names = self.splits.class_names
        self.model.task = config.task
        self.model.to(self.device).train()
        if config.grad_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        if config.sched == "plateau" and self.splits.validation is None:
            raise UserError(
                "`sched` plateau follows the validation score, and there are no validation images: "
                "give some, or another schedule."
            )
        self.source = Source(config, self.splits, self.pixels, processes)
        self._try_out()
        self._keep_frozen(parts)
        if parts.fresh and state is None:
            self._start_head()
        objective = parts.objective or Objective(config, self.splits.num_classes, self.device)
        # what became of CUDA graphs, to be said by the next report
        self._notes: list[str] = []
        tell = self._notes.append
        self.stepper = Stepper(config, self.model, objective, processes, self.source.prepare, tell)
        self._forward = graphed_forward(self.model, self.stepper.autocast, tell)
        if self.stepper.needs_two and self.source.smallest_batch * processes.world < 2:
            raise UserError(too_few_for_batchnorm(config))
        self.stepper.optimizer = self.optimizer = make_optimizer(self.model, config)
        self.schedule = Schedule(config, self.optimizer, self.source.updates_per_epoch, parts.rates)
        self.position, self.record, self.trackers = Position(), Record(), Trackers()
        # losses that were not looked at yet, as (update, loss * images, correct, images)
        self._pending: list[tuple[int, Tensor, Tensor, int]] = []
        # the same weights on all processes, but dropout of their own
        torch.manual_seed(config.seed + processes.rank)
        if state is not None:
            restore_state(self, state)

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

    def _keep_frozen(self, parts: Parts) -> None:
        """Compute once what the frozen blocks make of the images that every epoch sees."""
        self.frozen = FrozenCache(self, parts)
        if self.frozen.reason is not None:
            return
        # what cannot work is said before anything is written
        Schedule(
            self.config, make_optimizer(self.model, self.config), self.source.updates_per_epoch
        )
        for split in (self.splits.train, self.splits.validation):
            if split is not None:
                self.source.keep(self.frozen.keep, split)

    def _start_head(self) -> None:
        # augmented as in the first epoch: on clean images the probe would be too sure of itself
        images = self.source.first_epoch()
        classes = self.splits.num_classes
        autocast = Autocast(self.device, self.config.amp, self.config.amp_dtype)
        start_head(
            self.model, self.config, images, classes, autocast, self.processes, self.source.prepare
        )
        seed_everything(self.config.seed)

    @property
    def epochs(self) -> int:
        """Of the whole run; some schedules make it longer than was asked for."""
        return self.schedule.epochs

    def fit(self, until: int | None = None) -> Record:
        """Train from where the run stands to its last epoch, or pause after epoch ``until``."""
        end = self.epochs if until is None else min(until, self.epochs)
        begin = self.position
        # after the folder is there, which nothing that was refused before has made
        if self.processes.first:
            self.trackers.start(self.config, self.output, self.device, begin.updates + 1)
        total = self.epochs * self.source.batches_per_epoch
        done = begin.epoch * self.source.batches_per_epoch + begin.batch
        with ProgressReport(total, done, self.show) as report:
            for line in announcement(self):
                report.say(line)
            while self.position.epoch < end:
                self._train_epoch(report)
                row = self._close_epoch(report)
                report.epoch(row, self.epochs)
                self.trackers.log(row, self.position.updates)
                if times := self.stepper.times.line():
                    report.say(times)
        return self.record

    def _train_epoch(self, report: ProgressReport) -> None:
        config, position = self.config, self.position
        self.model.train()
        start = time.perf_counter()
        times = self.stepper.times
        times.begin()
        steps = self.source.steps(position.epoch, position.batch)
        while True:
            with times.phase("loader"):
                group = next(steps, None)
            if group is None:
                break
            self._note_unreadable([name for batch in group for name in batch.unreadable], report)
            self._update([(b.images, b.labels) for b in group], report)
            position.batch += len(group)
            report.batches(
                len(group), sum(len(b.labels) for b in group), position.epoch + 1, self.epochs
            )
            self._say_notes(report)
            looks = len(self._pending) >= config.log_interval
            if looks:
                loss = self._check_losses()
                report.step(position.epoch + 1, position.batch, self.source.batches_per_epoch, loss)
                self.trackers.log({"step_loss": loss, "lr": self.schedule.rate}, position.updates)
            times.end_step()
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
        self.schedule.set(self.position.epoch, self.source.updates_before(self.position.batch))
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
        elif self.position.batch and not self.source.resumes_within:
            kept = f"{what_is_kept(self.output)} (streamed data resume where an epoch begins)"
        else:
            self._save_checkpoint()
            kept = f"saved at step {self.position.updates}"
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}, {kept}",
            f"pgn-fast train --resume {shlex.quote(str(self.output))}",
            number,
        )

    def _close_epoch(self, report: ProgressReport) -> dict[str, Any]:
        """Validate, write everything, the checkpoint last, and move on to the next epoch."""
        position, record = self.position, self.record
        loss_sum, correct, seen = self.processes.sum(
            position.loss_sum, position.correct, position.seen
        )
        record.images["train"] = int(seen)
        row: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "lr": self.schedule.rate,
            "train_loss": loss_sum / seen,
        }
        if self.config.task == "multiclass":
            row["train_top1"] = 100 * correct / seen
        value: float | None = None  # larger is better
        last = position.epoch + 1 == self.epochs
        if self.splits.validation is None:
            # nothing to choose by: the last epoch is the best
            value = math.inf
        elif last or (position.epoch + 1) % self.config.val_interval == 0:
            score = self._evaluate(self.splits.validation)
            record.images["validation"] = score.images
            self._note_unreadable(score.unreadable, report)
            self._say_notes(report)
            if score.undefined and not record.history:
                report.say(f"validation: {UNDEFINED}, so that the loss chooses the epoch")
            name, found = score.headline
            row |= {"validation_loss": score.loss, f"validation_{name}": found}
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
                save_adapter(self, "last")
                if best:
                    record.best_digest = save_adapter(self, "best")
                if value is not None:
                    keep_adapter(self, value, row["epoch"])
            write_csv(self.output, record.history, self.config.task)
        self._save_checkpoint()
        return row

    def _evaluate(self, split: Split, details: bool = False) -> Score:
        """The score of the model, or of its average, on a split; a single process stops within."""
        try:
            with self.stepper.average.applied():
                return evaluate(
                    self.model,
                    self.source.in_order(split),
                    self.splits.num_classes,
                    self.stepper.autocast,
                    self.processes,
                    self._between_batches,
                    task=self.config.task,
                    details=details,
                    prepare=self.source.prepare,
                    forward=self._forward,
                )
        except Asked as request:
            self._stop(request.number)

    def _between_batches(self) -> None:
        number = self.stop.number if self.processes.world == 1 else None
        if number:
            raise Asked(number)

    def _say_notes(self, report: ProgressReport) -> None:
        for note in self._notes:
            report.say(note)
        self._notes.clear()

    def _note_unreadable(self, names: Iterable[str], report: ProgressReport) -> None:
        for name in names:
            if name not in self.record.unreadable:
                self.record.unreadable.append(name)
                report.say(f"warning: unreadable image, left out: {name}")

    def _save_checkpoint(self) -> None:
        self._check_losses()
        self._check_weights()
        save_state(self)

    def finish(self) -> dict[str, Any]:
        """Touch the test split, once, with the best adapter; write the summary and the plot."""
        record, splits = self.record, self.splits
        # best/ is there only once the first process has come here
        record.unreadable = self.processes.gather(record.unreadable)
        load_best(self)
        test = None
        if splits.test is not None:
            if not self.frozen.auto:  # other runs that share the folder look at them, too
                self.source.keep(self.frozen.keep, splits.test)
            try:
                test = self._evaluate(splits.test, details=True)
            except UserError as error:
                raise not_tested(splits.test, error, self.output) from error
            record.unreadable = self.processes.gather(record.unreadable + test.unreadable)
        summary = summarize(self, test)
        if self.processes.first:
            write_json(self.output / "summary.json", summary)
            if test is not None:
                for line in write_details(self.output, test, self.splits.class_names):
                    if self.show:
                        print(line, file=sys.stderr)
                scores = {f"test_{k}": v for k, v in test.as_dict().items()}
                self.trackers.log(scores, self.position.updates)
            plot_learning_curve(
                self.output, record.history, f"{self.config.method} on {self.config.model}"
            )
        self.frozen.close()
        return summary
