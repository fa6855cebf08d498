"""The short way in: a trained model to its RgbPrompter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backbone.readout import rows_read
from .errors import InversionError, LayoutError
from .find_patches import invert_library
from .gamut import GamutLibrary
from .layout import CanvasLayout
from .patch_map import PatchMap
from .prompter import RgbPrompter
from .server_spec import ServerSpec


def invert(
    model: Any,
    server: ServerSpec | None = None,
    layout: CanvasLayout | None = None,
    **settings: Any,
) -> RgbPrompter:
    """Turn a trained PGN or VPT-Shallow into pixels for an image API that runs its backbone.

    A PGN that was trained with a ``GamutLibrary`` is deployed in the layout of that library. One
    that was trained in latent space gets a larger canvas with compensated positions, on a backbone
    that takes images of any size: the same token sequence, if its library is in reach.

    Args:
        model: a ``PGN`` or ``VPT`` of this package.
        server: the API's preprocessing; None: the GamutLibrary's, else the backbone's own.
        layout: None as above. Another layout than that of training is a change of the model.
        **settings: ``scale``, ``margin``, ``tol``, ``iters``, ``on_unreachable`` of
            ``invert_library``. ``scale`` is "auto" unless given where a latent library meets a
            backbone with free scale (CLIP).

    Raises:
        InversionError: VPT-Deep and other prompts that no image carries; mixing does not allow it.
        UnreachablePromptError: see ``invert_library``.
        LayoutError: layout or pooling do not allow it.
    """
    _check_prompts(model)
    library = getattr(model.prompter, "token_library", None)
    if isinstance(library, GamutLibrary):
        layout = layout or library.patch_map.layout
    if rows_read(model.backbone) is None and (
        layout is None or layout.compensate_positions or not isinstance(library, GamutLibrary)
    ):
        raise LayoutError(
            f"this backbone pools over the patches ({model.backbone.global_pool!r}); a server "
            "pools the prompt cells too, which this model's training did not. Train with a "
            "GamutLibrary in a border layout."
        )
    if isinstance(library, GamutLibrary):
        trained = library.patch_map
        if layout is not None and layout != trained.layout:
            raise LayoutError(
                f"library was trained for {trained.layout.describe()} (prompt_pos=canvas) but is "
                f"deployed on {layout.describe()}. Leave the layout out, or train in the other."
            )
        if server is not None and server != trained.server:
            raise LayoutError(
                f"library was trained for a server with {trained.server.differences(server)} but "
                f"is deployed on one with {server.differences(trained.server)}. Leave the server "
                "out, or train for the other."
            )
        patch_map = PatchMap.from_backbone(model.backbone, trained.server, trained.layout)
        inverted = invert_library(library, patch_map, prompt_pos="canvas", **settings)
        return RgbPrompter(model, inverted, patch_map=patch_map)

    if layout is None:
        layout = _enlarged_layout(model)
    patch_map = PatchMap.from_backbone(model.backbone, server, layout)
    settings.setdefault("scale", "auto" if patch_map.scale_free else "fixed")
    generator, tokens = _tokens(model)
    if getattr(generator, "activation", "softmax") != "softmax" and settings["scale"] == "fixed":
        raise InversionError(
            f"{model.prompter.activation} coefficients do not sum to 1; pixel mixing is only "
            'gamut-safe for softmax. Use softmax, scale="auto" on a backbone with a norm before '
            "block 1, or post-mix clipping."
        )
    inverted = invert_library(tokens, patch_map, prompt_pos="none", **settings)
    return RgbPrompter(generator, inverted, patch_map=patch_map)


def _tokens(model: Any) -> tuple[nn.Module | None, Tensor]:
    """The generator and its library, or None and the prompts that are the same for all images."""
    if hasattr(model.prompter, "mixture_logits"):
        return model.prompter, model.prompter.library()
    training = model.prompter.training
    prompts = model.prompter.eval()(1)[0]  # without prompt dropout
    model.prompter.train(training)
    return None, prompts


def _enlarged_layout(model: Any) -> CanvasLayout:
    """The canvas that keeps the token sequence of latent training."""
    rows, columns = model.backbone.patch_embed.grid_size
    layout = CanvasLayout.enlarged(None, (int(rows), int(columns)), model.num_prompts)
    if not getattr(model.backbone, "dynamic_img_size", False):
        raise LayoutError(
            f"a model trained in latent space needs a canvas of {layout.grid[0]}x{layout.grid[1]} "
            f"patches, the backbone takes {rows}x{columns} only. Create it with "
            "dynamic_img_size=True, train with GamutLibrary in a layout of the backbone's own "
            "size, or pass layout=CanvasLayout.border(...) and accept that the sequence changes."
        )
    return layout


def _check_prompts(model: Any) -> None:
    """Refuse prompts that do not enter as tokens at the input, with the reason."""
    prompter = getattr(model, "prompter", None)
    if prompter is None or not hasattr(model, "backbone"):
        raise TypeError(
            f"invert takes a PGN or VPT of this package, got {type(model).__name__}; for bare "
            "prompt tokens use invert_library"
        )
    if hasattr(prompter, "mixture_logits"):
        return

    def refuse(reason: str) -> InversionError:
        return InversionError(
            f"{type(model).__name__} cannot be inverted: {reason}. Use PGN, or VPT(..., "
            'deep=False, location="prepend").'
        )

    location = model.adapter_config["location"]
    if location != "prepend":
        raise refuse(f"location={location!r} adds no prompt tokens to the input sequence")
    layers = tuple(prompter.layers)
    if layers != (0,):
        raise refuse(
            f"prompts enter blocks {layers[0]} to {layers[-1]}, inside the network, where no image "
            "reaches (VPT-Deep)"
        )
    if not model.adapter_config["expand"]:
        raise refuse("expand=False removes the prompts after block 0; a server keeps its patches")
    if model.pool != "original":
        raise refuse(f"pool={model.pool!r} is not the pooling of the server's own model")
