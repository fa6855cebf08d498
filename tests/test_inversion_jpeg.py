"""JPEG-aware patches (experimental): through the real encoder and decoder."""

from __future__ import annotations

import dataclasses
import io

import pytest
import timm
import torch
from inversion_fixtures import photo_crops, published, synthetic_map
from PIL import Image

import pgn_fast
from pgn_fast.inversion import (
    GamutLibrary,
    InvertedLibrary,
    PatchMap,
    ServerSpec,
    invert_library,
    verify,
)
from pgn_fast.inversion.jpeg import coefficient_basis, quantisation_tables
from pgn_fast.inversion.layout import from_patches, to_patches


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
def test_tables_are_the_encoders(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality, subsampling=0)
    written = Image.open(buffer).quantization  # rows of the 8 x 8 tables
    luminance, chrominance, _ = quantisation_tables(quality).flatten(1).long().tolist()
    assert (written[0], written[1]) == (luminance, chrominance)


def test_a_patch_of_whole_coefficients_passes_unchanged():
    """The basis is the decoder's: what is made of its atoms survives, up to pixel rounding."""
    basis = coefficient_basis(8, 90)
    coefficients = torch.randint(-2, 3, (64, 192), generator=torch.Generator().manual_seed(0))
    coefficients[:, 40:] = 0
    pixels = (128 + coefficients.double() @ basis.T).round()
    keep = ((pixels >= 0) & (pixels <= 255)).all(dim=1)
    pixels = pixels[keep][:16]
    assert len(pixels) == 16
    image = from_patches(pixels[None].to(torch.uint8), (4, 4), 8)[0]
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    decoded = torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8)
    decoded = decoded.view(32, 32, 3).permute(2, 0, 1)[None]
    assert (to_patches(decoded, 8)[0].double() - pixels).abs().max() <= 2


def test_jpeg_aware_rounding_at_b32(tmp_path):
    """Number 10: B/32 rand, quality 95, 4:4:4 (prototype 0.059, against 0.348 of PNG's patches)."""
    png = synthetic_map("B/32", "rand")
    server = dataclasses.replace(png.server, codec="jpeg")
    jpeg = dataclasses.replace(png, server=server)
    tokens, coefficients = published()
    aware = invert_library(tokens, jpeg)
    assert aware.margin == 24
    levels = aware.mix(coefficients[:16])
    wanted = coefficients[:16] @ tokens

    def error(patches: torch.Tensor) -> float:
        canvas = from_patches(patches[None], (4, 4), 32)[0]
        decoded = to_patches(server.preprocess(server.encode(canvas))[None], 32)[0]
        contents = (decoded.double() - 127.5) @ png.A.T
        return png.relative_error(contents, wanted).mean().item()

    patches = aware.to_uint8(levels)
    assert error(patches) <= 0.07
    assert error(png.rounding(levels)) >= 5 * error(patches)

    aware.save(tmp_path / "library.safetensors")
    loaded = InvertedLibrary.load(tmp_path / "library.safetensors", jpeg)
    assert torch.equal(loaded.to_uint8(levels), patches)


def test_a_model_behind_a_jpeg_server():
    """Trained with the margin that JPEG needs; through files, less than half the naive error."""
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False).eval()
    halves = (0.5, 0.5, 0.5)
    png = ServerSpec(resize=160, crop=160, mean=halves, std=halves)
    errors = {}
    for server in (png, dataclasses.replace(png, codec="jpeg")):
        library = GamutLibrary(8, PatchMap.from_backbone(backbone, server))
        with torch.no_grad():
            torch.nn.init.normal_(library.theta, generator=torch.Generator().manual_seed(0))
        assert library.margin == (6 if server is png else 24)
        torch.manual_seed(0)
        model = pgn_fast.PGN(
            backbone,
            num_classes=3,
            library_size=8,
            generator_kwargs={"channels": 4, "groups": 2},
            resolution=32,
            token_library=library,
        )
        prompter = pgn_fast.invert(model)
        images = photo_crops(1, 160)
        assert prompter.encode(images)[0][:2] == (b"\x89P" if server is png else b"\xff\xd8")
        if server is png:  # the same canvas, sent as JPEG
            sent = dataclasses.replace(server, codec="jpeg")
            canvas = prompter(images)[0]
            prompts = to_patches(sent.preprocess(sent.encode(canvas))[None], 16)
            prompts = prompts[0, list(prompter.layout.prompt_cells)]
            wanted = prompter.levels(server.normalise(images))[0].double() - 127.5
            patch_map = prompter.patch_map
            seen = (prompts.double() - 127.5) @ patch_map.A.T
            errors["png"] = patch_map.relative_error(seen, wanted @ patch_map.A.T).mean().item()
        else:
            errors["jpeg"] = verify(prompter, model, images).mean
    assert errors["jpeg"] < 0.5 * errors["png"], errors
