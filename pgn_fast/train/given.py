"""People's own data sets and loaders as splits: (image, label) pairs, or dicts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import UserError
from ..images import check_size, upright_rgb
from .loader import Batch
from .seeding import seeded
from .split import Split

_IMAGES = ("image", "pixel_values", "img", "images")
_LABELS = ("label", "labels", "target", "fine_label")


def given_split(name: str, data: Any, class_names: Sequence[str] | None = None) -> Split:
    """A split of ``data``: a map-style data set, or a loader of batches.

    Args:
        data: with ``len`` and indices: items (image, label), or dicts with image or pixel_values
            and label or labels, as Hugging Face's; an image is a PIL image, a uint8 array
            (H, W, 3), or a tensor (3, H, W) that is the model's input as it is. Otherwise a loader
            of batches of tensors, such as a torch DataLoader.
        class_names: in label order; None: as the data tell.

    Raises:
        UserError: neither.
    """
    origin = f"{type(data).__name__} given as {name}"
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__"):
        if not hasattr(data, "__iter__") or not hasattr(data, "__len__"):
            raise UserError(
                f"`{name}` takes a data set with len() and indices, or a loader with len(), got "
                f"{type(data).__name__}."
            )
        loader = GivenLoader(data, origin)
        count = len(getattr(data, "dataset", data))
        return Split(name, origin, loader, range(count), _names(data, class_names))
    images = GivenImages(data, origin)
    if len(images):
        images.open(0)  # what cannot be an image is said before anything begins
    return Split(name, origin, images, range(len(images)), _names(data, class_names))


def _names(data: Any, given: Sequence[str] | None) -> list[str] | None:
    """The classes as torchvision's and Hugging Face's data sets tell them."""
    dataset = getattr(data, "dataset", data)
    features = getattr(dataset, "features", None)
    column = next((features[k] for k in _LABELS if k in features), None) if features else None
    found = given or getattr(dataset, "classes", None) or getattr(column, "names", None)
    return list(map(str, found)) if found else None


def _pair(item: Any, where: str) -> tuple[Any, Any]:
    """Image and label of an item or batch.

    Raises:
        UserError: it has none by these names.
    """
    if isinstance(item, Mapping):
        image = next((item[k] for k in _IMAGES if k in item), None)
        label = next((item[k] for k in _LABELS if k in item), None)
        if image is None or label is None:
            raise UserError(
                f"{where} has the keys {', '.join(map(str, item))}; an image is expected as "
                f"{' or '.join(_IMAGES[:2])}, its label as {' or '.join(_LABELS[:2])}."
            )
        return image, label
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise UserError(f"{where} is a {type(item).__name__}; (image, label) or a dict is expected.")


@dataclass(frozen=True)
class GivenImages:
    """A map-style data set; tensors pass the transform untouched."""

    dataset: Any
    title: str

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Any, Any]:
        """A PIL image in RGB, or the tensor that the data set made, and the label."""
        image, label = _pair(self.dataset[int(index)], self.name(index))
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            check_size(*image.size)
            image = upright_rgb(image)
        return image, _label(label)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    @property
    def labels(self) -> Sequence[int] | None:
        targets = getattr(self.dataset, "targets", None)
        if targets is None or (len(targets) and np.ndim(targets[0])):
            return None
        return [int(t) for t in targets]


def _label(given: Any) -> int | Tensor:
    """A class's number, or a vector (C,) of 0 and 1, float32.

    Raises:
        ValueError: a vector of anything else, such as the numbers of an image's classes.
    """
    if np.ndim(given) == 0:
        return int(given)
    plain = given.cpu() if isinstance(given, Tensor) else np.asarray(given)
    vector = torch.as_tensor(plain, dtype=torch.float32)
    if vector.ndim != 1 or not bool(((vector == 0) | (vector == 1)).all()):
        raise ValueError("a label with several classes is a vector of 0 and 1, one place a class")
    return vector


class GivenLoader:
    """A loader of batches, as the batches of a run; its order follows from seed and epoch."""

    batch_sampler = None

    def __init__(self, loader: Any, title: str) -> None:
        self.loader, self.title = loader, title
        self.seed, self.epoch, self.start = 0, 0, 0

    def open(self, index: int) -> tuple[Any, int]:
        """A loader gives batches only."""
        raise UserError(f"{self.title} is a loader; its images have no numbers.")

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    labels = None

    def batches(self, seed: int, world: int) -> GivenLoader:
        """The loader for a run of ``world`` processes.

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
        for number, item in enumerate(chain(first, iterator)):
            if number >= self.start:
                yield self._batch(item, number)

    def _batch(self, item: Any, number: int) -> Batch:
        images, labels = _pair(item, f"batch {number} of {self.title}")
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise UserError(
                f"batch {number} of {self.title}: images are "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}; "
                "a tensor (B, 3, H, W) is expected."
            )
        labels = torch.as_tensor(labels)
        labels = labels.to(torch.float32 if labels.ndim == 2 else torch.int64)
        begin = number * len(labels)
        return Batch(images, labels, torch.arange(begin, begin + len(labels)), [])
