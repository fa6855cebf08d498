"""Which backbone an adapter was trained on: what is recorded of it, and what is compared."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._values import plain
from ..backbone.digest import backbone_digest, known_digest
from ..backbone.load import DEMO_NAME, load_recorded, parse_name
from ..errors import UserError, shown
from ..models.heads import KeptHead
from ..prompts.networks import TIMM

# a backbone that differs in one of these has no place for the adapter's tensors
_SHAPE = ("embed_dim", "depth", "patch_size", "in_chans")
# in these it computes something else with them
_SETTINGS = ("img_size", "global_pool", "num_prefix_tokens", "class_token")
# keyword arguments of timm's models that the backbone itself shows
_SHOWN = ("img_size", "global_pool", "in_chans", "dynamic_img_size", "reg_tokens", "class_token")


def describe(model: Any, *, trained: bool) -> dict[str, Any]:
    """The entries of a configuration that say which backbone a model has.

    Args:
        trained: the backbone is part of what was trained: no digest tells which one it was.
    """
    backbone = model.backbone
    name = backbone_name(backbone)
    kept = isinstance(model.head, KeptHead)
    return {
        "base_model_name_or_path": name,
        "base_model_kwargs": _kwargs(backbone, name),
        "base_model_weights": _own_weights(backbone),
        "backbone_digest": None if trained else backbone_digest(backbone, head=kept),
        **facts(backbone),
    }


def facts(backbone: Any) -> dict[str, Any]:
    """What a backbone is, as plain values."""
    patch_embed = backbone.patch_embed
    size = getattr(patch_embed, "img_size", None)
    return {
        "embed_dim": int(backbone.embed_dim),
        "depth": len(backbone.blocks),
        "patch_size": [int(side) for side in patch_embed.patch_size],
        "in_chans": int(backbone.in_chans),
        "img_size": None if size is None else [int(side) for side in size],
        "global_pool": str(backbone.global_pool),
        "num_prefix_tokens": int(backbone.num_prefix_tokens),
        "class_token": getattr(backbone, "cls_token", None) is not None,
        "dtype": str(next(backbone.parameters()).dtype).removeprefix("torch."),
    }


def backbone_name(backbone: Any) -> str | None:
    """timm's name with its tag, or an id on the hub; None for a model that has neither.

    Weights of the user's own have no tag, whatever the model that they were put into says.
    """
    origin = getattr(backbone, "origin", None)
    if origin is not None:
        return origin.name
    about = getattr(backbone, "pretrained_cfg", None) or {}
    if about.get("source") == "hf-hub":
        return about.get("hf_hub_id")
    if about.get("source") == "local-dir":
        return None
    name, tag = about.get("architecture"), about.get("tag")
    tagged = name and tag and name != DEMO_NAME and _own_weights(backbone) is None
    return f"{name}.{tag}" if tagged else name


def _own_weights(backbone: Any) -> str | None:
    """The file that the backbone's weights came from, where it was one of the user's."""
    created_with = getattr(backbone, "created_with", None) or {}
    about = getattr(backbone, "pretrained_cfg", None) or {}
    file = created_with.get("checkpoint_path") or about.get("file")
    # its name tells its owner which one it was; the path stays private
    return Path(file).name if file else None


def _kwargs(backbone: Any, name: str | None) -> dict[str, Any] | None:
    """The keyword arguments with which timm builds this backbone from its name, as far as they are
    plain settings: those that were given, and those in which it differs from the usual one."""
    found = {}
    for key, value in (getattr(backbone, "created_with", None) or {}).items():
        if key in TIMM:
            value = plain(key, value)
            if TIMM[key].accepts(value):
                found[key] = value
    usual = None if name is None else _usual(name)
    if usual is not None:
        own = _shown(backbone)
        found |= {key: own[key] for key in _SHOWN if own[key] != usual[key]}
    return found or None


def _shown(backbone: Any) -> dict[str, Any]:
    known = facts(backbone)
    return {
        **{name: known[name] for name in ("img_size", "global_pool", "in_chans", "class_token")},
        "dynamic_img_size": bool(getattr(backbone, "dynamic_img_size", False)),
        "reg_tokens": int(getattr(backbone, "num_reg_tokens", 0)),
    }


@functools.lru_cache(maxsize=64)
def _usual(name: str) -> dict[str, Any] | None:
    """What a backbone of that name shows where nothing else is asked for; None: cannot be said."""
    try:
        twin = on_meta_by_name(name)
    except Exception:
        return None  # it takes more than its name to build it
    return None if twin is None else _shown(twin)


def on_meta_by_name(name: str, **kwargs: Any) -> Any:
    """A backbone of timm's registry in which no number is stored: shapes only, without memory or
    network; None for a repository on the hub, which only the hub knows."""
    if parse_name(name, recorded=True).kind == "hub":
        return None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_recorded(name, pretrained=False, **kwargs)


def on_meta(module: nn.Module) -> Any:
    """A copy of a module in which no number is stored."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


def check_shape(config: Mapping[str, Any], backbone: Any) -> None:
    """Refuse a backbone that has no place for the adapter's tensors.

    Raises:
        UserError: names the entry, and both values.
    """
    found = facts(backbone)
    for name in _SHAPE:
        wanted = config.get(name)
        if wanted is not None and wanted != found[name]:
            raise UserError(
                f"this backbone does not fit: its {name} is {found[name]}, the adapter was trained "
                f"on {config.get('base_model_name_or_path') or 'one'} with {name} {wanted}"
            )


def differences(config: Mapping[str, Any], model: Any) -> list[str]:
    """In what a model's backbone differs from the one that its adapter was trained on, in words,
    where the tensors fit and the results are others."""
    backbone = model.backbone
    found, told = facts(backbone), []
    for name in _SETTINGS:
        wanted = config.get(name)
        if name in config and wanted != found[name]:
            told.append(f"its {name} is {shown(found[name])}, not {shown(wanted)}")
    digest = config.get("backbone_digest")
    if digest is None:
        trained_on, given = config.get("base_model_name_or_path"), backbone_name(backbone)
        if trained_on and given and trained_on != given:
            told.append(f"it is {given}, not {trained_on}, and hardly has the same weights")
    elif config.get("dtype", found["dtype"]) != found["dtype"]:
        told.append(
            f"its weights are {found['dtype']}, not {shown(config['dtype'])}, so that they cannot "
            "be compared"
        )
    else:
        own = known_digest(backbone, isinstance(model.head, KeptHead))
        if own != digest:
            told.append(
                f"its weights ({backbone_name(backbone) or 'of no known name'}, digest "
                f"{own[:12]}) are others than those of the training "
                f"({config.get('base_model_name_or_path') or 'of no known name'}, digest "
                f"{digest[:12]})"
            )
    return told
