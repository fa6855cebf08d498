"""Images as clients really send them: odd modes, broken files, bombs. Seeded, with what to expect.

``fuzz_cases(count)`` yields (kind, encoded image, allowed statuses). Statuses are exact wherever
the kind decides them; a flipped bit may or may not be noticed by the format's own checks.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

OK, BROKEN, LARGE, KIND = {200}, {400}, {413}, {415}


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(
    rng: random.Random, mode: str = "RGB", size: tuple[int, int] | None = None
) -> Image.Image:
    width, height = size or (rng.randint(1, 90), rng.randint(1, 90))
    channels = len(Image.new(mode, (1, 1)).getbands())
    levels = np.frombuffer(rng.randbytes(width * height * channels), np.uint8)
    return Image.frombytes(mode, (width, height), levels.tobytes())


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    """A PNG written by hand, so that it may declare what Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(pixels))
        + png_chunk(b"IEND", b"")
    )


def deep_rgb(rng: random.Random) -> bytes:
    width, height = rng.randint(1, 40), rng.randint(1, 40)
    rows = b"".join(b"\0" + rng.randbytes(6 * width) for _ in range(height))
    return png_of(width, height, 16, 2, rows)


def png_bomb(rng: random.Random) -> bytes:
    side = rng.choice([6_000, 60_000, 2**31 - 1])
    return png_of(side, side, 8, 2, bytes(1000))


def jpeg_bomb(rng: random.Random) -> bytes:
    data = bytearray(encode(noise(rng), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def webp_bomb(rng: random.Random) -> bytes:
    data = bytearray(
        encode(noise(rng, "RGBA"), "WEBP", exact=True, lossless=False, exif=b"Exif\0\0")
    )
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_000).to_bytes(3, "little") * 2
    return bytes(data)


def text_bomb(rng: random.Random) -> bytes:
    """A compressed text chunk of 64 MB in a small PNG: must not be inflated into memory."""
    data = encode(noise(rng))
    return data[:33] + png_chunk(b"zTXt", b"Comment\0\0" + _zeros()) + data[33:]


@functools.cache
def _zeros() -> bytes:
    return zlib.compress(bytes(64_000_000), 1)


def many_scans(rng: random.Random) -> bytes:
    data = encode(noise(rng, size=(64, 64)), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    return data[:-2] + data[scan:-2] * 100 + data[-2:]


def animated(rng: random.Random, kind: str) -> bytes:
    frames = [noise(rng, size=(20, 20)) for _ in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def truncated(rng: random.Random, kind: str) -> bytes:
    data = encode(noise(rng, size=(64, 64)), kind)
    return data[: rng.randint(1, len(data) * 3 // 4)]


def flipped(rng: random.Random, kind: str) -> bytes:
    data = bytearray(encode(noise(rng, size=(40, 40)), kind))
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def oriented(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    return encode(noise(rng), "JPEG", exif=exif)


KINDS: dict[str, tuple[Callable[[random.Random], bytes], set[int]]] = {
    "rgb png": (lambda rng: encode(noise(rng)), OK),
    "rgb jpeg": (lambda rng: encode(noise(rng), "JPEG"), OK),
    "rgb webp": (lambda rng: encode(noise(rng), "WEBP", lossless=True), OK),
    "rgba png": (lambda rng: encode(noise(rng, "RGBA")), OK),
    "rgba webp": (lambda rng: encode(noise(rng, "RGBA"), "WEBP"), OK),
    "gray and alpha": (lambda rng: encode(noise(rng, "LA")), OK),
    "gray": (lambda rng: encode(noise(rng, "L")), OK),
    "one bit": (lambda rng: encode(noise(rng, "L").convert("1")), OK),
    "palette": (lambda rng: encode(noise(rng).quantize(16)), OK),
    "palette, transparent": (lambda rng: encode(noise(rng).quantize(16), transparency=3), OK),
    "color key": (lambda rng: encode(noise(rng), transparency=(1, 2, 3)), OK),
    "cmyk jpeg": (lambda rng: encode(noise(rng, "CMYK"), "JPEG"), OK),
    "oriented": (oriented, OK),
    "16 bit gray": (lambda rng: encode(Image.new("I;16", (9, 9), rng.randint(0, 65535))), KIND),
    "16 bit rgb": (deep_rgb, KIND),
    "animated png": (lambda rng: animated(rng, "PNG"), KIND),
    "animated webp": (lambda rng: animated(rng, "WEBP"), KIND),
    "many scans": (many_scans, KIND),
    "gif": (lambda rng: encode(noise(rng).quantize(8), "GIF"), KIND),
    "tiff": (lambda rng: encode(noise(rng), "TIFF"), KIND),
    "random bytes": (lambda rng: rng.randbytes(rng.randint(0, 3000)), KIND),
    "png bomb": (png_bomb, LARGE),
    "jpeg bomb": (jpeg_bomb, LARGE),
    "webp bomb": (webp_bomb, LARGE),
    "text bomb": (text_bomb, BROKEN),
    "no pixels": (lambda rng: png_of(0, rng.randint(0, 9), 8, 2, b""), BROKEN),
    "truncated png": (lambda rng: truncated(rng, "PNG"), BROKEN | KIND),
    "truncated jpeg": (lambda rng: truncated(rng, "JPEG"), BROKEN | KIND),
    "truncated webp": (lambda rng: truncated(rng, "WEBP"), BROKEN | KIND),
    "flipped png": (lambda rng: flipped(rng, "PNG"), OK | BROKEN | KIND | LARGE),
    "flipped jpeg": (lambda rng: flipped(rng, "JPEG"), OK | BROKEN | KIND | LARGE),
    "flipped webp": (lambda rng: flipped(rng, "WEBP"), OK | BROKEN | KIND | LARGE),
}


def fuzz_cases(count: int, seed: int = 0) -> Iterator[tuple[str, bytes, set[int]]]:
    rng = random.Random(seed)
    kinds = list(KINDS)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        make, allowed = KINDS[kind]
        yield kind, make(rng), allowed
