"""Untrusted bytes → RGB images of eight bits, or a reason why not.

The declared format, size and depth are read from the header by hand, so that nothing is decoded,
and no memory taken, for an image that will be refused. What is accepted and how it becomes RGB:

- PNG, JPEG and WebP, known by their first bytes (never by a file name or content type);
- they become RGB by the package's one decoder, ``pgn_fast.images``: upright, over white;
- sixteen bits a channel and animations are refused, and so is every broken or truncated image;
- too many pixels, and sides too unequal for a crop to show anything, are refused by the header.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Iterator, Sequence

from PIL import Image

from ..images import MAX_ASPECT, upright_rgb
from .errors import ApiError, out_of_time, overloaded

_PNG = b"\x89PNG\r\n\x1a\n"
# cameras write about ten; each scan of a progressive JPEG costs a pass over the whole image
_MAX_JPEG_SCANS = 64


def decode_call(
    images: Sequence[bytes],
    max_image_pixels: int,
    max_call_pixels: int,
    deadline: float = math.inf,
) -> Iterator[Image.Image]:
    """The images of one call as upright RGB images, one after the other.

    One at a time, so that a call never holds more than one image at its full size. All headers
    are checked before the first is decoded.

    Args:
        images: encoded images.
        max_image_pixels, max_call_pixels: what one and what all together may declare.
        deadline: ``time.monotonic()`` seconds after which no further image is begun.

    Raises:
        ApiError: 400 broken, 413 too many pixels, 415 of a kind that is not taken; 503 too late.
            The message says which image (from 0) and why.
    """
    headers = []
    for index, data in enumerate(images):
        try:
            headers.append(read_header(data))
        except (struct.error, IndexError, ValueError) as error:
            raise _refuse(400, "broken_image", index, f"has a broken header ({error})") from None
        except ApiError as error:
            raise _refuse(error.status, error.code, index, error.message) from None
    total = 0
    for index, (_, width, height) in enumerate(headers):
        total += width * height
        if width * height == 0:
            raise _refuse(400, "broken_image", index, f"declares {width} × {height} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _refuse(
                413,
                "too_thin",
                index,
                f"declares {width} × {height} pixels; sides of more than {MAX_ASPECT} to 1 are not "
                "taken, because a crop would show next to nothing of it",
            )
        if width * height > max_image_pixels:
            raise _refuse(
                413,
                "too_many_pixels",
                index,
                f"declares {width} × {height} = {width * height} pixels; "
                f"this server takes {max_image_pixels}",
            )
    if total > max_call_pixels:
        raise ApiError(
            413,
            "too_many_pixels",
            f"the {len(images)} images of the call declare {total} pixels; this server takes "
            f"{max_call_pixels} a call. Send fewer or smaller images a call.",
        )
    for index, (data, (kind, width, height)) in enumerate(zip(images, headers, strict=True)):
        if time.monotonic() > deadline:
            raise out_of_time("decoding its images")
        yield _decode(data, kind, (width, height), index)


def read_header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) as the first bytes declare them; "PNG", "JPEG" or "WEBP".

    Raises ApiError for what is not taken, and struct.error, IndexError or ValueError where the
    header itself is broken.
    """
    if data.startswith(_PNG):
        return "PNG", *_png_size(data)
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", *_jpeg_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", *_webp_size(data)
    raise ApiError(
        415, "unsupported_image", f"is not PNG, JPEG or WebP (it begins with {data[:8]!r})"
    )


def declared_pixels(data: bytes) -> int:
    """Pixels as the header declares them; 0 where it is none that ``decode_call`` would take."""
    try:
        _, width, height = read_header(data)
    except (ApiError, struct.error, IndexError, ValueError):
        return 0
    return width * height


def _png_size(data: bytes) -> tuple[int, int]:
    chunk, width, height, depth = struct.unpack_from(">4sIIB", data, 12)
    if chunk != b"IHDR":
        raise ValueError("no IHDR")
    if depth == 16:
        raise ApiError(
            415, "unsupported_image", "has 16 bits a channel; convert it to 8 bits yourself"
        )
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """The frame header (SOFn), found by walking from marker to marker."""
    if data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise ApiError(415, "unsupported_image", f"is a JPEG of more than {_MAX_JPEG_SCANS} scans")
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("no frame header")
        while data[at] == 0xFF:  # a marker may be padded with further 0xff
            at += 1
        marker = data[at]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 4)
            return width, height
        at += 1
        if not (marker == 0x01 or 0xD0 <= marker <= 0xD8):  # these have no length
            at += struct.unpack_from(">H", data, at)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        flags = data[20]
        if flags & 0x02:
            raise ApiError(415, "unsupported_image", "is animated; send one of its frames")
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError(f"unknown first chunk {chunk!r}")
    return width, height


def _decode(data: bytes, kind: str, size: tuple[int, int], index: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        # the decoder must agree about the size, or the check above was of another image
        if image.size != size:
            raise ValueError(f"declares {size} and then {image.size} pixels")
        if kind != "JPEG" and getattr(image, "is_animated", False):
            raise ApiError(415, "unsupported_image", "is animated; send one of its frames")
        return upright_rgb(image)
    except ApiError as error:
        raise _refuse(error.status, error.code, index, error.message) from None
    except MemoryError:
        raise overloaded("there is no memory left to decode this image; try again.") from None
    except Exception as error:
        # Pillow's decoders raise nearly every kind of exception at broken input
        reason = str(error)[:200] or type(error).__name__
        raise _refuse(400, "broken_image", index, f"cannot be decoded ({reason})") from None


def _refuse(status: int, code: str, index: int, reason: str) -> ApiError:
    return ApiError(status, code, f"image {index} {reason}.")
