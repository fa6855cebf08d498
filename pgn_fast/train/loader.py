"""From a split to batches: transforms, per-image randomness, and a data order that can be resumed.

What happens to an image depends on (seed, epoch, image) alone: not on the number of workers, and
not on where a run was interrupted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..adapters import backbone_pixels
from ..errors import UserError
from ..images import bounded
from .seeding import seeded
from .split import Split

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
    names = ("mean", "std", "crop_pct", "interpolation")
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
    """Transformed images; a key is (epoch, position in the split)."""

    def __init__(self, split: Split, transform: Transform, seed: int | None = None) -> None:
        """``seed`` makes the transform's randomness; None: the transform has none."""
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int] | Unreadable:
        epoch, position = key
        index = self.split.indices[position]
        if self.seed is None:
            return self._sample(index)
        # around the opening too: other people's data sets may augment there
        with seeded(self.seed, epoch, index):
            return self._sample(index)

    def _sample(self, index: int) -> tuple[Tensor, Any, int] | Unreadable:
        try:
            image, label = self.split.images.open(index)
        # other people's data sets answer damaged images with nearly every kind of exception
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{self.split.images.name(index)}: {reason}")
        if isinstance(image, Tensor):
            return image, label, index
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
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        # a split smaller than one batch is one batch
        self.batch_size = max(1, min(batch_size, size // world))
        self.seed, self.rank, self.world = seed, rank, world
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
