"""The served model's own preprocessing: timm's transform, with the arithmetic done in batch.

timm's evaluation transform is geometry (resize, crop), then uint8 → float, then normalization. The
geometry runs image by image and is timm's own code, its memory bounded for thin images (see
``pgn_fast.images.bounded``); the rest runs once for a batch, by the same three operations in the
same order and precision, so that each bit is that of timm's transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ..images import bounded
from .errors import overloaded

Levels = NDArray[np.uint8]


class Preprocessing:
    """Upright RGB images → normalized float32 batches.

    Args:
        data_config: what ``timm.data.resolve_data_config`` returns: ``input_size`` (C, H, W),
            ``interpolation``, ``crop_pct``, ``crop_mode``, ``mean``, ``std``.

    Raises:
        ValueError: not three channels, or a standard deviation that is not positive.
    """

    def __init__(self, data_config: dict[str, Any]) -> None:
        self.data_config = data_config
        channels, self.height, self.width = data_config["input_size"]
        mean, std = data_config["mean"], data_config["std"]
        if channels != 3 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"images are RGB: three channels, means and positive stds are needed, got "
                f"{channels} channels, mean {tuple(mean)}, std {tuple(std)}."
            )
        # with use_prefetcher timm stops after the geometry, at uint8
        self._geometry = bounded(
            create_transform(**data_config, is_training=False, use_prefetcher=True)
        )
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._identity_at_size = self._is_identity_at_size()

    def geometry(self, image: Image.Image) -> Levels:
        """Resized and cropped levels (C, H, W) of one RGB image.

        Raises:
            ApiError: 503, no memory left.
        """
        if self._identity_at_size and image.size == (self.width, self.height):
            pixels = np.frombuffer(image.tobytes(), np.uint8)
            return pixels.reshape(self.height, self.width, 3).transpose(2, 0, 1)
        try:
            return np.asarray(self._geometry(image))
        except MemoryError:
            raise overloaded("there is no memory left to resize this image; try again.") from None

    def zeros(self) -> Levels:
        """A black image's levels (C, H, W)."""
        return np.zeros(self.data_config["input_size"], np.uint8)

    def stack(self, levels: Sequence[Levels]) -> Tensor:
        """One batch (B, C, H, W), uint8, of images that went through ``geometry``."""
        return torch.from_numpy(np.stack(levels)).contiguous()

    def normalize(self, levels: Tensor) -> Tensor:
        """Model input (B, C, H, W), float32, of a batch of levels (B, C, H, W), uint8."""
        return levels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    def _is_identity_at_size(self) -> bool:
        """Whether images that have the model's size already pass the geometry unchanged.

        Found with noise, of which no resampling and no shift leaves every level as it was.
        """
        noise = np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), np.uint8)
        passed = np.asarray(self._geometry(Image.fromarray(noise)))
        return np.array_equal(passed, noise.transpose(2, 0, 1))

    def describe(self) -> dict[str, Any]:
        """Its settings as JSON values, for ``GET /v1/model``."""
        return {
            "input_size": list(self.data_config["input_size"]),
            "interpolation": self.data_config["interpolation"],
            "crop_pct": self.data_config["crop_pct"],
            "crop_mode": self.data_config["crop_mode"],
            "mean": list(self.data_config["mean"]),
            "std": list(self.data_config["std"]),
            "canvas_is_unchanged": self._identity_at_size,
        }
