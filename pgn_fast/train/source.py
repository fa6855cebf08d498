"""Where a run's batches come from: the training images step by step, any split once in order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ..errors import UserError
from .config import TrainConfig
from .distributed import Processes
from .given_loader import GivenLoader
from .loader import (
    Batch,
    EpochBatches,
    Normalize,
    eval_transform,
    make_loader,
    pixels_to_keep,
    train_transform,
)
from .split import Split, Splits
from .stream import HOW, StreamPosition, resumes_within


class Source:
    """The batches of a run, as far as they are this process's.

    Args:
        config: how images are read and augmented.
        splits: the images.
        pixels: the preprocessing, by timm's names.
        processes: between whom images are divided.

    Attributes:
        loader: the training images; ``set_position`` says which epoch comes next.
        prepare: makes the model's input of a batch's images on the device.

    Raises:
        UserError: checkpoints within an epoch are asked for where the data cannot go on from one.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, pixels: dict[str, Any], processes: Processes
    ) -> None:
        self.config, self.splits, self.pixels, self.processes = config, splits, pixels, processes
        self.loader = self._training_loader()
        self.prepare = Normalize(pixels, processes.device)
        self._stream = StreamPosition(self.loader, config.seed) if splits.train.streamed else None
        if config.recovery_interval and not self.resumes_within:
            raise UserError(
                "`recovery_interval`: streamed data resume within an epoch by torchdata; leave it "
                f"0, or {HOW}"
            )
        self._in_order: dict[str, Any] = {}

    def _training_loader(self) -> Any:
        config, processes = self.config, self.processes
        if isinstance(self.splits.train.images, GivenLoader):
            return self.splits.train.images.batches(config.seed, processes, paces=True)
        return make_loader(
            self.splits.train,
            # timm erases in normalized pixels; all others are normalized on the device
            train_transform(config, self.pixels, normalize=config.reprob > 0),
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=processes.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
            accumulate=config.grad_accum_steps,
            at_least=pixels_to_keep(config, self.pixels),
            views=config.views,
        )

    def keep(self, kept: Callable[[Any], Any], split: Split) -> None:
        """Let the batches of a split come from what ``kept`` makes of their loader."""
        if split is self.splits.train:
            self.loader = kept(self.loader)
        else:
            self._in_order[split.name] = kept(self.in_order(split))

    @property
    def _sampler(self) -> EpochBatches | None:
        """Of the training images; None where others decide their order."""
        sampler = self.loader.batch_sampler
        return sampler if isinstance(sampler, EpochBatches) else None

    @property
    def batch_size(self) -> int:
        """Images of a full batch: fewer than asked for where there are fewer in all."""
        return self.config.batch_size if self._sampler is None else self._sampler.batch_size

    @property
    def smallest_batch(self) -> int:
        return self.config.batch_size if self._sampler is None else self._sampler.smallest

    @property
    def batches_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def updates_per_epoch(self) -> int:
        if self._sampler is not None:
            return len(self._sampler.starts)
        return max(1, -(-self.batches_per_epoch // self.config.grad_accum_steps))

    def updates_before(self, batch: int) -> int:
        """Optimizer steps of an epoch before the one that begins with this batch."""
        if self._sampler is not None:
            return bisect_left(self._sampler.starts, batch)
        return batch // self.config.grad_accum_steps

    def steps(self, epoch: int, batch: int = 0) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of ``epoch``, from batch number ``batch`` on."""
        self._set_position(epoch, batch)
        batches = iter(self.loader)
        while group := list(islice(batches, self._batches_of_step(batch))):
            yield group
            batch += len(group)

    def _set_position(self, epoch: int, batch: int) -> None:
        """The loader's next pass yields ``epoch``, from its batch number ``batch`` on."""
        if self._stream is not None:
            self._stream.set(epoch, batch)
        else:
            (self._sampler or self.loader).set_position(epoch, batch)

    @property
    def resumes_within(self) -> bool:
        """Whether a run can go on within an epoch."""
        return self._stream is None or resumes_within()

    def state(self) -> Any:
        """What ``load_state`` takes in a run that goes on within an epoch; of streamed data."""
        return None if self._stream is None else self._stream.state()

    def load_state(self, state: Any) -> None:
        if self._stream is not None:
            self._stream.load(state)

    def _batches_of_step(self, batch: int) -> int:
        if self._sampler is not None:
            return max(1, self._sampler.batches_of_step(batch))
        return self.config.grad_accum_steps

    def first_epoch(self) -> Any:
        """The training batches as the first epoch augments them, in any order."""
        self._set_position(0, 0)
        return self.loader

    def in_order(self, split: Split) -> Any:
        """Every image of a split once, as in evaluation, spread over the processes."""
        if split.name not in self._in_order:
            self._in_order[split.name] = self._ordered_loader(split)
        return self._in_order[split.name]

    def _ordered_loader(self, split: Split) -> Any:
        config, processes = self.config, self.processes
        if isinstance(split.images, GivenLoader):
            return split.images.batches(config.seed, processes)
        return make_loader(
            split,
            eval_transform(self.pixels, normalize=False),
            config.validation_batch_size or config.batch_size,
            workers=config.workers,
            pin_memory=processes.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
        )
