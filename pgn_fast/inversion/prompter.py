"""Images to 8-bit canvases that an untouched backbone turns into the prompted result."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import mix_prompts
from .compensation import PositionCompensation
from .errors import InversionError, LayoutError
from .layout import CanvasLayout, image_patches, to_patches
from .library import InvertedLibrary
from .patch_map import PatchMap
from .report import InversionReport, measure
from .server_spec import ServerSpec


class RgbPrompter(nn.Module):
    """Makes the canvases of an adapted model; needs nothing of the backbone but the inversion.

    Args:
        pgn: what chooses the prompts: a PGN, its ``PromptGenerator``, or None for prompts that are
            the same for every image (VPT-Shallow: the library's tokens, one a prompt cell). A
            snapshot of it is kept, as the inverted library is one.
        inverted: the library as patches.
        layout, server: only to check that they are those of the inversion.
        patch_map: of the backbone; needed for compensated positions and for reports.

    Raises:
        LayoutError: layout, server or number of prompts are not those of the inversion.
        InversionError: the generator mixes by sigmoid and the inversion's scale is fixed.
    """

    def __init__(
        self,
        pgn: Any,
        inverted: InvertedLibrary,
        layout: CanvasLayout | None = None,
        server: ServerSpec | None = None,
        *,
        patch_map: PatchMap | None = None,
    ) -> None:
        super().__init__()
        if layout is not None and layout != inverted.layout:
            raise LayoutError(
                f"the library was inverted for {inverted.layout.describe()} but is deployed on "
                f"{layout.describe()}. Invert it for that."
            )
        if server is not None and server != inverted.server:
            raise LayoutError(
                "the library was inverted for a server with "
                f"{inverted.server.differences(server)} but is deployed on one with "
                f"{server.differences(inverted.server)}. Invert it for that."
            )
        generator = getattr(pgn, "prompter", pgn)
        prompts = inverted.patches.shape[0] if generator is None else generator.num_prompts
        if prompts != inverted.layout.num_prompts:
            raise LayoutError(
                f"the model has {prompts} prompts, the layout has cells for "
                f"{inverted.layout.num_prompts}"
            )
        if generator is not None:
            if generator.activation != "softmax" and inverted.scale == "fixed":
                raise InversionError(
                    f"{generator.activation} coefficients do not sum to 1; pixel mixing is only "
                    'gamut-safe for softmax. Use softmax, scale="auto" on a backbone with a norm '
                    "before block 1, or post-mix clipping."
                )
            generator = copy.deepcopy(generator).eval().requires_grad_(False)
            inverted = inverted.to(next(generator.parameters()).device)
        self.generator: Any = generator
        self.inverted = inverted
        self.patch_map = patch_map
        self._compensate = None
        if inverted.layout.compensate_positions:
            if patch_map is None:
                raise ValueError(
                    "compensated positions need patch_map: PatchMap.from_backbone(backbone, "
                    "server, layout)"
                )
            self._compensate = PositionCompensation(patch_map)

    @property
    def layout(self) -> CanvasLayout:
        return self.inverted.layout

    @property
    def server(self) -> ServerSpec:
        return self.inverted.server

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images to the canvases that the server is sent.

        Args:
            images: (B, 3, H, W) of the model's own image size; floating point: normalized, as the
                model takes them; uint8: the same images before normalization.

        Returns:
            uint8 (B, 3, H', W'), padded so that the server's resize and crop leave them as they
            are.
        """
        normalized, levels = self._inputs(images)
        patch_size = self.inverted.patch_size
        shown = image_patches(levels, self.layout, patch_size, gray_rim=self.server.gray_only)
        if self._compensate is not None:
            shown = self._compensate(shown)
        prompt_patches = self.inverted.to_uint8(self.levels(normalized))
        canvases = self.layout.compose(
            shown.to(torch.uint8), prompt_patches.to(images.device), patch_size
        )
        return self.server.pad(canvases)

    def encode(self, images: Tensor) -> list[bytes]:
        """Images, as for a call, to one file each in the server's codec: PNG or JPEG bytes."""
        return [self.server.encode(canvas) for canvas in self(images)]

    @torch.no_grad()
    def levels(self, normalized: Tensor) -> Tensor:
        """The prompts' patches before rounding, (B, P, n) float levels."""
        return self.inverted.place(self._offsets(normalized))

    def _offsets(self, normalized: Tensor) -> Tensor:
        """The mixed patches as offsets from the baseline, (B, P, n)."""
        if self.generator is None:
            return self.inverted.patches.expand(len(normalized), -1, -1)
        own = next(self.generator.parameters())
        logits = self.generator.mixture_logits(normalized.to(own.device, own.dtype)).float()
        # pixel mixing is token mixing with 3 p^2 values a token
        return mix_prompts(logits, self.inverted.patches, self.generator.activation)

    def _inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images and their levels, both float32."""
        size = self.inverted.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
            raise ValueError(
                f"images must be (B, 3, {size[0]}, {size[1]}), resized and cropped as for the "
                f"model, got {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            return self.server.normalize(images), images.float()
        if not images.is_floating_point():
            raise ValueError(f"images must be uint8 or normalized floats, got {images.dtype}")
        return images.float(), self.server.levels(images)

    @cached_property
    def report(self) -> InversionReport:
        """The library itself as prompts of the first cell, through 8 bits. ``verify`` measures the
        prompts of images, through the server's own code."""
        patch_map = self._map()
        inverted = self.inverted
        patches = inverted.patches.cpu()
        offsets = patches[:, None]  # every token once, in the first prompt's cell
        exposure = inverted.exposure(offsets.to(inverted.baseline.device))[:, 0, 0].cpu()
        baseline = inverted.baseline[:1].cpu()
        levels = baseline + exposure[:, None] * patches
        rounded = inverted.rounding(levels)
        wanted = patches.double() @ patch_map.A.T  # contents, exact up to the solver's residual
        positions = None
        if inverted.prompt_pos == "none":
            cell = self.layout.prompt_cells[0]
            positions = patch_map.positions[cell].expand(len(patches), -1)
            if inverted.scale == "fixed":
                wanted = wanted + patch_map.constant
        return measure(
            patch_map,
            "library",
            wanted=wanted,
            levels=levels,
            rounded_tokens=patch_map.tokens(rounded),
            rounded=rounded,
            scale=exposure,
            positions=positions,
            round_err=inverted.rounding.token_error,
        )

    def _map(self) -> PatchMap:
        if self.patch_map is None:
            raise ValueError(
                "reports need the backbone's patch map: RgbPrompter(..., patch_map=PatchMap."
                "from_backbone(backbone, server, layout))"
            )
        return self.patch_map


def verify(prompter: RgbPrompter, model: Any, images: Tensor) -> InversionReport:
    """Send images through the real path and compare the server's tokens with the wanted ones.

    Canvas, file, the server's decode, resize and crop, normalization, the backbone's own patch
    embedding. With a PromptedViT whose latent path has the same tokens, its features too.

    Args:
        prompter: with a patch map.
        model: the backbone, or the PromptedViT that was inverted.
        images: as for the prompter.

    Raises:
        InversionError: the preprocessing changed the prompts' pixels, or the model is not the one
            that was inverted.
        LayoutError: the model is for another layout.
    """
    was_training = model.training
    model.eval()  # prompts without dropout, as they are deployed
    try:
        with torch.no_grad():
            return _verify(prompter, model, images)
    finally:
        model.train(was_training)


def _verify(prompter: RgbPrompter, model: Any, images: Tensor) -> InversionReport:
    backbone = getattr(model, "backbone", model)
    server, inverted, layout = prompter.server, prompter.inverted, prompter.layout
    patch_map = PatchMap.from_backbone(backbone, server, layout)
    inverted.check(patch_map)
    normalized, _ = prompter._inputs(images)
    canvases = prompter(images)
    cells, p = list(layout.prompt_cells), inverted.patch_size
    seen = torch.stack([server.preprocess(server.encode(canvas)) for canvas in canvases])
    rounded = inverted.to_uint8(prompter.levels(normalized)).cpu()
    if tuple(seen.shape[-2:]) != (layout.grid[0] * p, layout.grid[1] * p):
        raise InversionError(
            f"the server makes images of {seen.shape[-2]}x{seen.shape[-1]} pixels of a canvas of "
            f"{layout.grid[0] * p}x{layout.grid[1] * p}; correct the ServerSpec."
        )
    patches = to_patches(seen, p)[:, cells]
    if server.codec == "png" and not torch.equal(patches, rounded):
        changed = (patches != rounded).double().mean().item()
        raise InversionError(
            f"the server's Resize({server.resize})+CenterCrop({server.crop}) changed {changed:.0%} "
            f"of the prompt pixels; send the {server.resize}x{server.resize} padded canvas."
        )
    weight = backbone.patch_embed.proj.weight
    inputs = server.normalize(seen).to(weight.device, weight.dtype)
    tokens = backbone.patch_embed(inputs).cpu()
    tokens = tokens.reshape(len(images), -1, tokens.shape[-1])[:, cells]  # dynamic sizes keep 2-D

    offsets = prompter._offsets(normalized)
    R = len(images) * len(cells)
    positions = None
    if inverted.prompt_pos == "none":
        positions = patch_map.positions[cells].repeat(len(images), 1)
    wanted = _latent_prompts(prompter, model, normalized)
    if wanted is None:  # a bare backbone: the tokens of the exact patches are what was wanted
        wanted = offsets.double().cpu() @ patch_map.A.T
        if inverted.prompt_pos == "none" and inverted.scale == "fixed":
            wanted = wanted + patch_map.constant
    return measure(
        patch_map,
        "canvases",
        wanted=wanted.double().cpu().reshape(R, -1),
        levels=prompter.levels(normalized).cpu().reshape(R, -1),
        rounded_tokens=tokens.reshape(R, -1),
        rounded=rounded.reshape(R, -1),
        scale=inverted.exposure(offsets).cpu().reshape(R),
        positions=positions,
        round_err=inverted.rounding.token_error,
        output_rel_err=_output_errors(model, backbone, layout, normalized, inputs),
    )


def _latent_prompts(prompter: RgbPrompter, model: Any, normalized: Tensor) -> Tensor | None:
    """The prompts (B, P, D) that the latent path would use: contents, or whole tokens."""
    if not hasattr(model, "prompts"):
        return None
    if prompter.generator is None:
        return model.prompts(normalized)
    own = next(prompter.generator.parameters())
    return prompter.generator(normalized.to(own.device, own.dtype))


def _output_errors(
    model: Any, backbone: Any, layout: CanvasLayout, normalized: Tensor, inputs: Tensor
) -> list[float]:
    """Relative error of the pooled features, one an image, where the latent path is comparable."""
    trained_on_canvas = hasattr(
        getattr(getattr(model, "prompter", None), "token_library", None), "place"
    )
    same_tokens = layout.compensate_positions and not layout.blank_cells
    if not hasattr(model, "prompts") or not (trained_on_canvas or same_tokens):
        return []
    latent = model.forward_features(normalized.to(inputs))
    wanted = backbone.forward_head(latent, pre_logits=True)
    served = backbone.forward_head(backbone.forward_features(inputs), pre_logits=True)
    return ((served - wanted).norm(dim=1) / wanted.norm(dim=1)).tolist()
