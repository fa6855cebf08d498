"""The model that a configuration asks for: what is trained, in front of which backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..backbone.load import DEMO_NAME, load_backbone
from ..backbone.readout import rows_read
from ..errors import UserError, as_user_error
from ..inversion import CanvasLayout, GamutLibrary, PatchMap, ServerSpec
from ..methods import find_method
from .config import TrainConfig


def load_backbone_for(config: TrainConfig) -> Any:
    """The backbone that the configuration names, frozen.

    Raises:
        UserError: no such model, no vision transformer, or no way to its weights; or it does not
            take the larger images of ``layout="enlarged"``.
    """
    kwargs = dict(config.model_kwargs)
    if config.layout == "enlarged":
        kwargs = any_size(config.model, kwargs)
    if config.pretrained_path is not None:
        kwargs |= weights_file(config.model, config.pretrained_path)
    with as_user_error(TypeError, RuntimeError):
        return load_backbone(config.model, **kwargs)


def weights_file(model: str, path: str) -> dict[str, Any]:
    """timm's keywords for a backbone whose pretrained weights are in a local file.

    timm reads it as it would the hub's: position embeddings are resampled to the image size.

    Raises:
        UserError: no such file, or a backbone that has its weights in the package.
    """
    if not Path(path).is_file():
        raise UserError(f"`pretrained_path`: there is no file {path}.")
    if model == DEMO_NAME:
        raise UserError(f"`pretrained_path`: {model} has its weights inside; name another `model`.")
    # older timm reads every file of these models as NumPy's, whatever it is
    overlay = {"file": str(path), "custom_load": Path(path).suffix == ".npz"}
    return {"pretrained_cfg_overlay": overlay}


def any_size(model: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """timm's keywords for a backbone that takes images of any size.

    Raises:
        UserError: this one does not.
    """
    if model == DEMO_NAME or kwargs.get("dynamic_img_size") is False:
        raise UserError(
            f"`layout` enlarged needs a backbone that takes images of any size, and {model} here "
            "has one size. Use `layout` border, or a timm model, which is then created with "
            "dynamic_img_size=True."
        )
    return {**kwargs, "dynamic_img_size": True}


def deployment_library(
    config: TrainConfig, backbone: Any, pixels: Mapping[str, Any]
) -> GamutLibrary | None:
    """The token library of a PGN that is deployed as pixels; None where it is not.

    Args:
        backbone: from ``load_backbone``.
        pixels: the preprocessing of the training images, by timm's names.

    Raises:
        UserError: no room for the prompts, no such patch embedding, a server that the canvas does
            not survive, a pool over the patches of an enlarged canvas, or a normalization that is
            not the server's.
    """
    if config.deploy is None:
        return None
    with as_user_error():
        server = ServerSpec.from_backbone(backbone, **config.server)
        for name in ("mean", "std"):
            given, own = tuple(pixels[name]), getattr(server, name)
            if given != own:
                raise UserError(
                    f"`{name}` {' '.join(map(str, given))}: with `deploy` rgb images are "
                    f"normalized as the server does, by {' '.join(map(str, own))}. Leave it out."
                )
        rows, columns = backbone.patch_embed.grid_size
        layout = CanvasLayout.named(
            config.layout,
            (int(rows), int(columns)),
            config.num_prompts,
            image_grid=config.image_grid,
            canvas_grid=config.canvas_grid,
            compensate=config.compensate,
            allow_blank=config.allow_blank,
        )
        if layout.compensate_positions and rows_read(backbone) is None:
            raise UserError(
                f"`layout` enlarged: {config.model} pools over the patches, and a server pools the "
                "prompts too, which this training would not. Use `layout` border or "
                "`compensate=False`."
            )
        patch_map = PatchMap.from_backbone(backbone, server, layout)
        return GamutLibrary(config.library_size, patch_map)


def build_model(
    config: TrainConfig,
    backbone: Any,
    num_classes: int,
    *,
    token_library: nn.Module | None = None,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model of ``config.method``, freshly initialized from torch's generator.

    Args:
        backbone: from ``load_backbone``; "full" trains it.
        token_library: a module that yields PGN's library (K, D); None: a plain parameter.
        head: arguments of the constructor that make its head; None: a new linear layer.

    Raises:
        UserError: values that the model refuses, or a named backend that cannot run here.
    """
    with as_user_error(TypeError, RuntimeError):
        row = find_method(config.method)
        values = {name: getattr(config, option) for name, option in row.options.items()}
        if "resolution" in values and values["resolution"] is None:
            values["resolution"] = min(backbone.patch_embed.img_size or (224, 224))
        known = row.parameters()
        values |= {name: getattr(config, name) for name in ("backend", "fast") if name in known}
        if token_library is not None:
            values["token_library"] = token_library
        if head and "head" not in known:
            raise UserError(
                f"`head` {head['head']} has nothing to train with `method` {row.name}: use a "
                "method with prompts, such as pgn or vpt-deep."
            )
        return row.build(backbone, num_classes, **values | dict(head or {}) | config.method_kwargs)
