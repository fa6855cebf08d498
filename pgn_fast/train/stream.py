"""Streamed data: shards that are read in order, their position in an epoch, and back to it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from ..images import upright_rgb
from .seeding import seeded


class Stream(IterableDataset):
    """A streamed timm data set as (image, label, running number).

    A process that goes on within an epoch reads what it has seen again, without decoding into the
    model's input. It is torchdata's ``Stateful``.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Image.Image], Tensor], seed: int | None = None
    ) -> None:
        self.dataset, self.transform, self.seed, self.epoch = dataset, transform, seed, 0
        self._number = self._skip = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of ``epoch``, whatever passes there were before in this process."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        reader: Any = getattr(self.dataset, "reader", None)
        if self.seed is not None and getattr(reader, "ds", None) is not None:
            # timm's reader goes on with its random numbers from pass to pass, and begins again
            # without this
            reader.ds = None
        if self.seed is not None and hasattr(reader, "worker_seed"):
            reader.worker_seed = _number(self.seed, epoch)

    def state_dict(self) -> dict[str, int]:
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._number = self._skip = state["number"]

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        skip, self._skip = self._skip, 0
        for number, (image, label) in enumerate(self.dataset):
            self._number = number + 1
            if number < skip:
                continue
            with seeded(self.seed or 0, self.epoch, worker_id, number):
                pixels = self.transform(upright_rgb(image))
            yield pixels, int(label), number


class StreamPosition:
    """Where a loader of a ``Stream`` stands: by epoch, and with torchdata within it."""

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self._loader, self._seed = loader, seed
        self._saved: Any = None

    def set(self, epoch: int, batch: int) -> None:
        """The next pass is that of ``epoch``, from its batch number ``batch`` on.

        Raises:
            UserError: no state of that batch was loaded.
        """
        stream: Any = self._loader.dataset
        stream.set_epoch(epoch)
        # workers seed the order within their shards from it
        assert self._loader.generator is not None
        self._loader.generator.manual_seed(_number(self._seed, epoch))
        if batch and self._saved is None:
            raise UserError(f"`resume`: streamed data go on within an epoch with torchdata: {HOW}")
        if batch:
            loader: Any = self._loader
            loader.load_state_dict(self._saved)
        self._saved = None

    def state(self) -> Any:
        """What ``load`` takes, after the batch that was asked for last; None where an epoch begins,
        or without torchdata."""
        loader: Any = self._loader
        if not hasattr(loader, "state_dict"):
            return None
        return {"workers": loader.num_workers, "loader": loader.state_dict()}

    def load(self, state: Any) -> None:
        """Raises UserError: as many ``workers`` as there were, each with shards of its own."""
        if state is not None and state["workers"] != self._loader.num_workers:
            raise UserError(
                f"`resume`: {state['workers']} `workers` were reading the shards, now "
                f"{self._loader.num_workers} would: the run goes on with as many as before."
            )
        self._saved = None if state is None else state["loader"]


HOW = "pip install 'pgn_fast[wds]'"


def resumes_within() -> bool:
    """Whether streams can go on within an epoch: torchdata is installed."""
    return importlib.util.find_spec("torchdata") is not None


def stream_loader(stream: Stream, batch_size: int, options: dict[str, Any]) -> DataLoader:
    """torchdata's loader, which knows where it stands, or torch's.

    Args:
        stream: with a seed, for training: whole batches only.
        options: of torch's DataLoader.
    """
    # a worker's copy of the stream must hear of the next epoch
    options = {**options, "persistent_workers": False, "drop_last": stream.seed is not None}
    if hasattr(stream.dataset, "set_loader_cfg"):
        # how many images an epoch has depends on how they are spread
        stream.dataset.set_loader_cfg(num_workers=options["num_workers"])
    if stream.seed is None or not resumes_within():
        return DataLoader(stream, batch_size, **options)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(stream, batch_size, **options)


def _number(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
