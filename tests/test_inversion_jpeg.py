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
    CanvasLayout,
    CodecError,
    GamutLibrary,
    InvertedLibrary,
    PatchMap,
    ServerSpec,
    invert_library,
    verify,
)
from pgn_fast.inversion.compensation import PositionCompensation
from pgn_fast.inversion.jpeg import coefficient_basis, quantization_tables
from pgn_fast.inversion.layout import from_patches, image_patches, to_patches


def behind(patch_map: PatchMap, subsampling: int) -> PatchMap:
    """The same backbone behind a server that is sent JPEG files."""
    server = dataclasses.replace(patch_map.server, codec="jpeg", subsampling=subsampling)
    return dataclasses.replace(patch_map, server=server)


def predicted(patch_map: PatchMap, wanted: torch.Tensor) -> float:
    """The mean relative token error that rounding should cost; the encoder's own arithmetic and
    coefficients that it flips come on top."""
    return (patch_map.rounding.token_error / patch_map.center(wanted).norm(dim=1)).mean().item()


def through(server: ServerSpec, cells: torch.Tensor, grid: tuple[int, int], p: int):
    """Patches (cells, n) as the server has them: encoded, decoded, cut again."""
    canvas = from_patches(cells[None], grid, p)[0]
    return to_patches(server.preprocess(server.encode(canvas))[None], p)[0]


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
def test_tables_are_the_encoders(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality, subsampling=0)
    written = Image.open(buffer).quantization  # rows of the 8 x 8 tables
    luminance, chrominance, _ = quantization_tables(quality).flatten(1).long().tolist()
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
    jpeg = behind(png, subsampling=0)
    tokens, coefficients = published()
    aware = invert_library(tokens, jpeg)
    assert aware.margin == 24
    levels = aware.mix(coefficients[:16])
    wanted = coefficients[:16] @ tokens

    def error(patches: torch.Tensor) -> float:
        decoded = through(jpeg.server, patches, (4, 4), 32)
        contents = (decoded.double() - 127.5) @ png.A.T
        return png.relative_error(contents, wanted).mean().item()

    patches = aware.to_uint8(levels)
    assert error(patches) <= 0.07
    assert error(patches) == pytest.approx(predicted(jpeg, wanted), rel=0.05)
    assert error(png.rounding(levels)) >= 5 * error(patches)

    aware.save(tmp_path / "library.safetensors")
    loaded = InvertedLibrary.load(tmp_path / "library.safetensors", jpeg)
    assert torch.equal(loaded.to_uint8(levels), patches)


def test_gray_patches_at_b32(tmp_path):
    """B/32 rand, quality 95, the published PGN's 128 prompts (prototype 0.061): what carries them
    is gray, so the file says the same at 4:4:4, 4:2:2 and 4:2:0."""
    png = synthetic_map("B/32", "rand")
    jpeg = behind(png, subsampling=2)
    tokens, coefficients = published()
    wanted = coefficients @ tokens
    # twice the levels of color patches: three of these prompts do not quite fit the margin
    aware = invert_library(wanted, jpeg, on_unreachable="project")
    assert aware.margin == 24 and (aware.reach_err > 1e-3).sum() <= 3
    levels = 127.5 + aware.patches
    patches = aware.to_uint8(levels)
    assert (patches.view(128, 3, -1) == patches.view(128, 3, -1)[:, :1]).all()

    def decoded(patches: torch.Tensor, subsampling: int) -> torch.Tensor:
        return through(behind(png, subsampling).server, patches, (8, 16), 32)

    def error(decoded: torch.Tensor) -> float:
        return png.relative_error((decoded.double() - 127.5) @ png.A.T, wanted).mean().item()

    sent = {subsampling: decoded(patches, subsampling) for subsampling in (0, 1, 2)}
    assert torch.equal(sent[0], sent[2]) and torch.equal(sent[1], sent[2])
    assert error(sent[2]) <= 0.07
    assert error(sent[2]) == pytest.approx(predicted(jpeg, wanted), rel=0.05)
    assert error(decoded(levels.round().to(torch.uint8), 2)) >= 2.5 * error(sent[2])

    aware.save(tmp_path / "library.safetensors")
    loaded = InvertedLibrary.load(tmp_path / "library.safetensors", jpeg)
    assert torch.equal(loaded.to_uint8(levels), patches)

    # beside a colored image: the decoder's interpolated colors do not reach the prompts
    layout = CanvasLayout.border()
    mine = list(layout.prompt_cells)

    def error_beside_photo(*, gray_rim: bool, subsampling: int) -> float:
        shown = image_patches(photo_crops(2)[1:], layout, 32, gray_rim=gray_rim).to(torch.uint8)
        cells = to_patches(layout.compose(shown, patches[None, :16], 32), 32)[0]
        seen = through(behind(png, subsampling).server, cells, (7, 7), 32)[mine]
        contents = (seen.double() - 127.5) @ png.A.T
        return png.relative_error(contents, wanted[:16]).mean().item()

    alone = error_beside_photo(gray_rim=False, subsampling=0)
    assert error_beside_photo(gray_rim=False, subsampling=2) > 1.3 * alone
    for subsampling in (1, 2):
        beside = error_beside_photo(gray_rim=True, subsampling=subsampling)
        assert beside == pytest.approx(alone, rel=0.03) and beside <= 0.07


