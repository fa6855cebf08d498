"""Loading adapters that anybody may have written: names and shapes first, then memory, then code of
this package alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .._stored import check_numbers, check_shapes
from ..backbone.load import load_backbone, load_recorded
from ..backbone.options import FastOptions
from ..errors import UserError, brief, shown
from ..inversion.gamut import GamutLibrary
from ..methods import METHODS
from .files import OpenAdapter
from .identity import check_shape, differences, on_meta, on_meta_by_name
from .save import given_buffers
from .schema import GIVEN, MODULES, PREPROCESSING, check_config, split_unknown

OWN_BACKBONE = "a fine-tuned model has a backbone of its own, which no other task can share"


def from_pretrained(
    directory: str | PathLike[str],
    backbone: str | nn.Module | None = None,
    *,
    trainable: bool = False,
    strict_backbone: bool = False,
    fast: bool | str | Mapping[str, Any] | FastOptions | None = None,
    **modules: nn.Module,
) -> Any:
    """Load an adapter in front of its frozen backbone.

    Nothing in the directory is run, and it names no file and no address that is opened: what is
    fetched at most are the public weights of the backbone that it names, where none is given.

    Args:
        directory: what ``save_pretrained`` wrote.
        backbone: a vision transformer or its name; None: the one that the adapter names, with its
            pretrained weights, built with the settings of the training.
        trainable: False: frozen and in eval mode, for inference. True: in training mode, prompter
            and head with gradients, to go on training.
        strict_backbone: refuse a backbone with other weights or settings than that of the training,
            instead of a warning.
        fast: the savings, as for ``pgn_fast.PGN``; {"weights": "int8"} serves in int8 what was
            trained in float. None: as the adapter was trained.
        **modules: ``head``, ``generator`` or ``token_library``, where the adapter was trained with
            a module of your own, which no configuration can rebuild.

    Returns:
        The ``PGN``, ``VPT``, ``LinearProbe`` or ``FineTuned`` that was saved, with
        ``class_names``, ``preprocessing`` and ``task`` ("multiclass"; "multilabel": probabilities
        are sigmoids of the logits) as attributes.

    Raises:
        UserError: (a ValueError) no adapter there; damaged, truncated, or a pickle; entries that
            are not what they must be; or the backbone does not fit: both values are named.

    Unknown entries of the configuration are ignored with a warning.
    """
    model = _load(directory, backbone, modules, strict_backbone, fast, shared=False)
    return model.train() if trainable else model.requires_grad_(False).eval()


def load_on(
    backbone: nn.Module, directory: str | PathLike[str], *, strict_backbone: bool = False
) -> Any:
    """As ``from_pretrained`` for inference, on a backbone that other models use, too.

    Raises:
        UserError: as there; also for a fine-tuned model, which would write its own weights into
            the backbone of the others.
    """
    model = _load(directory, backbone, {}, strict_backbone, None, shared=True)
    return model.requires_grad_(False).eval()


def _load(
    directory: str | PathLike[str],
    backbone: str | nn.Module | None,
    modules: Mapping[str, nn.Module],
    strict_backbone: bool,
    fast: bool | str | Mapping[str, Any] | FastOptions | None,
    *,
    shared: bool,
) -> Any:
    try:
        with OpenAdapter(directory) as adapter:
            config = _known_entries(adapter.config)
            if fast is not None:
                if "fast" not in METHODS[config["method"]].parameters():
                    raise UserError(f"fast={fast!r}: a {config['method']} adapter takes no savings")
                config["fast"] = fast
            if shared and METHODS[config["method"]].trains_backbone:
                raise UserError(OWN_BACKBONE)
            given = None if backbone is None else load_backbone(backbone)
            # before the numbers are read, and before the backbone's are fetched
            twin = _without_numbers(config, given)
            if twin is None:
                given = _recorded_backbone(config)
                twin = on_meta(given)
            check_shape(config, twin)
            _check_fit(config, adapter.header.entries, twin, modules)
            tensors = adapter.tensors()
        return _build(config, tensors, given, modules, strict_backbone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = os.fspath(directory)
        text = brief(error, 900) or type(error).__name__
        raise UserError(text if where in text else f"{where}: {text}") from error


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: nn.Module,
    *,
    strict_backbone: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
) -> Any:
    """The model of an adapter that was read by ``read_adapter``, on a backbone that is there.

    The tensors are copied. The model is frozen and in eval mode; for ``strict_backbone`` and
    ``modules`` see ``from_pretrained``.

    Raises:
        UserError: an entry of the configuration is not what it must be, the backbone does not fit,
            or the tensors do not.
    """
    try:
        check_config(config, "adapter")
        known = _known_entries(config)
        twin = on_meta(backbone)
        check_shape(known, twin)
        _check_fit(known, tensors, twin, modules or {})
        model = _build(known, tensors, backbone, modules or {}, strict_backbone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(brief(error, 900) or type(error).__name__) from error
    return model.requires_grad_(False).eval()


def _known_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what only another version knows, which is told."""
    row = METHODS[config["method"]]
    found, unknown = split_unknown(config, {*row.parameters(), *row.fixed})
    pixels = found.get("preprocessing")
    if pixels is not None:
        found["preprocessing"] = {n: v for n, v in pixels.items() if n in PREPROCESSING}
        unknown += [f"preprocessing: {n}" for n in pixels if n not in PREPROCESSING]
    if unknown:
        told = ", ".join(brief(name, 60) for name in sorted(unknown)[:8])
        warnings.warn(f"unknown entries are ignored: {told}.", stacklevel=5)
    return found


