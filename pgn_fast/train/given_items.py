"""What people's data sets and loaders give as an image and its label, checked as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, shown
from ..images import UnreadableImage, check_size, upright_rgb

IMAGES = ("image", "pixel_values", "img", "images")
LABELS = ("label", "labels", "target", "fine_label")
# numbers beyond so many times the brightest normalized pixel are no normalized image
_TOO_BRIGHT = 8


def pair(item: Any, where: str) -> tuple[Any, Any]:
    """Image and label of an item or batch.

    Raises:
        UserError: it has none by these names.
    """
    if isinstance(item, Mapping):
        image = next((item[k] for k in IMAGES if k in item), None)
        label = next((item[k] for k in LABELS if k in item), None)
        if image is None or label is None:
            raise UserError(
                f"{where} has the keys {', '.join(map(str, item))}; an image is expected as "
                f"{' or '.join(IMAGES[:2])}, its label as {' or '.join(LABELS[:2])}."
            )
        return image, label
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise UserError(f"{where} is a {type(item).__name__}; (image, label) or a dict is expected.")


def picture(image: Any) -> Image.Image | Tensor:
    """An upright RGB picture of a PIL image or an array; tensors (3, H, W) stay as they are.

    Raises:
        UnreadableImage: anything else.
    """
    if isinstance(image, Tensor):
        shape = tuple(image.shape)
        if image.ndim != 3 or (shape[2] == 3 and shape[0] != 3):
            way = "; permute(2, 0, 1) puts channels first" if shape[-1:] == (3,) else ""
            raise UnreadableImage(f"is a tensor {shape}; (3, H, W) is expected{way}")
        return image
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    if not isinstance(image, Image.Image):
        raise UnreadableImage(
            f"is a {type(image).__name__}; a PIL image, an array (H, W, 3) of uint8, or a tensor "
            "(3, H, W) is expected"
        )
    check_size(*image.size)
    return upright_rgb(image)


def _of_array(levels: np.ndarray) -> Image.Image:
    plain = levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels
    gray = plain.ndim == 2 and plain.dtype in (np.uint8, np.uint16)
    if not gray and not (plain.ndim == 3 and plain.shape[2] in (3, 4) and plain.dtype == np.uint8):
        raise UnreadableImage(
            f"is an array {levels.shape} of {levels.dtype}; (H, W, 3) of uint8 is a picture, and a "
            "tensor (3, H, W) is taken as the model's input"
        )
    return Image.fromarray(plain)


def label_of(given: Any, task: str, where: str) -> int | Tensor:
    """A class's number, or with ``task`` "multilabel" a vector (C,) of 0 and 1, float32.

    Raises:
        UserError: a text, none, a fraction, a vector of anything else, such as the numbers of an
            image's classes.
    """
    values = _numbers(given, where)
    if task == "multiclass" and values.numel() == 1:
        return int(_whole(values.reshape(1), where))
    return _checked(values[None], task, where)[0]


def labels_of(given: Any, count: int, task: str, where: str) -> Tensor:
    """The labels of a batch of ``count`` images: (B,) int64, or multi-label (B, C) float32.

    Raises:
        UserError: as ``label_of``; another number of labels than of images.
    """
    values = _numbers(given, where)
    if values.ndim == 0 or len(values) != count:
        raise UserError(f"{where} has {count} images and labels {tuple(values.shape)}.")
    if task == "multiclass" and values.numel() == count:
        return _whole(values.reshape(count), where)
    return _checked(values, task, where)


def _numbers(given: Any, where: str) -> Tensor:
    try:
        values = given.detach().cpu() if isinstance(given, Tensor) else _array(given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} has the label {shown(given)}; labels are numbers from 0 on (of names in a "
            "Hugging Face data set: class_encode_column)."
        ) from error
    return values


def _array(given: Any) -> Tensor:
    found = np.asarray(given)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"{found.dtype} is no number")
    return torch.as_tensor(found)


def _whole(values: Tensor, where: str) -> Tensor:
    numbers = values.to(torch.int64)
    if values.is_floating_point() and len(wrong := (numbers != values).nonzero()):
        raise UserError(
            f"{where} has the label {float(values[wrong[0]])}; a class is a whole number from 0 on."
        )
    return numbers


def _checked(values: Tensor, task: str, where: str) -> Tensor:
    """Vectors (n, C) of a multi-label task."""
    if task != "multilabel":
        raise UserError(
            f"{where} has a label of shape {tuple(values.shape[1:])}: for several classes an image "
            "give `task` multilabel; of a one-hot label give the class's number, its argmax."
        )
    if values.ndim != 2 or not bool(((values == 0) | (values == 1)).all()):
        raise UserError(
            f"{where}: `task` multilabel needs a label with several classes as a vector of 0 and "
            f"1, one place a class, got {shown(values[0].tolist())}."
        )
    return values.to(torch.float32)


def unusual(images: Tensor, pixels: Mapping[str, Any]) -> str | None:
    """What is odd about tensors that are the model's input, where it is not normalized.

    Args:
        pixels: the preprocessing of the backbone, by timm's names.
    """
    if not images.is_floating_point() or not images.numel():
        return None
    low, high = (float(x) for x in images.detach().aminmax())
    mean, std = pixels["mean"], pixels["std"]
    darkest = min((0 - m) / s for m, s in zip(mean, std, strict=True))
    brightest = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    words = f"mean {tuple(mean)} and std {tuple(std)}"
    if not (low > float("-inf") and high < float("inf")):
        return "a tensor holds numbers that are not finite"
    if high > _TOO_BRIGHT * max(brightest, 1.0):
        return (
            f"a tensor holds {low:g} ... {high:g} and is taken as the model's input as it is; the "
            f"backbone was trained on (x / 255 - mean) / std with {words}, which uint8 tensors get"
        )
    if low >= 0 and high <= 1 and darkest < -0.5:
        return (
            f"a tensor holds {low:.2g} ... {high:.2g} and is taken as the model's input as it is; "
            f"the backbone was trained on (x - mean) / std with {words}"
        )
    return None
