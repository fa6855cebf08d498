"""What inversion promises beside its figures: exact training layout, files, errors, warnings."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import timm
import torch
from inversion_fixtures import published, synthetic_map
from PIL import Image
from timm.layers import RmsNorm
from torch import nn

import pgn_fast
from pgn_fast.inversion import (
    CanvasLayout,
    CodecError,
    ExposureWarning,
    GamutLibrary,
    InversionError,
    InvertedLibrary,
    LayoutError,
    PatchMap,
    RgbPrompter,
    SaturationWarning,
    ServerSpec,
    UnreachablePromptError,
    analyze,
    invert_library,
    verify,
)
from pgn_fast.inversion.layout import from_patches, shrink, to_patches
from pgn_fast.prompts import PromptGenerator


def small_vit(seed: int = 0, **kwargs) -> nn.Module:
    """test_vit: 10 x 10 patches of 16 pixels, 64 wide, class token."""
    torch.manual_seed(seed)
    options = {"num_classes": 7, "dynamic_img_size": False, **kwargs}
    return timm.create_model("test_vit", pretrained=False, **options).eval()


def small_pgn(backbone: nn.Module, library: nn.Module | None, **kwargs) -> pgn_fast.PGN:
    torch.manual_seed(1)
    return pgn_fast.PGN(
        backbone,
        num_classes=5,
        library_size=8,
        generator_kwargs={"channels": 4, "groups": 2},
        resolution=32,
        token_library=library,
        **kwargs,
    ).eval()


def gamut_pgn(backbone: nn.Module | None = None, **kwargs) -> pgn_fast.PGN:
    """A PGN whose in-gamut library has strong tokens."""
    backbone = small_vit() if backbone is None else backbone
    library = GamutLibrary(8, PatchMap.from_backbone(backbone))
    with torch.no_grad():
        library.theta.mul_(150)
    return small_pgn(backbone, library, **kwargs)


IMAGES = torch.randint(0, 256, (2, 3, 160, 160), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)


# --- training in gamut --------------------------------------------------------------------------


def test_training_sees_what_is_served():
    """The latent path of a gamut-trained PGN against its canvases through the bare backbone, before
    rounding: the same numbers, not merely near ones."""
    model = gamut_pgn()
    normalized = ServerSpec.from_backbone(model.backbone).normalize(IMAGES)
    prompter = pgn_fast.invert(model)
    patches = to_patches(shrink(IMAGES, prompter.layout, 16), 16)
    exact = prompter.layout.compose(patches, prompter.levels(normalized), 16)
    with torch.no_grad():
        features = model.backbone.forward_features(prompter.server.normalize(exact))
        served = model.head(model.backbone.forward_head(features, pre_logits=True))
        torch.testing.assert_close(model(normalized), served, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(
            model.forward_reference(normalized), served, rtol=1e-4, atol=2e-6
        )
        without = model.backbone.forward_head(
            model.backbone.forward_features(prompter.server.normalize(IMAGES)), pre_logits=True
        )
    assert (model.head(without) - served).abs().max() > 0.01


def test_pooled_means_contain_prompts_and_blanks_as_the_server_has_them():
    model = gamut_pgn(small_vit(global_pool="avg"))
    report = verify(pgn_fast.invert(model), model, IMAGES)
    assert max(report.output_rel_err) < 1e-3


def test_gradients_reach_library_and_generator_and_tokens_stay_in_gamut():
    model = gamut_pgn().train()
    library = model.prompter.token_library
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e4)
    before = library.theta.detach().clone()
    for _ in range(2):
        model(torch.randn(2, 3, 160, 160)).square().sum().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in library.parameters())
        assert model.prompter.generator.head.weight.grad.norm() > 0
        optimizer.step()
    assert (library.theta - before).norm() > 100
    pixels = library.pixels()
    assert pixels.min() >= 6 and pixels.max() <= 249


def test_pixels_do_not_depend_on_the_backbones_dtype():
    """bfloat16 has no room for half a level at 127.5; autocast would compute in it."""
    library = GamutLibrary(8, PatchMap.from_backbone(small_vit()))
    with torch.no_grad():
        library.theta.mul_(100).copy_(library.theta.bfloat16())
        expected = library.pixels()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(library.pixels(), expected)
            assert library().dtype == torch.float32
        half = library.to(torch.bfloat16)
        assert torch.equal(half.pixels(), expected)
        assert half().dtype == torch.bfloat16


def test_library_starts_as_a_plain_one_would():
    """Near zero the tokens are theta, up to the direction that no norm lets through."""
    patch_map = PatchMap.from_backbone(small_vit())
    library = GamutLibrary(32, patch_map)
    centered = library.theta - library.theta.mean(dim=1, keepdim=True)
    contents = library() - library().mean(dim=1, keepdim=True)
    assert (contents - centered).norm() < 1e-3 * centered.norm()


def test_from_latent_keeps_what_is_in_reach():
    """A reachable latent library survives the conversion; an unreachable one comes as near as the
    box allows."""
    patch_map = PatchMap.from_backbone(small_vit())
    tokens = torch.randn(8, 64)
    whole = tokens + patch_map.constant.float()
    for library in (
        GamutLibrary.from_latent(tokens, patch_map, prompt_pos="canvas"),
        GamutLibrary.from_latent(whole, patch_map),
    ):
        assert patch_map.relative_error(library().detach(), tokens).max() < 0.02
    assert library.theta.requires_grad


@pytest.mark.parametrize("fast", [True, False])
def test_saved_and_loaded(tmp_path, fast):
    model = gamut_pgn(fast=fast)
    pgn_fast.adapters.save_pretrained(model, tmp_path)
    loaded = pgn_fast.from_pretrained(tmp_path, small_vit())
    normalized = ServerSpec.from_backbone(model.backbone).normalize(IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(normalized), model(normalized))
    assert torch.equal(pgn_fast.invert(loaded)(IMAGES), pgn_fast.invert(model)(IMAGES))
    with pytest.raises(ValueError, match="not those that this GamutLibrary was trained with"):
        pgn_fast.from_pretrained(tmp_path, small_vit(seed=1))


# --- prompters ----------------------------------------------------------------------------------


def test_canvases_uint8_and_float_inputs_and_files():
    model = gamut_pgn()
    prompter = pgn_fast.invert(model)
    server = prompter.server
    canvases = prompter(IMAGES)
    assert canvases.dtype == torch.uint8 and canvases.shape == (2, 3, 168, 168)
    # the same images, normalized by the caller
    assert torch.equal(prompter(server.normalize(IMAGES)), canvases)
    for file, canvas in zip(prompter.encode(IMAGES), canvases, strict=True):
        picture = Image.open(io.BytesIO(file))
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), canvas.numpy())
    # image, prompts and blanks stand where the layout says
    cells = to_patches(canvases[:, :, 4:164, 4:164], 16)
    shrunk = to_patches(shrink(IMAGES, prompter.layout, 16), 16)
    assert torch.equal(cells[:, list(prompter.layout.image_cells)].float(), shrunk)
    assert (cells[:, list(prompter.layout.blank_cells)] == 128).all()
    assert cells[:, list(prompter.layout.prompt_cells)].double().std() > 5
    # a snapshot: training on does not change it
    with torch.no_grad():
        model.prompter.generator.head.weight.add_(1)
        model.prompter.token_library.theta.zero_()
    assert torch.equal(prompter(IMAGES), canvases)


def test_verify_on_latent_prompts_and_shallow_vpt():
    """Latent models on an enlarged canvas: the same token sequence, positions compensated."""
    backbone = small_vit(dynamic_img_size=True)
    latent = small_pgn(backbone, None)
    with torch.no_grad():
        latent.prompter.token_library.mul_(20)
    vpt = pgn_fast.VPT(backbone, num_classes=5, num_prompts=10, deep=False, dropout=0.1)
    with torch.no_grad():
        vpt.prompter.prompts.mul_(5)
    for model, grid in ((latent, (4, 29)), (vpt, (10, 11))):
        prompter = pgn_fast.invert(model)
        assert prompter.layout.grid == grid
        report = verify(prompter, model, IMAGES)
        assert max(report.output_rel_err) < 2e-3
        assert report.mean == pytest.approx(np.mean(report.predicted_round_err), rel=0.1)
        assert report.ok(0.05) and not report.ok(1e-6)
        # without the prompts the features are elsewhere
        server = prompter.server
        with torch.no_grad():
            plain = backbone.forward_features(server.normalize(IMAGES))
            prompted = model.forward_features(server.normalize(IMAGES))
        assert (plain - prompted)[:, 0].norm() > 20 * 2e-3 * prompted[:, 0].norm()


def test_reports_say_what_they_measured():
    prompter = pgn_fast.invert(gamut_pgn())
    report = prompter.report
    assert report.source == "library" and len(report.token_rel_err) == 8
    assert report.mean == pytest.approx(np.mean(report.predicted_round_err), rel=0.15)
    assert max(report.reach_err) < 1e-6
    # every figure for each prompt, so that a bad one can be found
    patches = prompter.inverted.to_uint8(prompter.inverted.patches + 127.5)
    assert report.min_level == patches.amin(dim=1).tolist()
    assert report.max_level == patches.amax(dim=1).tolist()
    assert report.saturated_fraction == report.oob_fraction == 8 * [0]
    assert report.scale == 8 * [1]
    content = json.loads(report.to_json())
    assert content["mean"] == report.mean and content["max"] == report.max
    assert "relative token error" in str(report)


def test_inverted_library_file(tmp_path):
    model = gamut_pgn()
    prompter = pgn_fast.invert(model)
    path = tmp_path / "library.safetensors"
    prompter.inverted.save(path)
    patch_map = prompter.patch_map
    loaded = InvertedLibrary.load(path, patch_map)
    alone = RgbPrompter(model.prompter, loaded)  # without any backbone
    assert torch.equal(alone(IMAGES), prompter(IMAGES))
    other = PatchMap.from_backbone(small_vit(seed=1))
    with pytest.raises(InversionError, match="changed since this library was inverted"):
        InvertedLibrary.load(path, other)
    elsewhere = PatchMap.from_backbone(
        small_vit(), layout=CanvasLayout.border((10, 10), (6, 6), 16)
    )
    with pytest.raises(LayoutError, match="deployed on a 10x10 canvas"):
        InvertedLibrary.load(path, elsewhere)


def test_mixtures_of_patches_are_mixtures_of_tokens():
    """The theorem, with positions cancelled and split off: any convex combination, in any cell."""
    patch_map = synthetic_map("S/16", "rand", 0.3)
    tokens = torch.randn(12, 384, generator=torch.Generator().manual_seed(5)).double() / 10
    inverted = invert_library(tokens, patch_map, prompt_pos="none")
    coefficients = torch.rand(3, 16, 12).double().softmax(dim=-1)
    levels = inverted.mix(coefficients)
    seen = patch_map.tokens(levels) + patch_map.positions
    assert patch_map.relative_error(seen, coefficients @ tokens).max() < 1e-4
    assert levels.min() >= inverted.margin - 1e-3 and levels.max() <= 255 - inverted.margin + 1e-3


# --- errors -------------------------------------------------------------------------------------


def test_a_constant_is_not_free_behind_rms_norms():
    """RMSNorm keeps the mean of a token: all D directions have to be reached."""
    plain = PatchMap.from_backbone(small_vit())
    rms = PatchMap.from_backbone(small_vit(norm_layer=RmsNorm))
    assert plain.shift_free and not rms.shift_free
    assert (plain.solver.rank, rms.solver.rank) == (63, 64)
    tokens = torch.randn(3, 64).double()
    shifted = tokens + torch.randn(3, 1)
    assert plain.relative_error(shifted, tokens).max() < 1e-12
    assert rms.relative_error(shifted, tokens).min() > 1e-2


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "inside the network, where no image reaches"),
        ({"deep": False, "expand": False}, "expand=False removes the prompts"),
        ({"deep": False, "location": "pad"}, "location='pad' adds no prompt tokens"),
        ({"deep": False, "pool": "prompt_pool"}, "not the pooling of the server"),
    ],
)
def test_prompts_that_no_image_carries(options, reason):
    model = pgn_fast.VPT(small_vit(), 5, num_prompts=4, **options)
    with pytest.raises(InversionError, match=reason):
        pgn_fast.invert(model)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("vit_tiny_r_s16_p8_224", "hybrid stem"),
        ("aimv2_large_patch14_224", "normalizes inside the patch embedding"),
    ],
)
def test_patch_embeddings_that_are_not_affine(name, reason):
    options = {"depth": 1} if "aim" in name else {}
    with pytest.raises(InversionError, match=reason):
        PatchMap.from_backbone(timm.create_model(name, pretrained=False, **options))
    overlapping = small_vit()
    overlapping.patch_embed.proj.stride = (8, 8)
    with pytest.raises(InversionError, match="overlap"):
        PatchMap.from_backbone(overlapping)


def test_unreachable_tokens():
    tokens, _ = published()
    patch_map = synthetic_map("S/16", "a2")
    message = (
        r"256 of 256 library tokens lie outside the gamut \(median residual 0\.\d+, largest "
        r'reachable scale 0\.\d+\)\. Train with GamutLibrary, .*on_unreachable="project"'
    )
    with pytest.raises(UnreachablePromptError, match=message):
        invert_library(tokens[:, :384], patch_map, iters=20)
    nearest = invert_library(tokens[:, :384], patch_map, iters=20, on_unreachable="project")
    assert nearest.reach_err.min() > 0.1
    deep = synthetic_map("L/14", "rand")
    with pytest.raises(
        UnreachablePromptError, match=r"embed_dim 1024 > 3\*14\*14 = 588: 6\d% of the"
    ):
        invert_library(torch.randn(4, 1024), deep)


def test_scale_is_free_only_behind_a_norm():
    tokens = torch.randn(4, 384)
    with pytest.raises(InversionError, match="norm_pre"):
        invert_library(tokens, synthetic_map("S/16", "rand"), prompt_pos="none", scale="auto")
    free = synthetic_map("S/16", "rand", scale_free=True)
    with pytest.raises(ValueError, match='Use scale="fixed"'):
        invert_library(tokens, free, prompt_pos="canvas", scale="auto")
    dim = dataclasses.replace(free, A=free.A * 1e-4, d=free.d * 1e-4, positions=0 * free.positions)
    message = r"prompt std after scaling 0\.0\d+ < 0\.032: LayerNorm eps attenuates it by \d+\.\d%"
    with pytest.warns(ExposureWarning, match=message):
        invert_library(tokens, dim, prompt_pos="none", scale="auto")


def test_coefficients_must_sum_to_one():
    inverted = invert_library(torch.randn(4, 384) / 10, synthetic_map("S/16", "rand"))
    with pytest.raises(InversionError, match="do not sum to 1"):
        inverted.mix(torch.full((1, 1, 4), 0.5))
    sigmoid = PromptGenerator(
        384, library_size=4, activation="sigmoid", generator_kwargs={"channels": 4}
    )
    with pytest.raises(InversionError, match="sigmoid coefficients do not sum to 1"):
        RgbPrompter(sigmoid, inverted)
    # brightened or dimmed to the gamut, any coefficients will do
    free = synthetic_map("S/16", "rand", scale_free=True)
    tokens = torch.randn(4, 384).double() / 10
    exposed = invert_library(tokens, free, prompt_pos="none", scale="auto")
    coefficients = 3 * torch.rand(2, 16, 4).double()
    seen = free.tokens(exposed.mix(coefficients)) + free.positions
    norm = lambda x: torch.nn.functional.layer_norm(x, (384,))
    torch.testing.assert_close(norm(seen), norm(coefficients @ tokens), rtol=0, atol=2e-2)


def test_positions_that_take_the_gamut_up():
    expensive = synthetic_map("S/16", "a1", 20.0)
    with pytest.raises(InversionError, match=r"pos\[cell \d+\] uses \d+ of 127 levels"):
        invert_library(torch.randn(2, 384), expensive, prompt_pos="none")
    rotary = timm.create_model("eva02_tiny_patch14_224", pretrained=False, depth=1).eval()
    with pytest.raises(InversionError, match="rotates queries and keys"):
        invert_library(torch.randn(2, 192), PatchMap.from_backbone(rotary), prompt_pos="none")


def test_saturated_patches_warn():
    inverted = invert_library(torch.randn(4, 384) / 10, synthetic_map("S/16", "rand"))
    with pytest.warns(SaturationWarning, match="of the prompts' pixels lie at 0 or 255"):
        inverted.to_uint8(torch.full((2, 768), 260.0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CanvasLayout.enlarged((7, 10)), r"7x10 grid \(5 blank cells would become extra"),
        (lambda: CanvasLayout.enlarged((5, 12)), r"\(5 lack\). Use 5x13\."),
        (lambda: CanvasLayout.border((7, 7), (6, 6), 16), "16 prompts do not fit the 13 cells"),
        (lambda: CanvasLayout.border((7, 7), (8, 6)), "does not fit a 7x7 grid"),
        (lambda: CanvasLayout((2, 2), (1, 1), (0,), (0,)), "a cell of its own"),
        (lambda: CanvasLayout((2, 2), (1, 2), (0,), (1,)), "needs 2 cells, got 1"),
        (
            lambda: ServerSpec(resize=256, crop=224).pad(torch.zeros(1, 3, 160, 416).byte()),
            "160x416 pixels does not survive this server",
        ),
        (
            lambda: PatchMap.from_backbone(
                small_vit(),
                ServerSpec(resize=None, crop=None, dynamic_size=True),
                CanvasLayout.enlarged(None, (10, 10), 16),
            ),
            "takes 10x10 only",
        ),
        (lambda: pgn_fast.invert(small_pgn(small_vit(), None)), "dynamic_img_size=True"),
    ],
)
def test_layouts_that_do_not_work(make, message):
    with pytest.raises(LayoutError, match=message):
        make()


def test_layouts_that_were_not_trained():
    model = gamut_pgn()
    with pytest.raises(LayoutError, match="library was trained for a 10x10 canvas"):
        pgn_fast.invert(model, layout=CanvasLayout.border((10, 10), (6, 6), 16))
    latent = small_pgn(small_vit(global_pool="avg", dynamic_img_size=True), None)
    with pytest.raises(LayoutError, match="pools the prompt cells too"):
        pgn_fast.invert(latent)
    few = small_pgn(model.backbone, model.prompter.token_library, num_prompts=4)
    with pytest.raises(LayoutError, match="the model has 4 prompts"):
        few(torch.randn(1, 3, 160, 160))


@pytest.mark.parametrize(
    "options, patch, message",
    [
        ({}, 14, "patch size 14 is not on the 8-pixel JPEG grid"),
        ({"resize": 248}, 16, "crops 12 pixels at each side"),
        ({"subsampling": 2}, 8, "4:2:0 needs gray-only patches.*averages the colors.*8² = 64"),
        ({"subsampling": 1}, 24, "4:2:2 stores colors in blocks of 16 pixels, patch size 24"),
        ({"subsampling": 2, "resize": 240}, 16, "in blocks of 16 pixels, the server's crop of 8"),
    ],
)
def test_codecs_that_destroy_prompts(options, patch, message):
    with pytest.raises(CodecError, match=message):
        ServerSpec(codec="jpeg", **options).check_codec(patch, embed_dim=192)
    ServerSpec(codec="png").check_codec(14, embed_dim=192)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ServerSpec(codec="gif"), "codec='gif'; known: png, jpeg"),
        (lambda: ServerSpec(subsampling=3), r"subsampling 0 \(4:4:4\), 1 \(4:2:2\) or 2"),
        (lambda: ServerSpec(quality=0), "quality 1 to 100"),
        (lambda: ServerSpec(resize=200, crop=224), "resize=200 is smaller than crop=224"),
        (lambda: ServerSpec(std=(0.0, 1.0, 1.0)), "three positive stds"),
        (lambda: GamutLibrary(0, synthetic_map("S/16", "rand")), "n_tokens must be at least 1"),
        (lambda: analyze(synthetic_map("S/16", "rand"), prompt_pos="left"), "known: canvas, none"),
        (lambda: pgn_fast.invert(gamut_pgn())(IMAGES[:, :, :100]), r"\(B, 3, 160, 160\)"),
        (lambda: pgn_fast.invert(gamut_pgn())(IMAGES.int()), "uint8 or normalized floats"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_refusal_is_a_value_error():
    assert issubclass(InversionError, ValueError)
    with pytest.raises(TypeError, match="takes a PGN or VPT"):
        pgn_fast.invert(small_vit())


# --- pieces -------------------------------------------------------------------------------------


def test_patches_and_images():
    images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
    patches = to_patches(images, 8)
    assert patches.shape == (2, 12, 192)
    assert torch.equal(patches[1, 5].view(3, 8, 8), images[1, :, 8:16, 8:16])
    assert torch.equal(from_patches(patches, (3, 4), 8), images)


def test_patch_map_is_the_patch_embedding():
    backbone = small_vit()
    patch_map = PatchMap.from_backbone(backbone)
    with torch.no_grad():
        tokens = backbone._pos_embed(backbone.patch_embed(patch_map.server.normalize(IMAGES)))
    expected = patch_map.tokens(to_patches(IMAGES, 16)) + patch_map.positions
    torch.testing.assert_close(tokens[:, 1:].double(), expected, rtol=1e-5, atol=1e-6)


def test_layout_and_server_survive_json():
    layout = CanvasLayout.enlarged(None, (10, 10), 16)
    assert CanvasLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    server = ServerSpec(resize=224, codec="jpeg", mean=(0.5, 0.4, 0.3))
    assert ServerSpec(**json.loads(json.dumps(server.to_dict()))) == server


@pytest.mark.parametrize(
    "shape, kind, free, verdict",
    [
        ("S/16", "rand", False, "exact"),
        ("S/16", "a2", False, "needs_gamut_training"),
        ("S/16", "a1", True, "scale-free"),
        ("L/14", "rand", False, "column_space_restricted"),
    ],
)
def test_verdicts(shape, kind, free, verdict):
    patch_map = synthetic_map(shape, kind, scale_free=free)
    tokens = 4 * torch.nn.functional.normalize(torch.randn(16, patch_map.embed_dim), dim=1)
    report = analyze(patch_map, tokens, iters=60)
    assert report.verdict == verdict
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == verdict
    assert f": {verdict} (" in str(report)


def test_a_half_precision_generator_still_mixes_exact_patches():
    """A bfloat16 model chooses with less care, but what it chooses is inverted in float32."""
    backbone = small_vit().to(torch.bfloat16)
    library = GamutLibrary(8, PatchMap.from_backbone(backbone))
    with torch.no_grad():
        library.theta.mul_(150)
    model = small_pgn(backbone, library)
    prompter = pgn_fast.invert(model)
    assert prompter.inverted.patches.dtype == torch.float32
    report = verify(prompter, model, IMAGES)
    # the latent prompts of the comparison are themselves rounded to 8 bits of mantissa
    assert report.mean < 0.02 and max(report.reach_err) < 0.01
