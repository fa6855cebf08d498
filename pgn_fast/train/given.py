"""People's own data sets as splits: (image, label) pairs, or dicts of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UserError, brief, shown
from ..images import UnreadableImage
from ..words.names import names_for
from .classes import match_classes
from .evaluation import check_labels
from .given_items import LABELS, label_of, pair, picture, unusual
from .given_loader import GivenLoader
from .loader import stack_labels
from .split import Split


def given_split(
    name: str,
    data: Any,
    *,
    num_classes: int = 0,
    task: str | None = "multiclass",
    pixels: Mapping[str, Any] | None = None,
) -> Split:
    """A split of ``data``: a map-style data set, or a loader of batches.

    Args:
        data: with ``len`` and indices: items (image, label), or dicts with image or pixel_values
            and label or labels, as Hugging Face's; an image is a PIL image, an array (H, W, 3) or
            (H, W) of uint8, or a tensor (3, H, W) that is the model's input as it is. Otherwise a
            loader of batches of tensors, such as a torch DataLoader.
        num_classes: of the model; 0: not known.
        task: "multiclass", or "multilabel": labels are vectors; None: a loader's labels are what a
            loss of one's own takes, and pass as they are.
        pixels: the preprocessing of the backbone, by timm's names; a tensor that was not
            normalized so is worth a warning.

    Raises:
        UserError: neither, no image, or a first item that is not of this kind.
    """
    _check_kind("val" if name == "validation" else name, data)
    origin = f"{type(data).__name__} given as {name}"
    names = _names(data)
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__"):
        loader = GivenLoader(data, origin, task, pixels)
        if name != "train" and num_classes:  # training looks at its own at once
            loader.check_first(num_classes)
        return Split(name, origin, loader, range(loader.count), names)
    images = GivenImages(data, origin, task or "multiclass")
    if not len(images):
        raise UserError(f"`{name}`: the {type(data).__name__} has no image.")
    _check_first(images, num_classes, pixels)
    return Split(name, origin, images, range(len(images)), names)


def _check_first(images: GivenImages, num_classes: int, pixels: Mapping[str, Any] | None) -> None:
    """Say what cannot be an image, or its label, before anything begins."""
    title = images.name(0)
    try:
        first, label = images.open(0)
    except UserError:
        raise
    except UnreadableImage as error:
        raise UserError(f"{title} {error}.") from error
    except Exception as error:  # of any kind: it is somebody else's code
        raise UserError(
            f"{title} cannot be read ({type(error).__name__}: {brief(error, 200)}); a data set of "
            "(image, label) or of dicts is expected."
        ) from error
    if num_classes:
        try:
            check_labels(stack_labels([label]), num_classes, images.task)
        except UserError as error:
            raise UserError(f"{title}: {str(error).removeprefix('data: ')}") from error
    if isinstance(first, Tensor) and pixels and (said := unusual(first, pixels)):
        warnings.warn(f"{images.title}: {said}", stacklevel=4)


def _check_kind(name: str, data: Any) -> None:
    """Raises UserError: what can be neither a data set nor a loader, with the way."""
    kind = type(data).__name__
    if data is None:
        raise UserError(f"`{name}` is None; give a data set or a loader.")
    if isinstance(data, Mapping):
        raise UserError(
            f"`{name}` is a {kind} with the keys {brief(', '.join(map(str, data)), 200)}; give "
            f"one of them, such as data[{shown(next(iter(data), 'train'))}]."
        )
    if isinstance(data, IterableDataset):
        raise UserError(
            f"`{name}`: an IterableDataset such as {kind} has no indices; give a loader of it with "
            "a length, such as DataLoader(dataset, batch_size) where the dataset has __len__."
        )
    if isinstance(data, Iterator):
        raise UserError(
            f"`{name}`: a {kind} can be read once only, and training reads it every epoch; give a "
            "data set with len() and indices, or a loader with len()."
        )
    if not isinstance(data, DataLoader) and hasattr(data, "__getitem__") and hasattr(data, "iloc"):
        raise UserError(
            f"`{name}`: a {kind} has no items; give a list of (image, label) made of its rows."
        )
    if not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")) or not _has_length(data):
        raise UserError(
            f"`{name}` takes a data set with len() and indices, or a loader with len(), got {kind}"
            + (" of a data set without len()." if isinstance(data, DataLoader) else ".")
        )


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except (TypeError, NotImplementedError):
        return False
    return True


def _names(data: Any) -> list[str] | None:
    """The classes as torchvision's and Hugging Face's data sets tell them."""
    dataset = getattr(data, "dataset", data)
    features = getattr(dataset, "features", None)
    column = next((features[k] for k in LABELS if k in features), None) if features else None
    found = getattr(dataset, "classes", None) or getattr(column, "names", None)
    return list(map(str, found)) if found else None


@dataclass(frozen=True)
class GivenImages:
    """A map-style data set; tensors pass the transform untouched."""

    dataset: Any
    title: str
    task: str = "multiclass"

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Any, Any]:
        """A PIL image in RGB, or the tensor that the data set made, and the label.

        Raises:
            UserError: no such item or label. Others: an image that cannot be read.
        """
        where = self.name(index)
        image, label = pair(self.dataset[int(index)], where)
        return picture(image), label_of(label, self.task, where)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    # a list beside the data set, such as torchvision's targets, may not be what its items say
    labels = None


def same_classes(
    splits: Mapping[str, Split | None], given: Sequence[str] | None, known: Sequence[str] | None
) -> dict[str, Split | None]:
    """The splits, their labels counting the same classes, which their data may name otherwise.

    Args:
        splits: "train" and others, with the class names that their data tell, if any.
        given: names in the label order of the training data, in the place of their own.
        known: what the model's logits are called already; None: nothing yet.

    Raises:
        UserError: a class that the training data, or the model, does not have.
    """
    train = splits["train"]
    assert train is not None
    order, whose = train.class_names, train.origin
    if given is None and known is not None:
        order, whose = list(known), "the model (`class_names` gives its classes other names)"
    names = order
    if given is not None:
        names = [str(name) for name in given]
        if order is not None:
            names, _ = names_for(names, order, len(order), train.origin)
    found: dict[str, Split | None] = {}
    for key, split in splits.items():
        if split is not None:
            moved = match_classes(split, order, whose)
            if moved is not split and isinstance(split.images, GivenLoader):
                raise UserError(
                    f"`{key}`: the classes of {split.origin} are not those of {whose} in their "
                    "order, and a loader's labels are taken as they are. Give its data set, whose "
                    "labels go by the names."
                )
            split = replace(moved, class_names=names)
        found[key] = split
    return found
