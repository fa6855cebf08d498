"""transformers' image encoders: ViT, DeiT, CLIP, SigLIP, SigLIP2, DINOv2 (with registers), DINOv3.

Every value is read from the modules that compute with it, not from the configuration, and a module
of an unknown type is refused: what is left cannot differ. Tokens are ``last_hidden_state``; the
twin's head gives the logits of the ``...ForImageClassification`` classes and CLIP's projected
features. Poolers with a trained layer of their own (ViT, DeiT: a linear layer and tanh) have no
place in timm's classes and are left out: the twin pools the class token as it is.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from ... import hub
from . import transformers_towers as towers
from .assembly import MapParts, Parts, Pool, TwinRefused
from .preprocessing import from_processor

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
# what the published checkpoints of a family were trained with, by the start of its model_type
_USUAL_PIXELS: dict[str, dict[str, Any]] = {
    "vit": {"mean": _HALF, "std": _HALF, "interpolation": "bilinear", "crop_mode": "squash"},
    "deit": {**_IMAGENET, "interpolation": "bicubic"},
    "clip": {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "interpolation": "bicubic"},
    "siglip": {"mean": _HALF, "std": _HALF, "interpolation": "bicubic", "crop_mode": "squash"},
    "siglip2": {"mean": _HALF, "std": _HALF, "interpolation": "bilinear", "crop_mode": "squash"},
    "dinov2": {**_IMAGENET, "interpolation": "bicubic"},
    "dinov3": {**_IMAGENET, "interpolation": "bilinear", "crop_mode": "squash"},
}
for _pixels in _USUAL_PIXELS.values():
    _pixels.setdefault("crop_pct", 1.0)
    _pixels.setdefault("crop_mode", "center")


def parts_of(model: nn.Module, size: tuple[int, int] | None) -> Parts:
    """The parts of a transformers model.

    Args:
        size: of the images, height and width; None: as configured. Position embeddings are
            interpolated by the original's own code.

    Raises:
        TwinRefused: no such class, or a setting that the twin does not support.
    """
    kind, vision = _kind(model), vision_tower(model)
    towers.check_tower(vision)
    try:
        parts = kind.read(vision, size)
    except AttributeError as error:
        raise TwinRefused(
            f"transformers {transformers.__version__} lays out {type(vision).__name__} in another "
            f"way than its twin knows ({error}); update transformers, or use timm's own model"
        ) from error
    parts.pool = kind.pool
    if kind.finish is not None:
        kind.finish(model, vision, parts)
    return parts


def vision_tower(model: nn.Module) -> Any:
    """The part of the model that the twin computes, whose tensors it shares."""
    path = _kind(model).path
    return model if path == "" else model.get_submodule(path)


def _kind(model: nn.Module) -> _Kind:
    kind = _KINDS.get(type(model).__name__)
    if kind is None or not type(model).__module__.startswith("transformers.models."):
        raise TwinRefused(
            f"{type(model).__name__} of transformers has no twin; known: {', '.join(_KINDS)}"
        )
    return kind


def load(location: str, revision: str | None, config: Mapping[str, Any], pretrained: bool) -> Any:
    """The image encoder in a folder or a repository: float32, safetensors, none of its own code.

    Args:
        config: the content of its ``config.json``, which names the class.

    Raises:
        TwinRefused: a class that has no twin, or weights that are no safetensors.
    """
    architectures = config.get("architectures") or [""]
    name = _WITHOUT_TEXT.get(architectures[0], architectures[0])
    if name not in _KINDS:
        name = _PLAIN.get(str(config.get("model_type")), "")
    if not name:
        raise TwinRefused(
            f"{location} holds a {architectures[0] or config.get('model_type')}, which has no "
            f"twin; known: {', '.join(_KINDS)}"
        )
    kind = getattr(transformers, name)
    options = {"trust_remote_code": False, "revision": revision or "main"}
    if not pretrained:
        return kind(kind.config_class.from_pretrained(location, **options))
    try:
        return from_pretrained(kind, location, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise TwinRefused(
            f"{location} has no model.safetensors; load it with transformers yourself, which may "
            "take the older format, and pass the model"
        ) from error


def from_pretrained(kind: Any, location: str, **options: Any) -> Any:
    """``kind.from_pretrained`` in float32 from safetensors, silent and strict: its report on
    standard error is no answer, and tensors that it leaves at random are no weights.

    Raises:
        TwinRefused: a tensor is missing, or has another shape than the configuration says.
    """
    options |= {"use_safetensors": True, "dtype": torch.float32}
    with _silence():
        model, report = kind.from_pretrained(
            location, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise TwinRefused(
            f"{location}: {name} is {tuple(stored)} in its file, and {tuple(wanted)} by its "
            "config.json; one of them belongs to another model"
        )
    missing = sorted(name for name in report["missing_keys"] if not _UNUSED.search(name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TwinRefused(f"{location}: its file lacks {missing[0]}{more} of {kind.__name__}")
    return model


# what no twin reads: a pooler with a layer of its own, and what stands for masked patches
_UNUSED = re.compile(r"(^|\.)(pooler\.|mask_token$)")


@contextmanager
def _silence() -> Iterator[None]:
    """Neither progress bars nor warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def unwrap(model: nn.Module) -> Any:
    """timm's own model inside ``TimmWrapperModel`` and its kin; None for others."""
    if not type(model).__name__.startswith("TimmWrapper"):
        return None
    if getattr(model, "features_only", False):
        raise TwinRefused("features_only=True: such a model gives maps of features, not tokens")
    return model.timm_model


