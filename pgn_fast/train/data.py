"""Images and their splits: a folder, timm's data set names, or the packaged digits.

Every figure that a run reports names the split it comes from, so a split carries its own origin.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ..digits import LEVELS, load_digits
from ..errors import UserError
from ..images import check_size, read_image, upright_rgb
from .folders import (
    describe,
    find_classes,
    find_images,
    same_word,
    split_folders,
    split_name,
    visible_folders,
)

if TYPE_CHECKING:
    from .config import TrainConfig

STREAMED = ("wds", "hfids", "tfds")
NAMED = ("torch", "hfds", *STREAMED)


class Images(Protocol):
    """A list of labeled images, opened when they are asked for."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> tuple[Image.Image, int]:
        """The upright image in RGB and its label. Raises an Exception where it is unreadable."""

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
    """Image files; ``labels`` is None where nobody knows their classes.

    Attributes:
        at_least: see ``pgn_fast.images.read_image``; None decodes in full.
    """

    paths: Sequence[Path]
    labels: Sequence[int] | None
    at_least: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> tuple[Image.Image, int]:
        image = read_image(self.paths[index], at_least=self.at_least)
        return image, -1 if self.labels is None else self.labels[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])


@dataclass(frozen=True)
class Relabeled:
    """Images whose label ``i`` has become ``numbers[i]``."""

    images: Images
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images.open(index)
        return image, self.numbers[label]

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


def load_splits(config: TrainConfig) -> Splits:
    """The training, validation and test images that a configuration names.

    Where there is no validation split, one is carved from the training images by ``config.seed``,
    class by class; the test images are never part of it.

    Raises:
        UserError: no such data, an empty class, classes that differ between splits, labels out of
            range.
    """
    train = load_split(config, "train")
    validation = _optional(config, "validation", config.val_split)
    test = _optional(config, "test", config.test_split)
    if train.streamed:
        num_classes = _streamed_classes(train, config.num_classes)
    else:
        num_classes = count_classes(train, config.num_classes)
        if validation is not None and not validation.streamed:
            validation = match_classes(validation, train.class_names, train.origin)
            count_classes(validation, num_classes)
        if test is not None and not test.streamed:
            test = match_classes(test, train.class_names, train.origin)
            count_classes(test, num_classes)
        if validation is None and config.val_fraction > 0:
            train, validation = carve_validation(train, config.val_fraction, config.seed)
    return Splits(train, validation, test, num_classes, train.class_names)


def load_split(config: TrainConfig, name: str) -> Split:
    """One split of the data: "train", "validation", "test", or "all" images of a flat folder.

    Raises:
        UserError: no such data or split; the message names the splits that there are.
    """
    wanted = {
        "train": config.train_split,
        "validation": config.val_split,
        "test": config.test_split,
    }.get(name)
    prefix = config.data.partition("/")[0].lower()
    if prefix in NAMED and not Path(config.data).exists():
        return _named(config, name, wanted)
    if config.data_dir is not None:
        raise UserError(
            f"`data_dir` {config.data_dir}: it is the folder of a data set that is named by timm, "
            f"as torch/cifar10 is; {config.data} needs none. Give one of them."
        )
    if config.data == "digits":
        return _digits(wanted or name)
    return _folder(Path(config.data), name, wanted)


def _optional(config: TrainConfig, name: str, wanted: str | None) -> Split | None:
    """A split that may be missing, unless the user named it."""
    if wanted is not None:
        return load_split(config, name)
    if config.data == "digits":
        return load_split(config, name) if name == "test" else None
    root = Path(os.path.normpath(config.data))
    if root.is_dir():
        if config.train_split and os.path.normpath(root / config.train_split) == str(root):
            return None  # every folder is a class
        there = _child(root, name, strict=config.train_split is None)
        return _scan(there, name) if there else None
    # torchvision's small data sets have a training and a test part; of others timm does not say
    has_test = config.data.lower().startswith("torch/") and name == "test"
    return load_split(config, name) if has_test else None


