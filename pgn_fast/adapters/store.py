"""Saving and loading adapters: two files that are always a pair, and nothing that runs code.

The weights file carries a copy of its configuration, so that replacing that one file is what makes
a new adapter valid. ``adapter_config.json``, for people and tools, follows it; a digest of the
tensors in both tells whether the two belong together.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from .._files import write_files
from ..backbone.load import DEMO_NAME, load_backbone
from ..errors import UserError, shown
from ..inversion.gamut import GamutLibrary
from ..methods import ABOUT_ADAPTER, METHODS, Method, method_of
from ..models import PGN, PromptedViT
from ..models.baselines import FineTuned, LinearProbe
from ..models.heads import KeptHead, ZeroShotHead, count_classes
from ..prompts.networks import check_kwargs

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# constructor arguments that may be modules of the user's own
_MODULES = ("generator", "token_library", "head")
_GIVEN = "module:"


def save_pretrained(
    model: PromptedViT | LinearProbe | FineTuned,
    directory: str | PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write what was trained into ``directory``, which is made where it is missing.

    Whenever the machine stops, the directory holds the old adapter or the new one, whole.

    Args:
        model: a PGN, a VPT, or one of the baselines.
        class_names: C names in label order; None: those that the model was loaded with.
        preprocessing: of the images, by timm's names (``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``); None: those that the model was loaded
            with, else the backbone's own.

    Raises:
        TypeError: not a model of this package.
        ValueError: ``class_names`` are not as many as the head's classes, or a baseline has a head
            that is no linear layer.
        OSError: the files could not be written; the old ones are whole.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in _trained(model).items()}
    backbone: Any = model.backbone
    names = class_names if class_names is not None else getattr(model, "class_names", None)
    values = _constructor_values(model)
    _check_names(names, values["num_classes"])
    config = {
        "pgn_fast_version": __version__,
        "method": method_of(model),
        "base_model_name_or_path": _backbone_name(backbone),
        **_shape(backbone),
        **values,
        "class_names": None if names is None else list(names),
        "preprocessing": _plain(
            preprocessing or getattr(model, "preprocessing", None) or backbone_pixels(backbone)
        ),
        "weights_digest": _digest(tensors),
    }
    text = json.dumps(config, indent=2)
    weights = safetensors.torch.save(tensors, {"format": "pt", "adapter_config": text})
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_files({folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: (text + "\n").encode()})


def from_pretrained(
    directory: str | PathLike[str],
    backbone: str | nn.Module | None = None,
    *,
    trainable: bool = False,
    **modules: nn.Module,
) -> Any:
    """Load an adapter in front of its frozen backbone.

    Args:
        directory: what ``save_pretrained`` wrote.
        backbone: a timm vision transformer or its name; None: the one that the adapter names, with
            its pretrained weights.
        trainable: False: frozen and in eval mode, for inference. True: in training mode, prompter
            and head with gradients, to go on training.
        **modules: ``head``, ``generator`` or ``token_library``, where the adapter was trained with
            a module of your own, which no configuration can rebuild.

    Returns:
        The ``PGN``, ``VPT``, ``LinearProbe`` or ``FineTuned`` that was saved, with
        ``class_names`` and ``preprocessing`` as attributes.

    Raises:
        UserError: (a ValueError) no adapter there; damaged, truncated, or a pickle; or the backbone
            does not fit: both values are named.

    Unknown entries of the configuration are ignored with a warning.
    """
    folder = Path(directory)
    config, tensors = read_adapter(folder)
    method = config.get("method")
    if method not in METHODS:
        raise UserError(
            f"{folder / CONFIG_FILE}: method is {method!r}; known: {', '.join(METHODS)}."
        )
    row = METHODS[method]
    vit = _backbone(folder, config, backbone, pretrained=not row.trains_backbone)
    _check_shape(folder, config, vit)
    values = _arguments(folder, row, config, modules)
    if row.name == "pgn":
        _check_generator(folder, values)
    if values.get("head") == "zero_shot":
        values["class_embeddings"] = tensors.get("head.class_embeddings")
    try:
        if isinstance(values.get("token_library"), Mapping):
            values["token_library"] = GamutLibrary.from_config(vit, values["token_library"])
        model: Any = row.build(vit, **values)
        model.load_adapter_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
    model.class_names = config.get("class_names")
    model.preprocessing = config.get("preprocessing")
    return model.train() if trainable else model.requires_grad_(False).eval()


def read_adapter(directory: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter, which belong together.

    Raises:
        UserError: no adapter there, or a damaged one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"no adapter: there is no folder {folder}.")
    inside, tensors = _read_weights(folder / WEIGHTS_FILE)
    digest = _digest(tensors)
    beside = _read_json(folder / CONFIG_FILE, required=inside is None)
    if beside is not None and beside.get("weights_digest", digest) == digest:
        return beside, tensors
    if inside is None or inside.get("weights_digest") != digest:
        raise UserError(
            f"{folder}: {WEIGHTS_FILE} does not belong to {CONFIG_FILE}, or its tensors are "
            "damaged: their digests differ. Save the adapter again, or copy both files together."
        )
    # a save was interrupted between its two files; the weights and what they carry are complete
    if beside is not None:
        warnings.warn(
            f"{folder / CONFIG_FILE} does not belong to {WEIGHTS_FILE}, as after an interrupted "
            "save: the configuration inside the weights file is used.",
            stacklevel=3,
        )
    return inside, tensors


def backbone_pixels(backbone: Any, **overrides: Any) -> dict[str, Any]:
    """How images become the backbone's input: its own preprocessing, but for the overrides.

    Args:
        overrides: mean, std, crop_pct, interpolation; None counts as not given.

    Returns:
        input_size (3, H, W) in pixels, interpolation, mean, std, crop_pct, crop_mode: timm's names.
    """
    from timm.data import resolve_model_data_config

    size = getattr(backbone.patch_embed, "img_size", None)
    # the size it was built with; its pretrained_cfg knows the usual one only
    sized = {"input_size": (3, *size)} if size else {}
    return resolve_model_data_config(backbone, args=sized | overrides)


def _trained(model: Any) -> dict[str, Tensor]:
    if method_of(model) not in METHODS:
        raise TypeError(
            f"an adapter holds a model of a registered method, got {type(model).__name__}; known "
            f"methods: {', '.join(METHODS)}"
        )
    return model.adapter_state_dict()


def _backbone_name(backbone: Any) -> str | None:
    """timm's name with its tag, or a twin's id on the hub; None for a model that has neither."""
    origin = getattr(backbone, "origin", None)
    if origin is not None:
        return origin.name
    about = getattr(backbone, "pretrained_cfg", None) or {}
    if about.get("source") == "hf-hub":
        return about.get("hf_hub_id")
    if about.get("source") == "local-dir" or about.get("file"):
        return None  # a path on this machine, whatever tag its file repeats
    name, tag = about.get("architecture"), about.get("tag")
    return f"{name}.{tag}" if name and tag and name != DEMO_NAME else name


def _shape(backbone: Any) -> dict[str, Any]:
    """What a backbone must agree in with the one that an adapter was trained on."""
    return {
        "embed_dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "patch_size": list(backbone.patch_embed.patch_size),
    }


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
    known = _parameters(METHODS[model.method])
    return {name: _plain(value) for name, value in values.items() if name in known}


def _head_values(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the head that stands on the model now is built from; it may be no longer the first one.

    Raises:
        ValueError: a baseline with a head that no configuration can describe.
    """
    head, configured = model.head, values.get("head", "linear")
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


