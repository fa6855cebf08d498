"""The splits that a configuration names: a folder, a data set by name, or the digits."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..digits import LEVELS, load_digits
from ..errors import UserError
from . import protocols
from .classes import count_classes, match_classes, streamed_classes
from .folders import (
    describe,
    find_classes,
    find_images,
    same_word,
    split_folders,
    split_name,
    visible_folders,
)
from .label_file import has_split, labeled_split
from .split import DigitImages, FolderImages, NamedImages, Split, Splits

if TYPE_CHECKING:
    from .config import TrainConfig

STREAMED = ("wds", "hfids", "tfds")
NAMED = ("torch", "hfds", *STREAMED)


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
        num_classes = streamed_classes(train, config.num_classes)
    else:
        num_classes = count_classes(train, config.num_classes)
        if validation is not None and not validation.streamed:
            validation = match_classes(validation, train.class_names, train.origin)
            count_classes(validation, num_classes)
        if test is not None and not test.streamed:
            test = match_classes(test, train.class_names, train.origin)
            count_classes(test, num_classes)
        everything = protocols.is_named(config.data) and protocols.trains_on_all(config)
        if validation is None and config.val_fraction > 0 and not everything:
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
    if protocols.is_named(config.data):
        return protocols.load(config, name, wanted)
    if prefix in NAMED and not Path(config.data).exists():
        return _named(config, name, wanted)
    if config.labels is not None:
        return labeled_split(Path(config.data), config.labels, config.task, name, wanted)
    if config.task == "multilabel":
        raise UserError(
            "`task` multilabel: a folder of class folders has one class an image. Give a CSV file "
            "with the labels of each image as `labels`."
        )
    if config.data_dir is not None:
        raise UserError(
            f"`data_dir` {config.data_dir}: it is the folder of a data set that is named by timm, "
            f"as torch/cifar10 is; {config.data} needs none. Give one of them."
        )
    if config.data == "digits":
        return _digits(wanted or name)
    return _folder(Path(config.data), name, wanted)


def _optional(config: TrainConfig, name: str, wanted: str | None) -> Split | None:
    """A split that may be missing, unless the user named it; "none" says that there is none."""
    if wanted == "none":
        return None
    if wanted is not None:
        return load_split(config, name)
    if config.labels is not None:
        there = has_split(Path(config.data), config.labels, config.task, name)
        return load_split(config, name) if there else None
    if protocols.is_named(config.data):
        return load_split(config, name) if name in protocols.parts_of(config) else None
    if config.data == "digits":
        return load_split(config, name) if name == "test" else None
    root = Path(os.path.normpath(config.data))
    if root.is_dir():
        if config.train_split and os.path.normpath(root / config.train_split) == str(root):
            return None  # every folder is a class
        folder = _child(root, name, strict=config.train_split is None)
        return _scan(folder, name) if folder else None
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
    # of images with several classes the rarest counts
    labels = getattr(train.images, "strata", train.images.labels)
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
            f"that begins with {'/, '.join((*NAMED, *protocols.SUITES))}/."
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
    if config.labels is not None:
        names = ("train", "validation", "test")
        there = [n for n in names if has_split(root, config.labels, config.task, n)]
    elif root.is_dir():
        there = list(split_folders(root))
    else:
        return load_split(config, "test")
    if there and "test" not in there and "validation" in there:
        split = load_split(config, "validation")
        note = "there is no test split; these images may have chosen the best epoch"
        return replace(split, notes=(*split.notes, note))
    return load_split(config, "test" if there else "all")
