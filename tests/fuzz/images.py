"""Image files: each becomes RGB of the model's size, or is refused by a one-line reason."""

from __future__ import annotations

import random
from pathlib import Path

import odd_images
from timm.data import create_transform

from pgn_fast.images import UnreadableImage, bounded, read_image

from . import damage
from .run import Fault

# what a server takes of one image; files may have four times as many
MAX_PIXELS = 25_000_000


class Images:
    """See ``run.Target``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "image"
        self.transform = bounded(create_transform((3, 224, 224), interpolation="bicubic"))
        self._read(odd_images.encode(odd_images.noise(random.Random(0))))

    def attempt(self, rng: random.Random) -> str:
        if rng.random() < 0.3:
            data = self._thin(rng)
        else:
            kinds = list(odd_images.KINDS.values())
            data = rng.choice(kinds)[0](rng)
        if data and rng.random() < 0.3:
            data = damage.bytes_of(data, rng)
        try:
            self._read(data)
            return "read"
        except UnreadableImage as error:
            if len(str(error)) > 400 or not str(error).isprintable():
                raise Fault(f"long or with control characters: {str(error)[:500]!r}") from error
            return "refused"

    def _read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        image = read_image(self.path, max_pixels=MAX_PIXELS)
        if image.mode != "RGB" or self.transform(image).shape != (3, 224, 224):
            raise Fault(f"{image.mode} of {image.size}")

    def _thin(self, rng: random.Random) -> bytes:
        """A long side and a short one, whole, of one bit a pixel."""
        sides = [rng.choice([1, 2, 5, 30]), 10 ** rng.randint(1, 6)]
        rng.shuffle(sides)
        rows = (b"\0" + bytes((sides[0] + 7) // 8)) * sides[1]
        return odd_images.png_of(*sides, 1, 0, rows)
