"""From a split to batches: transforms, per-image randomness, and a data order that can be resumed.

What happens to an image depends on (seed, epoch, image) alone: not on the number of workers, and
not on where a run was interrupted.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..adapters import backbone_pixels
from ..errors import UserError
from ..images import bounded
from .seeding import seeded
from .split import DigitImages, FolderImages, Split
from .stream import Stream, stream_loader

if TYPE_CHECKING:
    from .config import TrainConfig

Transform = Callable[[Image.Image], Tensor]


class Batch(NamedTuple):
    """B images that could be read, and the names of those that could not."""

    images: Tensor  # (B, 3, H, W): uint8 pixels, or normalized float32
    labels: Tensor  # (B,) int64; -1 where unknown; multi-label: (B, C) of 0 and 1, float32
    indices: Tensor  # (B,) int64, into the split's images
    unreadable: list[str]  # "name: reason"


class Unreadable(NamedTuple):
    """An image that could not be decoded."""

    message: str


def preprocessing(backbone: torch.nn.Module, config: TrainConfig) -> dict[str, Any]:
    """The backbone's own preprocessing, with what the configuration overrides."""
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    return backbone_pixels(backbone, **{name: getattr(config, name) for name in names})


def train_transform(
    config: TrainConfig, pixels: dict[str, Any], *, normalize: bool = True
) -> Transform:
    """timm's training transform with the configuration's augmentation.

    Args:
        pixels: what ``preprocessing`` returned.
        normalize: to float32; otherwise pixels stay uint8, a quarter of the bytes, for whoever
            normalizes them on the device. Random erasing needs normalized ones.

    Raises:
        UserError: timm knows no such auto-augment policy.
    """
    from timm.data import create_transform

    if config.no_aug and config.crop_mode == "squash":
        return eval_transform(pixels, normalize=normalize)
    with _named_policy(config.aa):
        transform = create_transform(
            pixels["input_size"],
            is_training=True,
            no_aug=config.no_aug,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter,
            color_jitter_prob=config.color_jitter_prob,
            grayscale_prob=config.grayscale_prob,
            gaussian_blur_prob=config.gaussian_blur_prob,
            train_crop_mode=config.train_crop_mode,
            auto_augment=config.aa,
            re_prob=config.reprob,
            re_mode=config.remode,
            re_count=config.recount,
            interpolation=config.train_interpolation or pixels["interpolation"],
            mean=pixels["mean"],
            std=pixels["std"],
            normalize=normalize,
        )
    return bounded(transform)


def pixels_to_keep(config: TrainConfig, pixels: dict[str, Any]) -> int:
    """Pixels of a photo's shorter side from which no random crop has to be enlarged.

    A JPEG of twice as many or more is scaled down while it is decoded (``read_image``).
    """
    smallest = 1.0 if config.no_aug else config.scale[0]
    stretched = max(config.ratio[1], 1 / config.ratio[0])
    return math.ceil(max(pixels["input_size"][1:]) * math.sqrt(stretched / smallest))


@contextmanager
def _named_policy(aa: str | None) -> Iterator[None]:
    """timm answers an unknown policy with any of these, none of which names the flag."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if aa is None:
            raise
        raise UserError(
            f"`aa` {aa}: timm cannot read this policy ({error}); give one such as "
            "rand-m9-mstd0.5, augmix-m5-w4, original or 3a."
        ) from error


def eval_transform(pixels: dict[str, Any], *, normalize: bool = True) -> Transform:
    """timm's evaluation transform: resize, center crop, normalize as ``train_transform`` does."""
    from timm.data import create_transform

    return bounded(create_transform(**pixels, normalize=normalize))


class Normalize:
    """uint8 pixels (B, 3, H, W) to the model's input, to the bit as torchvision's transforms do it;
    floating-point images are that already.

    Args:
        pixels: what ``preprocessing`` returned.
        device: of the images.
    """

    def __init__(self, pixels: dict[str, Any], device: torch.device) -> None:
        self._mean, self._std = (
            torch.tensor(pixels[name], device=device).view(-1, 1, 1) for name in ("mean", "std")
        )

    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images
        return images.float().div_(255).sub_(self._mean).div_(self._std)