def hub_name(model: Any) -> str | None:
    """The id that the model was loaded from; None for a folder's, which another machine has not."""
    name = getattr(model.config, "_name_or_path", "") or ""
    return name if hub.is_repo_id(name) and not Path(name).exists() else None


def takes_any_size(model: nn.Module) -> bool:
    return type(vision_tower(model)).__name__.startswith(towers.ANY_SIZE)


def configured_size(model: nn.Module) -> tuple[int, int]:
    return towers.pair(vision_tower(model).config.image_size)


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """What the model's image processor does, in timm's terms.

    Args:
        processor: an image processor, a processor that holds one, its settings, or None: the one
            on the disk beside the weights that the model was loaded from.
    """
    if processor is None:
        wrapped = getattr(model.config, "pretrained_cfg", None)
        if wrapped:
            names = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")
            return {n: wrapped[n] for n in names if n in wrapped}
        return _processor_on_disk(model.config)
    processor = getattr(processor, "image_processor", processor)
    return from_processor(processor if isinstance(processor, Mapping) else processor.to_dict())


def _processor_on_disk(config: Any) -> dict[str, Any]:
    """The settings beside the model's weights, without the network; a family's usual mean and
    standard deviation, with a warning, where they are not there."""
    name = getattr(config, "_name_or_path", "")
    if name:
        settings = processor_settings(name, hub.cached)
        if settings is not None:
            return from_processor(settings)
        warnings.warn(
            f"{name}: no image processor on this machine, so mean and standard deviation are "
            f"taken as usual for {config.model_type}; pass load_backbone(model, "
            "processor=AutoImageProcessor.from_pretrained(...)) to be sure",
            stacklevel=6,
        )
    # timm's model inside of a wrapper says it itself
    return dict(_USUAL_PIXELS.get(config.model_type.partition("_")[0], {}))


def processor_settings(
    location: str, fetch: Callable[[str, str], Path | None]
) -> dict[str, Any] | None:
    """The image processor's settings in a folder or a repository; None where it has none.

    Args:
        fetch: repository's id and file name to a path, or None: ``hub.download`` or ``hub.cached``.
    """
    for file in ("preprocessor_config.json", "processor_config.json"):
        folder = Path(location)
        path = folder / file if folder.is_dir() else fetch(location, file)
        if path is None or not path.is_file():
            continue
        settings = json.loads(path.read_text())
        # a processor of images and text keeps the images' part under its own name
        settings = settings.get("image_processor", settings)
        if "image_processor_type" in settings or "image_mean" in settings:
            return settings
    return None


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """The original's tokens (B, S + N, D), by its own code."""
    tower = vision_tower(model)
    if type(tower).__name__ == "Siglip2VisionModel":
        return tower(**_siglip2_inputs(tower, images), return_dict=True).last_hidden_state
    if (
        type(tower).__name__.startswith(towers.ANY_SIZE)
        or towers.pair(tower.config.image_size) == images.shape[2:]
    ):
        return tower(pixel_values=images, return_dict=True).last_hidden_state
    out = tower(pixel_values=images, interpolate_pos_encoding=True, return_dict=True)
    return out.last_hidden_state