def carve_validation(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Part the training images into (training, validation), class by class where labels are known.

    Args:
        fraction: share of each class that goes to validation, rounded; a class of one image stays
            in training.
        seed: decides which images; the same seed gives the same split on every machine.

    Raises:
        UserError: no image would be left on one of the two sides.
    """
    groups: dict[int, list[int]] = {}
    labels = train.images.labels
    for i in train.indices:
        groups.setdefault(0 if labels is None else labels[i], []).append(i)
    held_out: set[int] = set()
    for label in sorted(groups):
        members = groups[label]
        count = min(round(fraction * len(members)), len(members) - 1)
        held_out.update(random.Random(f"{seed}/{label}").sample(members, count))
    if not held_out:
        raise UserError(
            f"`val_fraction` {fraction:g} of {len(train)} training images is no image; give a "
            "larger share, or 0 to train without validation."
        )
    origin = f"{fraction:.0%} of {train.origin}, carved by seed {seed}"
    return (
        replace(train, indices=[i for i in train.indices if i not in held_out]),
        Split("validation", origin, train.images, sorted(held_out), train.class_names),
    )


def image_files(paths: Sequence[str | os.PathLike[str]]) -> Split:
    """Every image among these files and folders, once, labels unknown, for prediction.

    Raises:
        UserError: a path that does not exist, or no image at all.
    """
    found = find_images(paths)
    notes = (describe(found.skipped),) if found.skipped else ()
    if not found.paths:
        raise UserError(
            f"no image in {', '.join(map(str, paths))}{''.join(map('; {}'.format, notes))}."
        )
    images = FolderImages(found.paths, None)
    return Split("all", "the given files", images, range(len(images)), notes=notes)


def _digits(name: str) -> Split:
    if name not in ("train", "test"):
        raise UserError(f"digits has the splits train and test, not {name!r}.")
    digits = load_digits()
    pixels = (digits.images * (255 / LEVELS)).astype("uint8")
    images = DigitImages(pixels, digits.labels.tolist())
    chosen = digits.train if name == "train" else digits.test
    origin = f"digits {name} ({len(chosen)} of {len(images)} images)"
    return Split(name, origin, images, sorted(chosen), [str(d) for d in range(10)])


def _child(root: Path, name: str, strict: bool = True) -> Path | None:
    """The sub-folder that holds a split, by its name in any capitalization."""
    there = split_folders(root, strict).get(name, [])
    if len(there) > 1:
        flag = {"train": "--train-split", "validation": "--val-split", "test": "--test-split"}[name]
        raise UserError(
            f"data: {' and '.join(folder.name for folder in there)} in {root} both look like the "
            f"{name} split; name one with {flag}."
        )
    return there[0] if there else None


def _folder(root: Path, name: str, wanted: str | None) -> Split:
    if not root.is_dir():
        what = "is a file, not a folder of images" if root.exists() else "does not exist"
        raise UserError(
            f"data: {root} {what}. Give a folder with one sub-folder a class, 'digits', or a name "
            f"that begins with {'/, '.join(NAMED)}/."
        )
    notes: tuple[str, ...] = ()
    if wanted is not None:
        alike = [f for f in visible_folders(root) if same_word(f.name) == same_word(wanted)]
        folder: Path | None = root / wanted
        if not (root / wanted).is_dir() and len(alike) == 1:
            folder = alike[0]
    elif name == "all" or (name == "train" and not any(split_folders(root).values())):
        folder = root
    else:
        folder = _child(root, name)
        used = [f for group in split_folders(root).values() for f in group]
        if unused := [f.name for f in visible_folders(root) if f not in used]:
            notes = (f"folders that are no split, not read: {', '.join(unused)}",)
    if folder is None or not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise UserError(
            f"data: {root} has no {name} split; its folders are {', '.join(there[:8]) or 'none'}"
            f"{', ...' if len(there) > 8 else ''}."
        )
    return _scan(folder, name, notes)


def _scan(folder: Path, name: str, notes: tuple[str, ...] = ()) -> Split:
    found = find_classes(folder)
    images = FolderImages(found.paths, found.labels)
    notes += found.notes
    return Split(name, f"folder {folder}", images, range(len(images)), found.names, notes)


def _named(config: TrainConfig, name: str, wanted: str | None) -> Split:
    from timm.data import create_dataset

    prefix = config.data.partition("/")[0].lower()
    split = wanted or name
    try:
        dataset = create_dataset(
            config.data,
            root=config.data_dir,
            split=split,
            is_training=name == "train",
            download=config.dataset_download,
            batch_size=config.batch_size,
            seed=config.seed,
            # as they are stored: pgn_fast.images decides how they become RGB; TensorFlow gives RGB
            input_img_mode="RGB" if prefix == "tfds" else "",
        )
    except ImportError as error:
        raise UserError(f"data: {config.data} needs the package {error.name}.") from error
    # each library behind these names has exceptions of its own for "no such data"
    except Exception as error:
        raise UserError(
            f"data: timm cannot open {config.data!r}, split {split!r}, in "
            f"{config.data_dir or 'its default folder'}: {' '.join(str(error).split())}"
        ) from error
    classes = getattr(dataset, "class_to_idx", None) or getattr(
        getattr(dataset, "reader", None), "class_to_idx", None
    )
    names = sorted(classes, key=classes.__getitem__) if classes else None
    origin = f"{config.data} {split}"
    images = dataset if prefix in STREAMED else NamedImages(dataset, origin)
    return Split(name, origin, images, range(len(dataset)), names)


def _streamed_classes(train: Split, given: int | None) -> int:
    if given is None and train.class_names is None:
        raise UserError(
            f"data: {train.origin} is streamed and does not tell its classes: give `num_classes`."
        )
    return given or len(train.class_names or ())


def count_classes(split: Split, given: int | None) -> int:
    """The number of classes; all labels are below it.

    Raises:
        UserError: a label out of range, fewer than two classes, or not as many as the data name.
    """
    names, labels = split.class_names, split.images.labels
    count = given or (len(names) if names else 0)
    if labels is not None:
        used = [labels[i] for i in split.indices]
        count = count or max(used) + 1
        wrong = next(
            (i for i, label in zip(split.indices, used, strict=True) if not 0 <= label < count),
            None,
        )
        if wrong is not None:
            raise UserError(
                f"data: label {labels[wrong]} of {split.images.name(wrong)} is out of range for "
                f"{count} classes (0 ... {count - 1})."
            )
    if names and count != len(names):
        raise UserError(
            f"data: {split.origin} has {len(names)} classes, `num_classes` is {count}: leave it "
            "out, the data tell."
        )
    if count < 2:
        raise UserError(
            f"data: {split.origin} has {count} class(es); two are the least to tell apart"
            + ("." if count else ": give `num_classes`.")
        )
    return count


def match_classes(split: Split, names: Sequence[str] | None, whose: str) -> Split:
    """A split labeled by the place of its classes' names in another list, which may have more.

    Args:
        split: as it was read, labeled by its own classes.
        names: the classes in label order; None where they have no names: nothing is done.
        whose: where these are from, for messages.

    Raises:
        UserError: a class that is not among ``names``.
    """
    own = split.class_names
    if own is None or names is None or list(names) == own:
        return split
    if unknown := [name for name in own if name not in names]:
        odd = sorted(set(own) ^ set(names))
        raise UserError(
            f"data: {whose} and {split.origin} differ in their classes, such as "
            f"{', '.join(odd[:3])}: {unknown[0]!r} is none of the {len(names)} of the former."
        )
    images = Relabeled(split.images, [list(names).index(name) for name in own])
    notes = split.notes
    if missing := [name for name in names if name not in own]:
        notes += (
            f"{len(own)} of {len(names)} classes have images; none: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else ""),
        )
    return replace(split, images=images, class_names=list(names), notes=notes)


def split_to_score(config: TrainConfig, wanted: str | None = None) -> Split:
    """The split that a score is asked of.

    Args:
        wanted: "train", "val", "test" and the like, a folder's name, or "all"; None: test, else
            validation, which a note then says; all of a folder without splits.

    Raises:
        UserError: no such data or split.
    """
    if wanted is not None:
        name = split_name(wanted) or wanted
        if name in ("train", "validation", "test", "all"):
            return load_split(config, name)
        return load_split(replace(config, test_split=wanted), "test")
    root = Path(config.data)
    if not root.is_dir():
        return load_split(config, "test")
    there = split_folders(root)
    if there and "test" not in there and "validation" in there:
        split = load_split(config, "validation")
        note = "there is no test split; these images may have chosen the best epoch"
        return replace(split, notes=(*split.notes, note))
    return load_split(config, "test" if there else "all")
