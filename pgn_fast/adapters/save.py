"""Saving what was trained: all of it, in plain values, or an error before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from .._files import write_files
from .._stored import check_numbers
from .._values import plain
from ..errors import shown
from ..inversion.gamut import GamutLibrary
from ..methods import METHODS, method_of
from ..models import PGN, PromptedViT
from ..models.heads import KeptHead, ZeroShotHead, count_classes
from .class_names import in_label_order
from .files import CARRIED, CONFIG_FILE, WEIGHTS_FILE, sealed
from .header import LARGEST_CONFIG
from .identity import describe
from .pixels import backbone_pixels
from .schema import GIVEN, check_config, plain_preprocessing

_FOR_PEFT = "PGN_FAST, no type of PEFT's: pgn_fast.from_pretrained loads this adapter"
# constructor arguments that say how a head began; what became of it is in its tensors
_IN_HEAD = {"class_embeddings", "head_init"}


def save_pretrained(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    class_names: Sequence[str] | Mapping[Any, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write what was trained into ``directory``, which is made where it is missing.

    Whenever the machine stops, the directory holds the old adapter or the new one, whole. Equal
    models give equal bytes. Several processes may save into one directory at once.

    Args:
        model: a PGN, a VPT, or one of the baselines; also inside of ``torch.compile`` or
            ``DistributedDataParallel``.
        class_names: C names in label order, or a dictionary {id: name} or {name: id}; None: those
            that the model was loaded with.
        preprocessing: of the images, by timm's names (``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``); None: those that the model was loaded
            with, else the backbone's own.

    Raises:
        TypeError: not a model of this package.
        ValueError: what could not be loaded again, and why: ``class_names`` that are not one a
            class; numbers that are not finite; parameters inside the backbone that are trained,
            which an adapter does not hold; a baseline with a head that is no linear layer.
        OSError: the files could not be written; the old ones are whole.
    """
    model = unwrapped(model)
    own: Any = model
    row = METHODS.get(method_of(model) or "")
    if row is None:
        raise TypeError(
            f"an adapter holds a model of a registered method, got {type(model).__name__}; known "
            f"methods: {', '.join(METHODS)}"
        )
    if not row.trains_backbone:
        _check_backbone_frozen(own.backbone)
    tensors = plain_tensors(own.adapter_state_dict())
    check_numbers(tensors, given_buffers(own))
    values = _constructor_values(own)
    if class_names is None:
        class_names = getattr(model, "class_names", None)
    pixels = preprocessing or getattr(model, "preprocessing", None)
    config = {
        "pgn_fast_version": __version__,
        # PEFT looks at this entry first, and shows it where it is none of its types
        "peft_type": _FOR_PEFT,
        "method": row.name,
        **describe(own, trained=row.trains_backbone),
        **values,
        "class_names": in_label_order(class_names, values["num_classes"]),
        "preprocessing": plain_preprocessing(pixels or backbone_pixels(own.backbone)),
    }
    # what the logits mean, where they are not of one class an image
    if (task := getattr(own, "task", "multiclass")) != "multiclass":
        config["task"] = task
    config = sealed(config, tensors)
    check_config(config, "save_pretrained")
    text = json.dumps(config, indent=2, allow_nan=False)
    if len(text) >= LARGEST_CONFIG:
        raise ValueError(
            f"save_pretrained: the configuration has {len(text)} bytes, {LARGEST_CONFIG} are the "
            "most that is read again. Shorten the class names."
        )
    weights = safetensors.torch.save(tensors, {CARRIED: text})
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_files({folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: (text + "\n").encode()})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``'s and data-parallel training's wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict as it is saved: on the CPU, contiguous, each tensor with memory of its own.

    Weights that two layers share are stored twice; on loading, the module that shares them gets
    both, which are equal.

    Raises:
        ValueError: an entry that is no plain tensor with its numbers in memory.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in state.items():
        kept = isinstance(value, Tensor) and value.layout == torch.strided
        if not kept or value.is_meta or value.is_quantized or value.is_complex():
            raise ValueError(
                f"{name} is {shown(value)}, which an adapter cannot hold: it takes plain tensors "
                "of real numbers"
            )
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def given_buffers(model: Any) -> frozenset[str]:
    """Names of the buffers of modules that the user brought: what they mean is his affair."""
    modules = {"head": model.head}
    if isinstance(model, PGN) and model.prompter.config["generator"] is None:
        modules["prompter.generator"] = model.prompter.generator
    if isinstance(model.head, nn.Linear | ZeroShotHead | KeptHead):
        del modules["head"]
    return frozenset(
        f"{prefix}.{name}".replace("_orig_mod.", "")
        for prefix, module in modules.items()
        for name, _ in module.named_buffers()
        if not name.endswith(("running_mean", "running_var"))
    )


def _check_backbone_frozen(backbone: nn.Module) -> None:
    """An adapter holds what stands beside the backbone: trained parts inside it would be lost."""
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} parameters inside the backbone are trained ({_some(trained)}), and an "
            "adapter does not hold them. Save them by what put them there, such as PEFT's own "
            "save_pretrained, and freeze them first, backbone.requires_grad_(False); or use "
            "method 'full', which saves the whole backbone."
        )


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return first if not rest else f"{first}, {rest[0]}" + (", ..." if len(rest) > 1 else "")


def _constructor_values(model: Any) -> dict[str, Any]:
    """The constructor's values in types that JSON has; modules by their class names."""
    values = dict(model.adapter_config)
    if isinstance(model, PGN):
        library = model.prompter.token_library
        values["token_library"] = library if isinstance(library, nn.Module) else None
        if isinstance(library, GamutLibrary):
            values["token_library"] = library.to_config()
        if values["generator"] is None:
            values["generator"] = model.prompter.generator
    values |= _head_values(model, values)
    known = METHODS[model.method].parameters()
    return {
        name: _plain(name, value)
        for name, value in values.items()
        if name in known and name not in _IN_HEAD
    }


def _head_values(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the head that stands on the model now is built from; it may be no longer the first one.

    Raises:
        ValueError: a baseline with a head that no configuration can describe.
    """
    head, configured = unwrapped(model.head), values.get("head", "linear")
    if type(head) is nn.Linear and head.bias is not None:
        return {"head": "linear", "num_classes": head.out_features}
    if type(head) is nn.Identity and configured == "linear":
        return {"head": "linear", "num_classes": 0}
    kept = configured == "keep" and isinstance(head, KeptHead)
    if kept or head is configured or isinstance(head, ZeroShotHead):
        return {}
    if isinstance(model, PromptedViT):
        return {"head": head, "num_classes": count_classes(head, None)}
    raise ValueError(
        f"the head of this {type(model).__name__} is a {type(head).__name__}; an adapter of it "
        f"holds an nn.Linear({model.backbone.num_features}, C) with a bias. Put such a head on, "
        "or use a VPT or PGN with head=..., which takes any module."
    )


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, nn.Module):
        kind = type(unwrapped(value))
        return f"{GIVEN}{kind.__module__}.{kind.__qualname__}"
    return plain(name, value)