def _siglip2_inputs(tower: Any, images: Tensor) -> dict[str, Tensor]:
    """Images (B, C, H, W) as the rows of pixels that SigLIP2 reads, all of them unmasked."""
    p = tower.embeddings.patch_size
    B, _, H, W = images.shape
    rows = images.unflatten(3, (W // p, p)).unflatten(2, (H // p, p))  # (B, C, h, p, w, p)
    rows = rows.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), -1)
    shapes = torch.tensor([[H // p, W // p]] * B, device=images.device)
    mask = torch.ones(rows.shape[:2], dtype=torch.int32, device=images.device)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _classifier(model: Any, vision: Any, parts: Parts) -> None:
    head = model.classifier
    if isinstance(head, nn.Linear):
        parts.head = head.weight, head.bias


def _deit_teacher(model: Any, vision: Any, parts: Parts) -> None:
    for name, head in (
        ("head", model.cls_classifier),
        ("head_dist", model.distillation_classifier),
    ):
        if isinstance(head, nn.Linear):
            setattr(parts, name, (head.weight, head.bias))


def _deit_class_token(model: Any, vision: Any, parts: Parts) -> None:
    """Its classifier reads the class token alone: the distillation token is a register here."""
    parts.dist, parts.reg = None, parts.dist
    _classifier(model, vision, parts)


def _projection(model: Any, vision: Any, parts: Parts) -> None:
    parts.head = model.visual_projection.weight, model.visual_projection.bias


def _clip_mean(model: Any, vision: Any, parts: Parts) -> None:
    parts.fc_norm = None  # it is there and not used
    _classifier(model, vision, parts)


def _map(model: Any, vision: Any, parts: Parts) -> None:
    if not vision.use_head:
        parts.pool = "avg"
        return
    head, attention = vision.head, vision.head.attention
    parts.map = MapParts(
        latent=head.probe,
        in_proj_weight=attention.in_proj_weight,
        in_proj_bias=attention.in_proj_bias,
        out=attention.out_proj,
        norm=head.layernorm,
        fc1=head.mlp.fc1,
        fc2=head.mlp.fc2,
        act=towers.activation(head.mlp.activation_fn),
        num_heads=attention.num_heads,
    )


@dataclass(frozen=True)
class _Kind:
    """How one class of transformers is read.

    Attributes:
        path: of the vision tower inside it.
        finish: adds the head and the pooling.
    """

    path: str
    read: towers.Read
    pool: Pool
    finish: Callable[[Any, Any, Parts], None] | None = None


def _kinds() -> Iterator[tuple[str, _Kind]]:
    yield "ViTModel", _Kind("", towers.read_vit, "token")
    yield "ViTForImageClassification", _Kind("vit", towers.read_vit, "token", _classifier)
    yield "DeiTModel", _Kind("", towers.read_vit, "class_and_dist")
    yield "DeiTForImageClassification", _Kind("deit", towers.read_vit, "token", _deit_class_token)
    yield (
        "DeiTForImageClassificationWithTeacher",
        _Kind("deit", towers.read_vit, "class_and_dist", _deit_teacher),
    )
    yield "CLIPVisionModel", _Kind("", towers.read_clip, "token")
    yield (
        "CLIPVisionModelWithProjection",
        _Kind("vision_model", towers.read_clip, "token", _projection),
    )
    yield "CLIPModel", _Kind("vision_model", towers.read_clip, "token", _projection)
    yield "CLIPForImageClassification", _Kind("vision_model", towers.read_clip, "avg", _clip_mean)
    for name, read in (("Siglip", towers.read_siglip), ("Siglip2", towers.read_siglip2)):
        yield f"{name}VisionModel", _Kind("", read, "map", _map)
        yield f"{name}Model", _Kind("vision_model", read, "map", _map)
        yield f"{name}ForImageClassification", _Kind("vision_model", read, "avg", _classifier)
    for name, path in (
        ("Dinov2", "dinov2"),
        ("Dinov2WithRegisters", "dinov2_with_registers"),
    ):
        yield f"{name}Model", _Kind("", towers.read_dinov2, "token")
        yield (
            f"{name}ForImageClassification",
            _Kind(path, towers.read_dinov2, "class_and_mean", _classifier),
        )
    yield "DINOv3ViTModel", _Kind("", towers.read_dinov3, "token")


_KINDS = dict(_kinds())
# whole models -> the class that loads their vision tower alone
_WITHOUT_TEXT = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}
# model_type -> the class for checkpoints of other classes, such as masked image models
_PLAIN = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