class Samples(Dataset):
    """Transformed images; a key is (view, position in the split), a view being an epoch's number,
    or an earlier one's whose images are shown again."""

    def __init__(self, split: Split, transform: Transform, seed: int | None = None) -> None:
        """``seed`` makes the transform's randomness; None: the transform has none."""
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int] | Unreadable:
        view, position = key
        index = self.split.indices[position]
        if self.seed is None:
            return self._sample(index)
        # around the opening too: other people's data sets may augment there
        with seeded(self.seed, view, index):
            return self._sample(index)

    def _sample(self, index: int) -> tuple[Tensor, Any, int] | Unreadable:
        try:
            image, label = self.split.images.open(index)
        except UserError:
            raise  # a label that cannot be meant is no damaged image
        # other people's data sets answer damaged images with nearly every kind of exception
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{self.split.images.name(index)}: {reason}")
        if isinstance(image, Tensor):
            return image.cpu(), label, index  # data that lie on a GPU cannot be pinned
        try:
            return self.transform(image), label, index
        except MemoryError:
            reason = f"no memory left to resize {image.width} × {image.height} pixels"
            return Unreadable(f"{self.split.images.name(index)}: {reason}")


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of an epoch, every image once, from any batch of it on.

    An epoch is divided into optimizer steps, a step into ``accumulate`` batches, a batch into the
    processes' parts, so that the images of a step depend on their number only, not on how they are
    spread. Where less than half a step would be left over, the last two steps share what there is:
    none is so small that BatchNorm or the gradient's noise would suffer.

    Attributes:
        starts: the number of the first batch of each step.
        views: how many epochs look at the images differently, before they look so again; 0: all do.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        views: int = 0,
    ):
        # a split smaller than one batch is one batch
        self.batch_size = max(1, min(batch_size, size // world))
        self.seed, self.rank, self.world, self.views = seed, rank, world, views
        self.size, self.epoch, self.start = size, 0, 0
        whole = batch_size * world * accumulate
        ends = [*range(whole, size, whole), size]
        if len(ends) > 1 and 2 * (size - ends[-2]) < whole:
            begin = ends[-3] if len(ends) > 2 else 0
            ends[-2] = begin + -(-(size - begin) // 2)
        self.starts: list[int] = []
        self._batches: list[np.ndarray] = []  # places in the epoch's order
        for begin, end in pairwise([0, *ends]):
            self.starts.append(len(self._batches))
            places = np.arange(begin, end)
            self._batches += np.array_split(places, -(-len(places) // (batch_size * world)))

    @property
    def smallest(self) -> int:
        """Images of the smallest part of a batch that a process gets."""
        return min(len(batch) for batch in self._batches) // self.world

    def batches_of_step(self, batch: int) -> int:
        """How many batches the step has that begins with this one."""
        step = bisect_right(self.starts, batch)
        end = self.starts[step] if step < len(self.starts) else len(self)
        return end - batch

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next pass yields the batches of ``epoch`` from number ``batch`` on."""
        self.epoch, self.start = epoch, batch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).numpy()
        for batch in self._batches[self.start :]:
            own = np.array_split(order[batch], self.world)[self.rank]
            view = self.epoch % self.views if self.views else self.epoch
            yield [(view, i) for i in own.tolist()]


class OrderedBatches(Sampler[list[tuple[int, int]]]):
    """Every image once, in order; with several processes each takes every ``world``-th."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1):
        self.positions, self.batch_size = range(rank, size, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for begin in range(0, len(self.positions), self.batch_size):
            yield [(0, i) for i in self.positions[begin : begin + self.batch_size]]


def stack_labels(labels: list[Any]) -> Tensor:
    """The labels of a batch: (B,) int64, or (B, C) of multi-label images."""
    if labels and isinstance(labels[0], Tensor):
        return _stacked(labels, "labels")
    return torch.tensor(labels, dtype=torch.int64)


def _stacked(tensors: list[Tensor], what: str) -> Tensor:
    """Raises UserError: other shapes, or pictures beside tensors that are the model's input."""
    kinds = {(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors}
    if len(kinds) > 1:
        (one, first), (two, second), *_ = sorted(kinds)
        raise UserError(
            f"data: {what} of one batch are tensors {one} of {first} and {two} of {second}; they "
            "need one shape and dtype (pictures become uint8)."
        )
    return torch.stack(tensors)


def collate(samples: list[tuple[Tensor, Any, int] | Unreadable]) -> Batch:
    """One batch; unreadable images leave it, by name."""
    good = [s for s in samples if not isinstance(s, Unreadable)]
    images = _stacked([s[0] for s in good], "images") if good else torch.empty(0)
    return Batch(
        images,
        stack_labels([s[1] for s in good]),
        torch.tensor([s[2] for s in good], dtype=torch.int64),
        [s.message for s in samples if isinstance(s, Unreadable)],
    )


def default_workers(split: Split, batch_size: int) -> int:
    """Processes that read images: the cores that this process may use, up to 8, and no more than
    there are batches; none where one batch is all, images are no files, or data are streamed."""
    batches = -(-len(split) // batch_size)
    if batches < 2 or split.streamed or isinstance(split.images, DigitImages):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores or 1, batches)


def make_loader(
    split: Split,
    transform: Transform,
    batch_size: int,
    *,
    seed: int | None = None,
    workers: int | None = None,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
    at_least: int | None = None,
    accumulate: int = 1,
    views: int = 0,
) -> DataLoader:
    """Batches of a split, every image once: shuffled by ``seed`` for training, else in order.

    Args:
        workers: processes that read images; None: ``default_workers``.
        accumulate: batches of an optimizer step, in training.
        views: as for ``EpochBatches``.
        at_least: what ``pixels_to_keep`` says, for files; None: every JPEG is decoded whole.
    """
    if workers is None:
        workers = default_workers(split, batch_size)
    if at_least is not None and isinstance(split.images, FolderImages):
        split = replace(split, images=replace(split.images, at_least=at_least))
    options: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "persistent_workers": workers > 0,
        # a generator of its own: making an iterator must not advance the model's randomness
        "generator": torch.Generator().manual_seed(0),
    }
    if split.streamed:
        return stream_loader(Stream(split.images, transform, seed), batch_size, options)
    if seed is None:
        ordered = OrderedBatches(len(split), batch_size, rank, world)
        return DataLoader(Samples(split, transform), batch_sampler=ordered, **options)
    shuffled = EpochBatches(len(split), batch_size, seed, rank, world, accumulate, views)
    return DataLoader(Samples(split, transform, seed), batch_sampler=shuffled, **options)