@pytest.mark.parametrize("p, tinted", [(8, True), (16, False), (24, True), (32, False)])
def test_colors_are_stored_in_blocks_of_16_pixels(p, tinted):
    """Why 4:2:0 wants patches on the 16-pixel grid, where luminance is content with 8."""
    layout = CanvasLayout((3, 3), (1, 1), (4,), (0, 1, 2, 3, 5, 6, 7, 8))
    gray = torch.randint(60, 196, (1, 8, p * p), generator=torch.Generator().manual_seed(0))
    gray = gray.to(torch.uint8).repeat(1, 1, 3)
    red = torch.tensor([200.0, 40.0, 40.0])[None, :, None, None].expand(1, 3, p, p)
    shown = image_patches(red, layout, p, gray_rim=True).to(torch.uint8)
    cells = to_patches(layout.compose(shown, gray, p), p)[0]
    seen = through(
        ServerSpec(codec="jpeg", subsampling=2, resize=None, crop=None), cells, (3, 3), p
    )
    colors = seen[list(layout.prompt_cells)].view(8, 3, -1).float()
    assert ((colors - colors.mean(dim=1, keepdim=True)).abs().max() > 4) == tinted


@pytest.mark.parametrize(
    "shape, kind, message",
    [
        ("S/16", "rand", r"4:2:0 needs gray-only patches \(p² >= D\).*16² = 256 .* 384 values"),
        ("B/32", "a1", "those of B/32 a1 reach 532 of 767 token directions"),
        ("L/14", "rand", "patch size 14 is not on the 8-pixel JPEG grid"),
    ],
)
def test_backbones_that_gray_patches_do_not_reach(shape, kind, message):
    with pytest.raises(CodecError, match=message):
        GamutLibrary(4, behind(synthetic_map(shape, kind), subsampling=2))


def test_compensated_positions_want_colors():
    patch_map = behind(synthetic_map("B/32", "rand"), subsampling=2)
    with pytest.raises(CodecError, match="subsampled colors does not keep"):
        PositionCompensation(patch_map)


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_model_behind_a_jpeg_server(subsampling):
    """Trained with the margin that JPEG needs; through files, less than half the naive error."""
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False).eval()
    halves = (0.5, 0.5, 0.5)
    png = ServerSpec(resize=160, crop=160, mean=halves, std=halves)
    errors = {}
    for server in (png, dataclasses.replace(png, codec="jpeg", subsampling=subsampling)):
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
            sent = dataclasses.replace(server, codec="jpeg", subsampling=subsampling)
            canvas = prompter(images)[0]
            prompts = to_patches(sent.preprocess(sent.encode(canvas))[None], 16)
            prompts = prompts[0, list(prompter.layout.prompt_cells)]
            wanted = prompter.levels(server.normalize(images))[0].double() - 127.5
            patch_map = prompter.patch_map
            seen = (prompts.double() - 127.5) @ patch_map.A.T
            errors["png"] = patch_map.relative_error(seen, wanted @ patch_map.A.T).mean().item()
        else:
            report = verify(prompter, model, images)
            errors["jpeg"] = report.mean
            # the image is recompressed too, so the features are near, not equal
            assert max(report.output_rel_err) < 0.1
    assert errors["jpeg"] < 0.5 * errors["png"], errors