def _without_numbers(config: Mapping[str, Any], given: nn.Module | None) -> Any:
    """The backbone, given or named, as shapes only; None where that takes the hub."""
    if given is not None:
        return on_meta(given)
    name = config.get("base_model_name_or_path")
    if name is None:
        raise UserError(
            "the adapter does not name its backbone; pass from_pretrained(..., backbone=...)"
        )
    if weights := config.get("base_model_weights"):
        raise UserError(
            f"the adapter was trained on a {name} with weights of its owner ({shown(weights)}), "
            "which it does not hold. Build that backbone yourself, such as "
            f"timm.create_model({name.split('.')[0]!r}, checkpoint_path=...), and pass it as "
            "backbone"
        )
    if os.path.exists(name):
        raise UserError(
            f"its backbone is named {shown(name)}, which is a file or folder here; build the "
            "backbone yourself and pass it as backbone"
        )
    return on_meta_by_name(name, **(config.get("base_model_kwargs") or {}))


def _recorded_backbone(config: Mapping[str, Any]) -> Any:
    # of a backbone that was trained as a whole the adapter holds all weights
    return load_recorded(
        config["base_model_name_or_path"],
        pretrained=not METHODS[config["method"]].trains_backbone,
        **(config.get("base_model_kwargs") or {}),
    )


def _check_fit(
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    twin: Any,
    modules: Mapping[str, nn.Module],
) -> None:
    """Hold the tensors' names, shapes and dtypes against those of the model, built without memory.

    Args:
        found: tensors, or what a header says about them.
        twin: the backbone on the device "meta".
    """
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise UserError(
                f"from_pretrained takes modules of your own by name, got {brief(name, 60)}="
                f"{brief(module, 60)}."
            )
    library = config.get("token_library")
    stand_ins = {name: on_meta(module) for name, module in modules.items()}
    if isinstance(library, Mapping):
        stand_ins["token_library"] = _LibraryShape(library["n_tokens"], twin.embed_dim)
    values = _arguments(config, stand_ins)
    if "fast" in values:
        values["fast"] = False
    if values.get("head") == "zero_shot":
        embeddings = found.get("head.class_embeddings")
        shape = () if embeddings is None else tuple(embeddings.shape)
        values["class_embeddings"] = torch.empty(shape, device="meta")
    with torch.device("meta"):
        shapes: Any = METHODS[config["method"]].build(twin, **values)
    check_shapes(shapes.adapter_state_dict(), found)


class _LibraryShape(nn.Module):
    """Stands for a ``GamutLibrary`` where shapes are all that matters."""

    def __init__(self, n_tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(n_tokens, embed_dim, device="meta"))

    def forward(self) -> Tensor:
        return self.theta


def _build(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: Any,
    modules: Mapping[str, nn.Module],
    strict_backbone: bool,
) -> Any:
    row = METHODS[config["method"]]
    values = _arguments(config, modules)
    if backbone is None:
        backbone = _recorded_backbone(config)
    if values.get("head") == "zero_shot":
        values["class_embeddings"] = tensors["head.class_embeddings"]
    if isinstance(values.get("token_library"), Mapping):
        values["token_library"] = GamutLibrary.from_config(backbone, values["token_library"])
    model: Any = row.build(backbone, **values)
    check_numbers(tensors, given_buffers(model))
    model.load_adapter_state_dict(tensors)
    if not row.trains_backbone and (told := differences(config, model)):
        text = f"the backbone is not the one of the training: {'; '.join(told)}"
        if strict_backbone:
            raise UserError(text)
        warnings.warn(f"{text}. Results will differ.", stacklevel=4)
    model.class_names = config.get("class_names")
    model.preprocessing = config.get("preprocessing")
    model.task = config.get("task", "multiclass")
    return model


def _arguments(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The constructor's arguments: the configuration's, and modules that the caller brings."""
    known = METHODS[config["method"]].parameters()
    takes = sorted(known.keys() & set(MODULES))
    if wrong := sorted(set(modules) - set(takes)):
        raise UserError(
            f"from_pretrained: {', '.join(wrong)} cannot be given; modules that a "
            f"{config['method']} adapter takes: {', '.join(takes) or 'none'}."
        )
    values = {name: config[name] for name in known if name in config} | dict(modules)
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(GIVEN):
            raise UserError(
                f"{name} was a {brief(value.removeprefix(GIVEN), 200)}, which only your code can "
                f"rebuild: pass from_pretrained(..., {name}=...)."
            )
    return values
