"""The frozen backbone: a vision transformer, by name or ready-made; others are refused."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import nn

from .. import hub
from ..errors import UserError
from . import families, twins

DEMO_NAME = "pgn_demo_vit"
OPEN_CLIP_CONFIG = "open_clip_config.json"

# what a twin takes beside the model itself
_FOR_TWINS = ("img_size", "processor")


class BackboneName(NamedTuple):
    """What a name means.

    Attributes:
        kind: "demo"; "timm": a name of timm's registry; "hub": a repository's id, with or without
            @revision; "folder": a path.
        value: the name without its prefix.
    """

    kind: Literal["demo", "timm", "hub", "folder"]
    value: str


def load_backbone(source: str | nn.Module, **kwargs: Any) -> Any:
    """Return a vision transformer of timm's classes, frozen and in eval mode.

    Args:
        source: a name, a folder or a model:

            - a timm model name ("vit_base_patch16_224.augreg_in21k"), also "timm/NAME";
            - the id of a repository on the hub, of one of these three: "OWNER/NAME", also
              "hf-hub:OWNER/NAME", with or without "@REVISION";
            - a folder that timm, transformers or open_clip wrote: its path, also "local-dir:PATH";
            - "pgn_demo_vit", the small backbone inside this package;
            - a timm model, which is frozen in place;
            - an image encoder of transformers, an open_clip model or its ``.visual``, or
              torchvision's ``VisionTransformer``: an exact twin on the same weights is returned.
        **kwargs: with a timm name, for ``timm.create_model``; ``pretrained`` is True unless given,
            because a frozen backbone of random weights is of no use. With a model of another
            library: ``img_size`` in pixels and ``processor``, its image processor.

    Raises:
        TypeError: neither a name nor a module.
        ValueError: no such model, or one that prompts cannot enter.
        RuntimeError: its pretrained weights cannot be loaded here.
    """
    if isinstance(source, str):
        backbone = _checked(_create(parse_name(source), **kwargs))
        # for adapters, which say how to build it again
        backbone.created_with = dict(kwargs)
        return backbone
    if isinstance(source, nn.Module) and twins.library_of(source) is not None:
        return _checked(_twin(source, **kwargs))
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: given with a model that is already there")
    return _checked(source)


def load_recorded(name: str, *, pretrained: bool = True, **kwargs: Any) -> Any:
    """The backbone that an adapter's configuration names, which may be a stranger's file.

    A name of timm's registry, or a repository's id whose weights are safetensors; never a path on
    this machine, and no code of a repository is run.

    Args:
        **kwargs: plain settings of the architecture, which the caller has checked.

    Raises:
        UserError: (a ValueError) the name is of another kind, or the repository has no safetensors.
    """
    parsed = parse_name(name, recorded=True)
    if parsed.kind == "hub" and pretrained:
        weights = (
            "model.safetensors",
            "model.safetensors.index.json",
            "open_clip_model.safetensors",
        )
        if not any(hub.download(parsed.value, file) for file in weights):
            raise UserError(
                f"backbone: {parsed.value} has no model.safetensors; weights in other formats are "
                "not loaded on the word of an adapter's file. Load it yourself and pass it"
            )
    return _checked(_create(parsed, pretrained=pretrained, **kwargs))


def parse_name(name: str, *, recorded: bool = False) -> BackboneName:
    """What a backbone's name means, without loading anything.

    Args:
        recorded: the name comes from a file, not from the user: it may not be a path.

    Raises:
        UserError: (a ValueError) a recorded name that is no timm name and no repository's id.
    """
    prefix, colon, rest = name.partition(":")
    hub_prefix = bool(colon) and prefix in ("hf-hub", "hf_hub")
    if recorded and not hub_prefix and not _harmless(name):
        raise UserError(
            f"backbone: an adapter's file names {name!r}, which is neither a timm model name nor a "
            "repository's id; load the backbone yourself and pass it"
        )
    if name == DEMO_NAME:
        return BackboneName("demo", name)
    if hub_prefix:
        if not hub.is_repo_id(rest):
            raise UserError(
                f"backbone: {name!r}: after {prefix}: comes OWNER/NAME or OWNER/NAME@REVISION"
            )
        return _timm_name(rest) or BackboneName("hub", rest)
    if colon and prefix == "local-dir":
        if not rest:
            raise UserError("backbone: 'local-dir:': after it comes the path of a folder")
        return BackboneName("folder", rest)
    if timm.is_model(name):
        return BackboneName("timm", name)
    if not recorded and Path(name).is_dir():
        return BackboneName("folder", name)
    if hub.is_repo_id(name):
        return _timm_name(name) or BackboneName("hub", name)
    if not recorded and ("/" in name or "\\" in name):
        raise ValueError(f"backbone: there is no folder {name!r}, and it is no repository's id")
    return BackboneName("timm", name)


def _harmless(name: str) -> bool:
    return hub.is_repo_id(name) or not set(name) & set("/\\:")


def _timm_name(repo_id: str) -> BackboneName | None:
    """timm's own repositories hold what its registry names, and the registry knows more of them."""
    owner, _, name = repo_id.partition("/")
    return BackboneName("timm", name) if owner == "timm" and timm.is_model(name) else None


