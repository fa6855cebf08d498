"""People's own loaders: their batches as the batches of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ..errors import UserError
from .given_items import labels_of, pair, unusual
from .loader import Batch
from .seeding import seeded


class GivenLoader:
    """A loader of batches, as the batches of a run; its order follows from seed and epoch."""

    batch_sampler = None

    def __init__(
        self, loader: Any, title: str, task: str | None, pixels: Mapping[str, Any] | None = None
    ) -> None:
        self.loader, self.title, self.task, self.pixels = loader, title, task, pixels
        self.seed, self.epoch, self.start = 0, 0, 0
        # where the images of this process are in the order of all; those beyond ``size`` are
        # repeated by the sampler, so that processes have equally many
        self.rank, self.world = 0, 1
        self.size: int | None = None

    @property
    def count(self) -> int:
        """Images, or batches where the loader does not tell."""
        return len(getattr(self.loader, "dataset", self.loader))

    def open(self, index: int) -> tuple[Any, int]:
        """A loader gives batches only."""
        raise UserError(f"{self.title} is a loader; its images have no numbers.")

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    labels = None

    def batches(self, seed: int, world: int, *, once: bool = False) -> GivenLoader:
        """The loader for a run of ``world`` processes.

        Args:
            once: every image counts once: what a DistributedSampler repeats is left out.

        Raises:
            UserError: every process would see the same images.
        """
        sampler = getattr(self.loader, "sampler", None)
        if world > 1 and not isinstance(sampler, DistributedSampler):
            raise UserError(
                f"{self.title}: with {world} processes a loader needs torch's DistributedSampler; "
                "or give the data set itself, which is divided here."
            )
        self.seed = seed
        if isinstance(sampler, DistributedSampler):
            self.rank, self.world = sampler.rank, sampler.num_replicas
            self.size = len(sampler.dataset) if once else None  # type: ignore[arg-type]
        return self

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next pass is that of ``epoch``, from its batch number ``batch`` on."""
        self.epoch, self.start = epoch, batch
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # a loader draws its order from torch's generator when its first batch is asked for
        with seeded(self.seed, self.epoch):
            iterator = iter(self.loader)
            first = list(islice(iterator, 1))
        if not first:
            raise UserError(
                f"{self.title} gave no batch: a loader has to begin again each time it is iterated."
            )
        begin = 0
        for number, item in enumerate(chain(first, iterator)):
            images, labels = self._checked(item, f"batch {number} of {self.title}", number == 0)
            places = self.rank + self.world * torch.arange(begin, begin + len(images))
            begin += len(images)
            if self.size is not None and len(places) and int(places[-1]) >= self.size:
                kept = places < self.size
                images, labels, places = images[kept], labels[kept], places[kept]
            if number >= self.start:
                yield Batch(images, labels, places, [])

    def _checked(self, item: Any, where: str, first: bool) -> tuple[Tensor, Tensor]:
        images, labels = pair(item, where)
        if not isinstance(images, Tensor) or images.ndim != 4 or _channels_last(images):
            raise UserError(
                f"{where}: images are "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}; "
                "a tensor (B, 3, H, W) is expected."
            )
        if first and self.pixels and (said := unusual(images, self.pixels)):
            warnings.warn(f"{self.title}: {said}", stacklevel=2)
        if self.task is None:
            return images, labels
        return images, labels_of(labels, len(images), self.task, where)


def _channels_last(images: Tensor) -> bool:
    return images.shape[3] == 3 and images.shape[1] != 3
