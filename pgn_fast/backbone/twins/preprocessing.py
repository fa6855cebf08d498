"""Image processors of other libraries in timm's terms: input_size, mean, std, crop and so on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .assembly import TwinRefused

# PIL's resampling filters by their numbers, as transformers' files have them
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_IGNORED = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "default_to_square",
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
    "image_seq_length",
    "patch_size",
    "max_num_patches",
    "_processor_class",
    "_valid_processor_keys",
    "auto_map",
    "num_channels",
    "backend",
}
_KNOWN = {
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "crop_pct",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
}


def from_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformers image processor does, by timm's names.

    Args:
        settings: what ``processor.to_dict()`` gives, or ``preprocessor_config.json`` holds.

    Returns:
        mean, std, interpolation, crop_mode, crop_pct, and input_size (3, H, W) where it resizes.

    Raises:
        TwinRefused: a setting that changes pixels and that timm's preprocessing has no word for.
    """
    for name, value in settings.items():
        if name not in _KNOWN | _IGNORED and value not in (None, False):
            raise TwinRefused(
                f"image processor: {name}={value!r} is not known; pass processor={{...}} with "
                f"settings among {', '.join(sorted(_KNOWN))}"
            )
    found = {**_scaling(settings), "crop_mode": "center", "crop_pct": 1.0}
    filter_number = settings.get("resample")
    if filter_number is not None:
        if int(filter_number) not in _FILTERS:
            raise TwinRefused(f"image processor: resample={filter_number!r} is no filter of PIL's")
        found["interpolation"] = _FILTERS[int(filter_number)]
    return found | _geometry(settings)


def _scaling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation in units of [0, 1], the processor's own scaling included."""
    factor = settings.get("rescale_factor") or 1 / 255
    factor = 255 * (factor if settings.get("do_rescale", True) else 1.0)
    mean, std = _three(0.0), _three(1.0)
    if settings.get("do_normalize", True):
        if settings.get("image_mean") is None or settings.get("image_std") is None:
            raise TwinRefused("image processor: do_normalize without image_mean and image_std")
        mean, std = (_three(settings[name]) for name in ("image_mean", "image_std"))
    if math.isclose(factor, 1.0):
        return {"mean": mean, "std": std}
    scale = lambda values: tuple(v / factor for v in values)
    return {"mean": scale(mean), "std": scale(std)}


def _three(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


def _geometry(settings: Mapping[str, Any]) -> dict[str, Any]:
    resized = settings.get("size") if settings.get("do_resize", True) else None
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    if resized is None and cropped is None:
        return {}
    crop = None if cropped is None else _height_width(cropped, "crop_size")
    if resized is None:
        raise TwinRefused("image processor: do_center_crop without do_resize is not known")
    if isinstance(resized, Mapping) and set(resized) == {"shortest_edge"}:
        edge = int(resized["shortest_edge"])
        if crop is None:
            raise TwinRefused(
                f"image processor: size={dict(resized)} without do_center_crop leaves images of "
                "many shapes; the model takes one"
            )
        if settings.get("crop_pct"):
            edge = int(edge / settings["crop_pct"])
        return {"input_size": (3, *crop), "crop_mode": "center", "crop_pct": _ratio(crop, edge)}
    height, width = _height_width(resized, "size")
    if crop is None or crop == (height, width):
        return {"input_size": (3, height, width), "crop_mode": "squash", "crop_pct": 1.0}
    if height * crop[1] != width * crop[0]:
        raise TwinRefused(
            f"image processor: size={resized} and crop_size={cropped} differ in shape"
        )
    return {"input_size": (3, *crop), "crop_mode": "squash", "crop_pct": _ratio(crop, height)}


def _height_width(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise TwinRefused(f"image processor: {name}={value!r} is no height and width")


def _ratio(crop: tuple[int, int], resized: int) -> float:
    """timm's crop_pct, of which timm takes floor(crop / crop_pct): that must be ``resized``."""
    size = min(crop)
    ratio = size / resized
    while math.floor(size / ratio) < resized:
        ratio = math.nextafter(ratio, 0.0)
    return ratio