def _create(name: BackboneName, **kwargs: Any) -> Any:
    if name.kind == "demo":
        return _create_demo(name.value, **kwargs)
    if name.kind == "timm":
        return _create_timm(name.value, **kwargs)
    if name.kind == "folder":
        config = _folder_config(Path(name.value))
        source = f"local-dir:{name.value}"
        whole = config is None and (Path(name.value) / OPEN_CLIP_CONFIG).is_file()
    else:
        found = hub.download(name.value, "config.json")
        config = None if found is None else json.loads(found.read_text())
        source = f"hf-hub:{name.value}"
        whole = config is None and hub.download(name.value, OPEN_CLIP_CONFIG) is not None
    if whole:
        return _create_open_clip(name, source, **kwargs)
    if config is not None and "architecture" in config and config.get("model_type") is None:
        return _create_timm(source, architecture=config["architecture"], **kwargs)
    if config is not None and "model_type" in config:
        if config["model_type"] == "timm_wrapper":
            return _create_timm(source, architecture=config["architecture"], **kwargs)
        return _create_transformers(name, config, **kwargs)
    raise ValueError(
        f"backbone: {name.value} has no config.json of timm's or of transformers', and no "
        f"{OPEN_CLIP_CONFIG}; load the model by its own library and pass it"
    )


def _create_demo(name: str, *, pretrained: bool = True, **kwargs: Any) -> Any:
    from .. import demo

    if kwargs:
        raise ValueError(f"backbone: {name} has one size, it does not take {', '.join(kwargs)}")
    return demo.backbone() if pretrained else demo.build()


def _folder_config(folder: Path) -> dict[str, Any] | None:
    if not folder.is_dir():
        raise ValueError(f"backbone: there is no folder {folder}")
    path = folder / "config.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"backbone: {path} is not readable JSON ({error})") from error


def _create_timm(
    name: str, *, architecture: str | None = None, pretrained: bool = True, **kwargs: Any
) -> Any:
    """A timm model by what ``timm.create_model`` takes as a name."""
    bare = architecture or name.split(".")[0]
    if not timm.is_model(architecture or name):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3)
        raise ValueError(
            f"backbone: timm has no model named {bare if architecture else name!r}"
            + (f"; near it: {', '.join(near)}" if near else "; timm.list_models() names them all")
        )
    _refuse(name, timm.model_entrypoint(bare).__module__)
    _refuse_before_download(bare)
    weights = f"backbone: the pretrained weights of {name!r}"
    try:
        # weights from a file: the hub has nothing to say
        if not pretrained or kwargs.get("checkpoint_path"):
            return timm.create_model(name, pretrained=False, **kwargs)
        with hub.asked(weights):
            return timm.create_model(name, pretrained=True, **kwargs)
    except TypeError as error:
        raise ValueError(f"backbone: {name} does not take {kwargs} ({error})") from error
    except Exception as error:
        if not pretrained:
            raise
        told = str(error).removeprefix(f"{weights}: ")
        raise RuntimeError(
            f"{weights} could not be loaded ({told}). Without "
            "a network, give a local file: `pretrained_path` in training, or a model of "
            f"timm.create_model({name!r}, pretrained_cfg_overlay=dict(file=...), pretrained=True)"
        ) from error


