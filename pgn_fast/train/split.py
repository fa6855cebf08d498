"""Images under the name that results are reported by, from wherever they are read.

Every figure that a run reports names the split it comes from, so a split carries its own origin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ..errors import UserError
from ..images import check_size, read_image, upright_rgb


class Images(Protocol):
    """A list of labeled images, opened when they are asked for."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> tuple[Image.Image, Any]:
        """The upright image in RGB and its label: a number, or a vector (C,) of 0 and 1.

        Raises an Exception where it is unreadable.
        """

    def name(self, index: int) -> str:
        """What a message calls this image."""

    @property
    def labels(self) -> Sequence[int] | None:
        """All labels, where they can be had without opening the images."""


@dataclass(frozen=True)
class Split:
    """Some images under a name that results are reported by.

    Attributes:
        name: "train", "validation", "test" or "all".
        origin: where the images come from, in words.
        images: the list that ``indices`` points into; a timm iterable where the data are streamed.
        indices: which of them belong to this split, ascending.
        class_names: the classes in label order; None where the data set does not name them.
        notes: what a person should know: files that were skipped, class names that look alike.
    """

    name: str
    origin: str
    images: Any
    indices: Sequence[int]
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def streamed(self) -> bool:
        return not hasattr(self.images, "open")


@dataclass(frozen=True)
class Splits:
    """What a run trains on, selects its model by, and touches once at the end."""

    train: Split
    validation: Split | None
    test: Split | None
    num_classes: int
    class_names: list[str] | None = field(default=None)


@dataclass(frozen=True)
class FolderImages:
    """Image files; ``labels`` is None where their classes are unknown.

    Attributes:
        at_least: see ``pgn_fast.images.read_image``; None decodes in full.
    """

    paths: Sequence[Path]
    labels: Sequence[int] | None
    at_least: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> tuple[Image.Image, Any]:
        image = read_image(self.paths[index], at_least=self.at_least)
        return image, -1 if self.labels is None else self.labels[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])


@dataclass(frozen=True)
class ManyLabelImages(FolderImages):
    """Image files with any number of classes each; a label is a vector of 0 and 1.

    Attributes:
        classes: the numbers of each image's classes.
        count: C, the length of a label.
    """

    classes: Sequence[Sequence[int]] = ()
    count: int = 0

    def open(self, index: int) -> tuple[Image.Image, Any]:
        image, _ = super().open(index)
        label = torch.zeros(self.count)
        label[list(self.classes[index])] = 1
        return image, label

    @property
    def strata(self) -> Sequence[int]:
        """The rarest class of each image, C where it has none: what a fair part is drawn from."""
        frequency = Counter(number for several in self.classes for number in several)
        return [
            min(several, key=lambda c: (frequency[c], c), default=self.count)
            for several in self.classes
        ]


@dataclass(frozen=True)
class Relabeled:
    """Images whose label ``i`` of ``numbers`` has become ``numbers[i]``, of ``count`` classes."""

    images: Images
    numbers: Sequence[int]
    count: int

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> tuple[Image.Image, Any]:
        image, label = self.images.open(index)
        if isinstance(label, torch.Tensor):
            self._check(len(label) == len(self.numbers), index, f"{len(label)} labels")
            return image, label.new_zeros(self.count).scatter_(0, torch.tensor(self.numbers), label)
        self._check(0 <= label < len(self.numbers), index, f"the label {label}")
        return image, self.numbers[label]

    def _check(self, fits: bool, index: int, what: str) -> None:
        if not fits:
            raise UserError(
                f"{self.name(index)} has {what}; its data set names {len(self.numbers)} classes."
            )

    def name(self, index: int) -> str:
        return self.images.name(index)

    @property
    def labels(self) -> Sequence[int] | None:
        labels = self.images.labels
        return None if labels is None else [self.numbers[label] for label in labels]


@dataclass(frozen=True)
class DigitImages:
    """The packaged handwritten digits: 8 × 8 pixels of 0 … 16, here as RGB of 0 … 255."""

    pixels: Any  # (1797, 8, 8) uint8
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]

    def name(self, index: int) -> str:
        return f"digits[{index}]"


@dataclass(frozen=True)
class NamedImages:
    """A data set that timm made, with random access: torchvision's or Hugging Face's."""

    dataset: Any
    title: str

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Image.Image, int]:
        reader = getattr(self.dataset, "reader", None)
        # timm's own __getitem__ would put the next image in the place of an unreadable one
        image, label, *_ = self.dataset[index] if reader is None else reader[index]
        if isinstance(image, Image.Image):
            check_size(*image.size)
            return upright_rgb(image), int(label)
        return read_image(image if isinstance(image, bytes) else image.read()), int(label)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    @property
    def labels(self) -> Sequence[int] | None:
        targets = getattr(self.dataset, "targets", None)
        return None if targets is None else [int(t) for t in targets]
