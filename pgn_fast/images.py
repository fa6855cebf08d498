"""A picture's file → RGB, the same in training, evaluation, prediction, serving and inversion.

A stored picture becomes the one that a viewer shows, in eight bits a channel:

- an orientation tag is applied, and of an animation the first frame is taken;
- transparency (an alpha channel, a transparent palette entry or color key) is composed over white;
- gray, one-bit and palette pictures are the same picture in RGB; CMYK goes by Pillow's plain
  formula; color profiles are ignored, as in timm's data sets;
- sixteen bits a channel keep the upper eight. Floating-point pixels, and integers beyond sixteen
  bits, have no known range and are refused.

Memory is bounded before it is taken: by the size that a header declares, by the ratio of its sides,
and by a geometry that never enlarges more than its crop keeps (see ``bounded``).
"""

from __future__ import annotations

import functools
import io
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# RGB takes four bytes a pixel in Pillow, and a transparent picture is held twice: 800 MB
MAX_PIXELS = 100_000_000
# beyond it a center crop would show less than a thousandth of the picture
MAX_ASPECT = 1000
# pixels of a resized picture up to which timm's own two steps run: 64 MB
_WHOLE_RESIZE = 2**24
# source pixels that a filter looks around itself, Lanczos' 3 and a margin
_REACH = 4
# pixels that are composed over white at a time
_BAND = 2**22

# EPS would run Ghostscript; of the others Pillow has the header only, or a viewer of Windows
_NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_JPEG = ("JPEG", "MPO")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A picture that cannot be read; the message is the reason, without the picture's name."""


