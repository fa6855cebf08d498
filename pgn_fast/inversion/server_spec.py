"""What a server does to an image between the network socket and the patch embedding."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import read_image
from .errors import CodecError, LayoutError

_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CHROMA = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}  # Pillow's names of JPEG's subsampling
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ServerSpec:
    """An image API's preprocessing: shorter side to ``resize``, center crop, /255, mean and std.

    The defaults are the common ImageNet evaluation; ``from_backbone`` reads those of a timm model.

    Attributes:
        resize: pixels of the shorter side after resizing; None: the server does not resize.
        crop: pixels of the square center crop; None: it does not crop.
        interpolation: the resizing filter, "bicubic", "bilinear", "lanczos" or "nearest".
        mean, std: of the three channels, in units where 255 levels are 1.
        codec: "png" (also right for lossless WebP) or "jpeg".
        quality: of the JPEG files, 1 to 100, by libjpeg's tables.
        subsampling: of their colors, as Pillow counts: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0. With 1
            and 2 prompts are gray, because colors of neighboring pixels are averaged.
        dtype: of the server's weights: "float32", "float16" or "bfloat16".
        dynamic_size: the server takes images of any size unchanged (timm's ``dynamic_img_size``).
    """

    resize: int | None = 256
    crop: int | None = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    codec: str = "png"
    quality: int = 95
    subsampling: int = 0
    dtype: str = "float32"
    dynamic_size: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("interpolation", self.interpolation, tuple(_PILLOW_FILTERS)),
            ("codec", self.codec, ("png", "jpeg")),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in known:
                raise ValueError(f"ServerSpec: {name}={value!r}; known: {', '.join(known)}")
        if self.subsampling not in CHROMA or not 1 <= self.quality <= 100:
            raise ValueError(
                "ServerSpec takes quality 1 to 100 and subsampling 0 (4:4:4), 1 (4:2:2) or 2 "
                f"(4:2:0), got quality={self.quality}, subsampling={self.subsampling}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"ServerSpec takes three means and three positive stds, got {self.mean}, {self.std}"
            )
        if self.resize is not None and self.crop is not None and self.resize < self.crop:
            raise ValueError(
                f"ServerSpec: resize={self.resize} is smaller than crop={self.crop}; the crop "
                "would be padded. Give the shorter side after resizing, floor(crop / crop_pct)."
            )
        # json gives lists back; equality and hashing want tuples
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))

    @classmethod
    def from_backbone(cls, backbone: Any, **overrides: Any) -> ServerSpec:
        """The evaluation preprocessing that a timm model's own configuration states.

        Args:
            backbone: a timm vision transformer.
            **overrides: any field, e.g. ``codec="jpeg"``.
        """
        from timm.data import resolve_model_data_config

        # the size that it was built with; its configuration knows the usual one only
        built = getattr(backbone.patch_embed, "img_size", None)
        config = resolve_model_data_config(
            backbone, args={"input_size": (3, *built)} if built else {}
        )
        crop = int(config["input_size"][-1])
        dynamic = bool(getattr(backbone, "dynamic_img_size", False))
        fields: dict[str, Any] = {
            "resize": None if dynamic else math.floor(crop / config["crop_pct"]),
            "crop": None if dynamic else crop,
            "interpolation": config["interpolation"],
            "mean": config["mean"],
            "std": config["std"],
            "dynamic_size": dynamic,
        }
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"ServerSpec has no {', '.join(unknown)}; known: "
                + ", ".join(cls.__dataclass_fields__)
            )
        return cls(**{**fields, **overrides})

    def differences(self, other: ServerSpec) -> str:
        """The fields in which another server differs, with this one's values, for messages."""
        mine, others = self.to_dict(), other.to_dict()
        return ", ".join(f"{name}={mine[name]}" for name in mine if mine[name] != others[name])

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def check_canvas(self, height: int, width: int) -> None:
        """Raise LayoutError where a canvas of this size would not pass through unchanged."""
        size = self.crop if self.crop is not None else self.resize
        if size is not None and (height, width) != (size, size):
            raise LayoutError(
                f"a canvas of {height}x{width} pixels does not survive this server, which resizes "
                f"to {self.resize} and crops {self.crop}. Use a layout of {size}x{size} pixels "
                "(CanvasLayout.border), or a server with dynamic_size=True, resize=None, crop=None."
            )

    @property
    def border(self) -> int:
        """Pixels that the center crop removes at the top and at the left of a square image."""
        if self.resize is None or self.crop is None:
            return 0
        return round((self.resize - self.crop) / 2.0)  # as torchvision's CenterCrop

    def pad(self, canvases: Tensor) -> Tensor:
        """Surround canvases with gray so that resize and center crop give them back bit by bit.

        A resize to the size that an image already has is skipped by every common implementation,
        and the crop then removes exactly what is added here.

        Args:
            canvases: uint8 (B, 3, H, W).

        Returns:
            uint8 (B, 3, resize, resize), or the canvases themselves where nothing is cropped.
        """
        self.check_canvas(*canvases.shape[-2:])
        if self.resize is None or self.crop is None or self.resize == self.crop:
            return canvases
        padded = canvases.new_full((*canvases.shape[:2], self.resize, self.resize), 128)
        inside = slice(self.border, self.border + self.crop)
        padded[:, :, inside, inside] = canvases
        return padded

    def encode(self, image: Tensor) -> bytes:
        """One uint8 image (3, H, W) as a file in the server's codec."""
        buffer = io.BytesIO()
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        if self.codec == "jpeg":
            picture.save(buffer, "JPEG", quality=self.quality, subsampling=self.subsampling)
        else:
            picture.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def preprocess(self, file: bytes) -> Tensor:
        """A file to the uint8 (3, H, W) that the server normalizes: decode, resize, center crop."""
        picture = read_image(file)
        if self.resize is not None and min(picture.size) != self.resize:
            short = min(picture.size)
            width, height = (int(self.resize * side / short) for side in picture.size)
            picture = picture.resize((width, height), _PILLOW_FILTERS[self.interpolation])
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.crop is None:
            return pixels
        top = round((pixels.shape[1] - self.crop) / 2.0)
        left = round((pixels.shape[2] - self.crop) / 2.0)
        return pixels[:, top : top + self.crop, left : left + self.crop]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or float levels (B, 3, H, W) to the float32 input of the network."""
        mean, std = self._statistics(images)
        return (images.float() / 255 - mean) / std

    def levels(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) back to 8-bit levels, float32, whole numbers in 0..255."""
        mean, std = self._statistics(images)
        return ((images.float() * std + mean) * 255).round().clamp(0, 255)

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    @property
    def gray_only(self) -> bool:
        """Whether the codec keeps single pixels' brightness but not their color."""
        return self.codec == "jpeg" and self.subsampling != 0

    def check_codec(self, patch_size: int, embed_dim: int) -> None:
        """Raise CodecError where the codec cannot carry patches of this size for such tokens."""
        if self.codec != "jpeg":
            return
        if patch_size % 8:
            raise CodecError(
                f"jpeg: patch size {patch_size} is not on the 8-pixel JPEG grid, so that a block "
                "would mix a prompt with its neighbors. Send PNG."
            )
        if self.border % 8:
            raise CodecError(
                f"jpeg: the server crops {self.border} pixels at each side, which is not on the "
                "8-pixel JPEG grid. Send PNG."
            )
        if not self.gray_only:
            return
        chroma, values = CHROMA[self.subsampling], patch_size**2
        if values < embed_dim:
            raise CodecError(
                f"jpeg {chroma} needs gray-only patches (p² >= D): it averages the colors of "
                f"neighboring pixels, and {patch_size}² = {values} gray values do not reach "
                f"tokens of {embed_dim} values. Send PNG, or JPEG with subsampling=0 (4:4:4)."
            )
        # a block of colors spans 16 pixels: where a prompt shares it with the image, it is tinted
        for what, pixels in (("patch size", patch_size), ("the server's crop of", self.border)):
            if pixels % 16:
                raise CodecError(
                    f"jpeg {chroma} stores colors in blocks of 16 pixels, {what} {pixels} is not "
                    "on that grid: prompts would take on the colors of the image beside them. "
                    "Send PNG, or JPEG with subsampling=0 (4:4:4)."
                )