def _check_names(names: Sequence[str] | None, num_classes: int) -> None:
    if names is not None and num_classes and len(names) != num_classes:
        raise ValueError(
            f"class_names has {len(names)} names, the head gives {num_classes} classes; pass "
            "class_names=[...] with one name a class, or set model.class_names = None."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return f"{_GIVEN}{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value


def _parameters(row: Method) -> set[str]:
    return set(row.parameters()) - {"class_embeddings"}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_json(path: Path, required: bool) -> dict[str, Any] | None:
    if not path.is_file():
        if required:
            raise UserError(f"no adapter in {path.parent}: it has no {path.name}.")
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not a configuration.")
    return config


def _read_weights(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The configuration that a weights file carries, where it does, and its tensors."""
    if not path.is_file():
        raise UserError(f"no adapter in {path.parent}: it has no {path.name}.")
    with open(path, "rb") as file:
        begin = file.read(9)
    # torch.save writes a zip archive or, in old versions, a bare pickle of protocol 2 or later. A
    # safetensors file may begin with the same byte: its first eight are the length of the header
    pickled = begin[:1] == b"\x80" and begin[8:] != b"{"
    if begin[:4] == b"PK\x03\x04" or pickled:
        raise UserError(
            f"{path} is a pickle (as torch.save writes), not safetensors. Loading it could run "
            "code, so it is refused; save the adapter with save_pretrained."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            carried = (file.metadata() or {}).get("adapter_config")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (None if carried is None else json.loads(carried)), tensors
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or save it again."
        ) from error


def _backbone(
    folder: Path, config: Mapping[str, Any], given: str | nn.Module | None, pretrained: bool
) -> nn.Module:
    name = config.get("base_model_name_or_path")
    if given is None and name is None:
        raise UserError(
            f"{folder}: the adapter does not name its backbone, which was no model of timm's "
            "registry. Pass it: from_pretrained(directory, backbone)."
        )
    if given is None and not pretrained:
        return load_backbone(str(name), pretrained=False)
    return load_backbone(given if given is not None else str(name))


def _check_shape(folder: Path, config: Mapping[str, Any], backbone: Any) -> None:
    for name, found in _shape(backbone).items():
        wanted = config.get(name)
        if wanted is not None and wanted != found:
            raise UserError(
                f"{folder}: this backbone does not fit: its {name} is {found}, the adapter was "
                f"trained on {config.get('base_model_name_or_path') or 'one'} with {name} {wanted}."
            )
    trained_on, given = config.get("base_model_name_or_path"), _backbone_name(backbone)
    if trained_on and given and trained_on != given:
        warnings.warn(
            f"{folder}: the adapter was trained on {trained_on}, this backbone is {given}: of the "
            "same shape, but hardly with the same weights.",
            stacklevel=3,
        )


def _check_generator(folder: Path, values: Mapping[str, Any]) -> None:
    """Nothing in a file reaches timm but plain settings of an architecture."""
    name, kwargs = values.get("generator", "resnet10"), values.get("generator_kwargs")
    if isinstance(name, nn.Module):
        return
    if not isinstance(name, str) or not isinstance(kwargs or {}, dict):
        raise UserError(
            f"{folder}: generator takes a name and generator_kwargs a dictionary, got "
            f"{shown(name)} and {shown(kwargs)}."
        )
    try:
        check_kwargs(name, kwargs or {})
    except ValueError as error:
        raise UserError(f"{folder}: {error}.") from error


def _arguments(
    folder: Path,
    row: Method,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
) -> dict[str, Any]:
    """The constructor's arguments: the configuration's, and modules that the caller brings."""
    known = _parameters(row)
    if unknown := sorted(set(config) - known - {*row.fixed, *ABOUT_ADAPTER}):
        warnings.warn(
            f"{folder / CONFIG_FILE}: unknown entries are ignored: {', '.join(unknown)}.",
            stacklevel=3,
        )
    takes = sorted(known & set(_MODULES))
    if wrong := sorted(set(modules) - set(takes)):
        raise UserError(
            f"from_pretrained: {', '.join(wrong)} cannot be given; modules that a "
            f"{config['method']} adapter takes: {', '.join(takes) or 'none'}."
        )
    values = {name: config[name] for name in known if name in config} | dict(modules)
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(_GIVEN):
            raise UserError(
                f"{folder}: {name} was a {value.removeprefix(_GIVEN)}, which only your code can "
                f"rebuild: pass from_pretrained(..., {name}=...)."
            )
    return values