class OversizedImage(UnreadableImage):
    """A picture that declares more pixels, or a longer side, than is taken."""


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """File name suffixes of these formats, in lower case, with their dot."""
    formats = set(readable_formats())
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in formats)


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
) -> Image.Image:
    """Decode a file into an upright RGB picture.

    Args:
        source: a path, or a file's bytes.
        formats: Pillow's names of the formats that may be tried; None: ``readable_formats()``.
        max_pixels: the most that a header may declare. A JPEG of up to four times as many is
            decoded at half its size instead.
        at_least: pixels that each side must keep. A JPEG may then be decoded at a half, a quarter
            or an eighth of its size, which is quicker and slightly different. None: whole.

    Raises:
        OversizedImage: more pixels than ``max_pixels``, or sides of more than ``MAX_ASPECT`` to 1.
        UnreadableImage: no regular file, no picture, a broken or truncated one, or no memory left.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else _regular_file(source)
        with file, Image.open(file, formats=formats or readable_formats()) as image:
            _reduce(image, max_pixels, at_least)
            check_size(*image.size, max_pixels)
            return upright_rgb(image)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise OversizedImage(_reason(error)) from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("is in no image format that is read here") from error
    except MemoryError as error:
        raise UnreadableImage("there is no memory left to decode it") from error
    except Exception as error:
        # Pillow's decoders raise nearly every kind of exception at broken input
        raise UnreadableImage(_reason(error)) from error


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a size before a pixel of it is decoded.

    Raises:
        OversizedImage: more pixels than ``max_pixels``, or sides of more than ``MAX_ASPECT`` to 1.
        UnreadableImage: no pixel at all.
    """
    if width < 1 or height < 1:
        raise UnreadableImage(f"declares {width} × {height} pixels")
    if width * height > max_pixels:
        raise OversizedImage(
            f"declares {width} × {height} = {width * height} pixels; {max_pixels} are the most here"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise OversizedImage(
            f"declares {width} × {height} pixels; sides of more than {MAX_ASPECT} to 1 are not "
            "taken, because a crop would show next to nothing of the picture. Cut it into pieces"
        )


def upright_rgb(image: Image.Image) -> Image.Image:
    """What a viewer shows of an opened picture, as RGB of eight bits a channel.

    Raises:
        UnreadableImage: pixels without a known range. Others: what Pillow raises at broken files.
    """
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if method is None else rgb.transpose(method)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        # a damaged tag block does not make the pixels unreadable; viewers show them as stored
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _upper_byte(image).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage(
            "has floating-point pixels, whose range is unknown; save it with 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_byte(image: Image.Image) -> Image.Image:
    """Gray of sixteen bits as gray of eight, as Pillow reads the channels of a 16-bit RGB file."""
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 0xFFFF:
        raise UnreadableImage(
            f"has integer pixels from {low} to {high}, more than 16 bits; save it with 8 or 16 "
            "bits a channel"
        )
    gray = (levels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray)


def _over_white(image: Image.Image) -> Image.Image:
    """Composed band by band, so that no second and third copy of a large picture is needed."""
    result = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode == "La":
            band = band.convert("LA")
        opaque = Image.new("RGBA", band.size, "white")
        opaque.alpha_composite(band.convert("RGBA"))
        result.paste(opaque.convert("RGB"), (0, top))
    return result


def _regular_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """The open file; a pipe or a device would never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImage("is not a regular file")
    return Path(path).open("rb")


def _reduce(image: Image.Image, max_pixels: int, at_least: int | None) -> None:
    """Let libjpeg scale while it decodes, where less than the whole size is asked for."""
    if image.format not in _JPEG:
        return
    if image.width * image.height > max_pixels:
        image.draft(None, (image.width // 2, image.height // 2))
    elif at_least is not None and min(image.size) >= 2 * at_least:
        image.draft(None, (at_least, at_least))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200] or type(error).__name__


def bounded(transform: Any) -> Any:
    """timm's transform with a resize and center crop that take bounded memory.

    Where the shorter side is resized to a given length, the longer one of a thin picture would
    grow without bound, only to be cropped.

    Args:
        transform: a Compose of ``timm.data.create_transform``; one that does not begin with a
            resize and a center crop is returned as it is, being bounded already.
    """
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Compose, Resize

    match list(transform.transforms):
        case [Resize() | ResizeKeepRatio() as resize, CenterCrop() | CenterCropOrPad() as crop, *_]:
            return Compose([_ResizeCenterCrop(resize, crop), *transform.transforms[2:]])
    return transform


class _ResizeCenterCrop:
    """timm's resize and center crop, of which a very long picture takes only what is kept.

    A picture whose resized version would have more than 2^24 pixels is resized from the part of
    it that the crop keeps. The result is that of the two steps to within one level of 255 (with
    "nearest" and "box", a pixel on an edge may be its neighbor's), or a few where it shrinks, as
    Pillow may then take the axes in the other order. All other pictures go through the two steps,
    and are timm's to the bit.
    """

    def __init__(self, resize: Any, crop: Any) -> None:
        self.resize, self.crop = resize, crop

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self._resized(image)
        if 0 < height * width <= _WHOLE_RESIZE:
            return self.crop(self.resize(image))
        # a thin picture whose longer side fits the model rounds to no pixel at all
        height, width = max(height, 1), max(width, 1)
        crop_height, crop_width = self.crop.size
        rows, columns = min(height, crop_height), min(width, crop_width)
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        down, across = image.height / height, image.width / width
        method = Image.Resampling[self.resize.interpolation.value.upper()]
        # one axis after the other, as Pillow enlarges: levels between them are rounded and clipped
        first, end = top * down, min((top + rows) * down, image.height)
        reach = _REACH * max(down, 1)
        above, below = max(0, int(first - reach)), min(image.height, math.ceil(end + reach))
        box = (left * across, 0, min((left + columns) * across, image.width), below - above)
        strip = image.crop((0, above, image.width, below))
        strip = strip.resize((columns, strip.height), method, box=box)
        box = (0, first - above, columns, end - above)
        return self.crop(strip.resize((columns, rows), method, box=box))

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) that the resize will make of this picture."""
        if hasattr(self.resize, "get_params"):  # timm's ResizeKeepRatio
            height, width = self.resize.get_params(image, self.resize.size, self.resize.longest)
        elif isinstance(self.resize.size, int):
            short = min(image.size)
            width, height = (int(self.resize.size * side / short) for side in image.size)
        else:
            height, width = self.resize.size
        return height, width