def _refuse_before_download(name: str) -> None:
    """Refuse a model whose class no family has; looked at where timm's file of it has none."""
    if timm.model_entrypoint(name).__module__ in {f.kind.__module__ for f in families.FAMILIES}:
        return
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shapes = timm.create_model(name, pretrained=False)
        except Exception:
            return  # it takes more than its name; building it says what
    _refuse_class(shapes)


def _create_transformers(
    name: BackboneName, config: dict[str, Any], *, pretrained: bool = True, **kwargs: Any
) -> Any:
    """The twin of a transformers model in a folder or on the hub."""
    _need("transformers", f"{name.value} is a model of transformers")
    from .twins import transformers as reader

    location, revision = (
        (name.value, None) if name.kind == "folder" else hub.split_revision(name.value)
    )
    with hub.asked(f"backbone: the weights of {name.value!r}"):
        original = reader.load(location, revision, config, pretrained)
    if "processor" not in kwargs:
        kwargs["processor"] = reader.processor_settings(name.value, hub.download)
    twin = _twin(original, **kwargs)
    recorded = name.value if name.kind == "hub" else None
    twin.origin = dataclasses.replace(twin.origin, name=recorded)
    return twin


def _create_open_clip(
    name: BackboneName, source: str, *, pretrained: bool = True, **kwargs: Any
) -> Any:
    """The twin of the image tower of an open_clip model in a folder or on the hub."""
    _need("open_clip", f"{name.value} is a model of open_clip")
    import open_clip

    with hub.asked(f"backbone: the weights of {name.value!r}"):
        original = open_clip.create_model(
            source, load_weights=pretrained, require_pretrained=pretrained
        )
    twin = _twin(original, **kwargs)
    recorded = name.value if name.kind == "hub" else None
    twin.origin = dataclasses.replace(twin.origin, name=recorded)
    return twin


def _twin(original: nn.Module, **kwargs: Any) -> Any:
    if unknown := sorted(set(kwargs) - set(_FOR_TWINS)):
        raise ValueError(
            f"backbone: {', '.join(unknown)}: a model of {twins.library_of(original)} takes "
            f"{' and '.join(_FOR_TWINS)}; settings of its own are for its own library"
        )
    try:
        return twins.make_twin(original, **kwargs)
    except twins.TwinRefused as error:
        raise twins.TwinRefused(f"backbone: {type(original).__name__}: {error}") from error


def _need(package: str, why: str) -> None:
    if importlib.util.find_spec(package) is None:
        extra = {"transformers": "hf", "open_clip": "clip"}[package]
        raise UserError(f"backbone: {why}, which is not installed: pip install 'pgn_fast[{extra}]'")


def _refuse(name: str, defined_in: str) -> None:
    reason = families.refused(defined_in)
    if reason is not None:
        raise ValueError(
            f"backbone: {name} is not supported: {reason}. Use a plain vision transformer, such as "
            "vit_*, deit*_*, eva02_* or beit*_*"
        )


def _refuse_class(backbone: nn.Module) -> None:
    if families.find(backbone) is None:
        raise ValueError(
            f"backbone: {type(backbone).__name__} is not a vision transformer that prompts can "
            f"enter: timm's classes {families.names()} are, such as vit_*, deit*_*, eva02_*, "
            "beit*_*"
        )


def _checked(backbone: Any) -> Any:
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            "backbone takes a vision transformer of timm, transformers, open_clip or torchvision, "
            f"or a name, got {type(backbone).__name__}; e.g. "
            "timm.create_model('vit_base_patch16_224')"
        )
    kind = type(backbone)
    if kind.__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"backbone: {kind.__name__} is PEFT's wrapper around a model; pass "
            "wrapped.merge_and_unload(), which is fast, or wrapped.get_base_model(), with its "
            "layers beside the prompts"
        )
    _refuse(kind.__name__, kind.__module__)
    _refuse_class(backbone)
    beside = sum("lora_" in name for name, _ in backbone.named_parameters())
    if beside:
        warnings.warn(
            f"backbone: its {beside} tensors of LoRA are frozen with it; merge them for speed "
            "(PEFT's merge_and_unload), or switch their requires_grad on after this to train them "
            "beside the prompts",
            stacklevel=3,
        )
    return backbone.requires_grad_(False).eval()
