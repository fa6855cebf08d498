"""People's own loaders: their batches as the batches of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..errors import UserError
from .distributed import Processes
from .evaluation import check_labels
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
        # repeated by the sampler, so that processes have equally many, and are left out
        self.rank, self.world = 0, 1
        self.size: int | None = None
        self._paces = self._told = False

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

    def batches(self, seed: int, processes: Processes, *, paces: bool = False) -> GivenLoader:
        """The loader for a run of so many processes; every image comes once.

        Args:
            paces: steps are counted by ``len()``, in training.

        Raises:
            UserError: processes would see the same images, not all of them, or take more steps
                than others.
        """
        sampler, world, rank = self._sampler, processes.world, processes.rank
        divides = isinstance(sampler, DistributedSampler)
        if world > 1 and not divides:
            raise UserError(
                f"{self.title}: with {world} processes a loader needs torch's DistributedSampler; "
                "or give the data set itself, which is divided here."
            )
        if divides and (sampler.num_replicas, sampler.rank) != (world, rank):
            raise UserError(
                f"{self.title}: its DistributedSampler has num_replicas={sampler.num_replicas} and "
                f"rank={sampler.rank}, this is process {rank} of {world}; or give the data set "
                "itself, which is divided here."
            )
        if paces and len(set(lengths := processes.collect(len(self)))) > 1:
            raise UserError(
                f"{self.title}: the loaders of the processes have {', '.join(map(str, lengths))} "
                "batches; all have to take as many steps."
            )
        self.seed, self.rank, self.world, self._paces = seed, rank, world, paces
        if divides and sampler.total_size - len(sampler.dataset) < world:
            self.size = len(sampler.dataset)
        return self

    @property
    def _sampler(self) -> Any:
        """What chooses a loader's images, or those of its batches."""
        of_batches = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        own = getattr(self.loader, "sampler", None)
        return of_batches if isinstance(of_batches, DistributedSampler) else own

    def check_first(self, num_classes: int) -> None:
        """Look at a first batch before the loader's turn comes, if it can be read again.

        Raises:
            UserError: its images or labels cannot be meant.
        """
        again = isinstance(self.loader, DataLoader) and len(self.loader) > 0
        if self.task is None or not again or isinstance(self.loader.dataset, IterableDataset):
            return
        with seeded(self.seed, 0):
            item = next(iter(self.loader))
        where = f"batch 0 of {self.title}"
        labels = self._checked(item, where, False)[1]
        try:
            check_labels(labels, num_classes, self.task)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('data: ')}") from error

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next pass is that of ``epoch``, from its batch number ``batch`` on."""
        self.epoch, self.start = epoch, batch
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

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
        begin = number = 0
        for number, item in enumerate(chain(first, iterator)):
            if number == len(self):
                self._miscounted("more")
            images, labels = self._checked(item, f"batch {number} of {self.title}", number == 0)
            places = self.rank + self.world * torch.arange(begin, begin + len(images))
            begin += len(images)
            if self.size is not None and len(places) and int(places[-1]) >= self.size:
                kept = places < self.size
                images, labels, places = images[kept], labels[kept], places[kept]
            if number >= self.start:
                yield Batch(images, labels, places, [])
        if number + 1 < len(self):
            self._miscounted(str(number + 1))

    def _miscounted(self, found: str) -> None:
        """Say once that ``len()`` counts other batches than there are.

        Raises:
            UserError: in one of several processes, where the others would wait for its steps.
        """
        said = f"{self.title} gave {found} batches, its len() is {len(self)}"
        if self._paces and self.world > 1:
            raise UserError(f"{said}: of several processes all have to take as many steps.")
        if self._paces and not self._told:
            warnings.warn(f"{said}: learning rates follow len().", stacklevel=3)
        self._told = True

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
