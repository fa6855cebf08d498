"""Canvases through untouched timm backbones and servers' preprocessing, against the latent path."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
from inversion_fixtures import (
    CLIP_STATISTICS,
    OFFICIAL,
    isotropic_tokens,
    patch_weight,
    photo_crops,
    position_embedding,
    published,
)
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import pgn_fast
from pgn_fast.inversion import (
    CanvasLayout,
    GamutLibrary,
    InversionError,
    PatchMap,
    RgbPrompter,
    ServerSpec,
    analyze,
    invert_library,
    verify,
)
from pgn_fast.prompts import PromptGenerator


def clip_b32(**kwargs) -> torch.nn.Module:
    """timm's CLIP ViT-B/32 with random blocks, the "rand" patch embedding and smooth positions."""
    model = timm.create_model("vit_base_patch32_clip_224", num_classes=0, **kwargs).eval()
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(patch_weight("B/32", "rand").view(768, 3, 32, 32))
        model.pos_embed[:, 1:].copy_(position_embedding(768, 7))
    return model


@pytest.mark.filterwarnings("error")
def test_clip_canvas_with_the_image_in_its_middle():
    """Number 8 (b): trained layout, PNG, real preprocessing: output within 0.001."""
    backbone = clip_b32()
    server = ServerSpec(resize=224, crop=224, **CLIP_STATISTICS)
    patch_map = PatchMap.from_backbone(backbone, server, CanvasLayout.border())
    library = GamutLibrary(256, patch_map)
    with torch.no_grad():
        library.theta.copy_(published()[0])
    published_pgn = PromptGenerator.from_official(OFFICIAL / "pgn_clip_cifar100.pt")
    model = pgn_fast.PGN(
        backbone, num_classes=0, generator=published_pgn.generator, token_library=library
    )
    report = verify(pgn_fast.invert(model), model, photo_crops(4))
    assert len(report.token_rel_err) == 64 and len(report.output_rel_err) == 4
    assert max(report.output_rel_err) <= 0.001
    assert max(report.reach_err) <= 1e-5
    assert report.mean == pytest.approx(np.mean(report.predicted_round_err), rel=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", ["fixed", "auto"])
def test_clip_enlarged_canvas_reproduces_latent_training(scale):
    """Number 8 (a): a published PGN as it was trained, without position, after the patches."""
    backbone = clip_b32(dynamic_img_size=True)
    generator = PromptGenerator.from_official(OFFICIAL / "pgn_clip_cifar100.pt")
    model = pgn_fast.PGN(backbone, num_classes=0, generator=generator)
    server = ServerSpec(resize=None, crop=None, dynamic_size=True, **CLIP_STATISTICS)
    prompter = pgn_fast.invert(model, server=server, scale=scale)
    assert prompter.layout.grid == (5, 13) and not prompter.layout.blank_cells
    report = verify(prompter, model, photo_crops(2 if scale == "fixed" else 1))
    assert max(report.output_rel_err) <= 0.001
    if scale == "auto":
        assert min(report.scale) > 1 and np.mean(report.ln_rel_err) <= 0.0022


SERVERS = {
    "CLIP": (
        transforms.Compose(
            [transforms.Resize(224, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
        ),
        224,
    ),
    "torchvision": (transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]), 256),
    "vit_b_32 preset": (
        transforms.Compose(
            [
                transforms.Resize(256, InterpolationMode.BILINEAR, antialias=True),
                transforms.CenterCrop(224),
            ]
        ),
        256,
    ),
    "DINO": (
        transforms.Compose(
            [transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
        ),
        256,
    ),
    **{
        f"timm {crop} {mode}": (
            transforms.Compose(
                create_transform(
                    (3, 224, 224), crop_pct=crop, crop_mode=mode, interpolation="bicubic"
                ).transforms[:2]
            ),
            size,
        )
        for crop, mode, size in [(0.9, "center", 248), (0.875, "center", 256), (1.0, "squash", 224)]
    },
}


@pytest.mark.parametrize("name", SERVERS)
def test_padded_canvas_survives_the_servers_preprocessing(name):
    """Number 9: bit by bit, through PNG; a canvas without its border does not survive a crop."""
    transform, size = SERVERS[name]
    assert len(SERVERS) == 7
    server = ServerSpec(resize=size, crop=224)
    canvases = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    padded = server.pad(canvases)
    assert padded.shape == (1, 3, size, size)
    file = server.encode(padded[0])
    served = np.asarray(transform(Image.open(io.BytesIO(file))))
    assert np.array_equal(served.transpose(2, 0, 1), canvases[0].numpy())
    # our own model of the server does the same
    assert torch.equal(server.preprocess(file), canvases[0])
    if size > 224:
        plain = Image.open(io.BytesIO(server.encode(canvases[0])))
        assert not np.array_equal(np.asarray(transform(plain)).transpose(2, 0, 1), canvases[0])


BACKBONES = [
    # name, its options, prefix tokens, scale free
    ("vit_base_patch32_clip_224", {"depth": 2}, 1, True),
    ("vit_small_patch16_224", {"depth": 2}, 1, False),
    ("vit_base_patch16_siglip_224", {"depth": 2}, 0, False),
    ("vit_base_patch32_224", {"depth": 2, "global_pool": "avg"}, 1, False),
    ("deit3_small_patch16_224", {"depth": 2}, 1, False),
    ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 224}, 5, False),
    ("vit_large_patch14_clip_224", {"depth": 1}, 1, True),
]


@pytest.fixture(scope="module")
def backbone_of():
    made: dict[str, torch.nn.Module] = {}

    def make(name: str, options: dict) -> torch.nn.Module:
        if name not in made:
            torch.manual_seed(0)
            made[name] = timm.create_model(
                name, num_classes=0, dynamic_img_size=True, **options
            ).eval()
            with torch.no_grad():  # timm starts positions and biases near zero
                made[name].pos_embed.copy_(0.04 * torch.randn_like(made[name].pos_embed))
                for module in made[name].modules():  # LayerScale starts where blocks do nothing
                    if hasattr(module, "gamma"):
                        module.gamma.fill_(1.0)
                bias = made[name].patch_embed.proj.bias
                if bias is not None:
                    bias.copy_(0.05 * torch.randn_like(bias))
        return made[name]

    return make


@pytest.mark.parametrize("name, options, prefix, scale_free", BACKBONES)
def test_image_in_is_token_in(name, options, prefix, scale_free, backbone_of):
    """Prefix and register tokens, missing class tokens, every pooling, D > 3 p^2: in-gamut prompts
    through uint8 give the features of the tokens themselves."""
    backbone = backbone_of(name, options)
    p = backbone.patch_embed.patch_size[0]
    server = ServerSpec.from_backbone(backbone)
    layout = CanvasLayout.border((4, 4), (2, 2), prompts=6)
    patch_map = PatchMap.from_backbone(backbone, server, layout)
    assert (patch_map.num_prefix, patch_map.scale_free) == (prefix, scale_free)
    assert patch_map.shift_free
    library = GamutLibrary(6, patch_map)
    with torch.no_grad():
        library.theta.copy_(isotropic_tokens(patch_map.embed_dim, 6) / 2)
    contents = library().detach()[None].double()  # (1, 6, D)
    inverted = invert_library(library, patch_map)
    prompts = inverted.to_uint8(inverted.mix(torch.eye(6)))[None]
    image = torch.randint(0, 256, (1, 4, 3 * p * p), dtype=torch.uint8)
    normalize = server.normalize

    # the wanted token sequence: gray prompt cells, and what the prompts add to them
    gray = layout.compose(image.float(), None, p)
    with torch.no_grad():
        tokens = backbone._pos_embed(backbone.patch_embed(normalize(gray)))
        cells = [prefix + cell for cell in layout.prompt_cells]
        tokens[:, cells] += contents.float()
        run = lambda x: backbone.forward_head(backbone.norm(backbone.blocks(backbone.norm_pre(x))))
        wanted = run(tokens)
        canvas = layout.compose(image, prompts, p)
        served = backbone(normalize(canvas))
        unprompted = run(backbone._pos_embed(backbone.patch_embed(normalize(gray))))

        # number 13: what no norm lets through never matters
        shifted = tokens.clone()
        shifted[:, cells] += torch.randn(6, 1)
        strong = tokens.clone()  # the norm's epsilon shows at small tokens
        strong[:, cells] *= 5 / strong[:, cells].std()
        halved = strong.clone()
        halved[:, cells] *= 0.5
    relative = lambda a, b: ((a - b).norm() / b.norm()).item()
    assert relative(run(shifted), wanted) <= 1e-5
    if scale_free:
        assert relative(run(halved), run(strong)) <= 1e-5
    else:
        assert relative(run(halved), run(strong)) > 1e-4
    assert relative(served, wanted) <= 0.003
    assert relative(served, wanted) < 0.2 * relative(unprompted, wanted)


def test_verify_names_a_preprocessing_that_changes_pixels():
    """A server that resizes although the client believes that it does not."""
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False).eval()
    patch_map = PatchMap.from_backbone(backbone)
    inverted = invert_library(GamutLibrary(4, patch_map), patch_map)

    class Unpadded(RgbPrompter):
        def forward(self, images):
            inside = slice(self.server.border, self.server.border + self.server.crop)
            return super().forward(images)[:, :, inside, inside]

    generator = PromptGenerator(64, library_size=4, generator_kwargs={"channels": 4}, resolution=32)
    images = photo_crops(1, 160)
    prompter = RgbPrompter(generator, inverted, patch_map=patch_map)
    assert verify(prompter, backbone, images).ok(1e-1)
    broken = Unpadded(generator, inverted, patch_map=patch_map)
    with pytest.raises(InversionError, match=r"changed \d\d% of the prompt pixels; send the 168"):
        verify(broken, backbone, images)


def test_half_precision_servers_cost_little():
    """Weights as a bfloat16 server holds them are part of the map."""
    backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False).eval()
    exact = PatchMap.from_backbone(backbone)
    rounded = PatchMap.from_backbone(backbone, ServerSpec.from_backbone(backbone, dtype="bfloat16"))
    weight = backbone.patch_embed.proj.weight
    assert not torch.equal(exact.A, rounded.A)
    restored = rounded.A * 255 * 0.5
    assert torch.equal(restored.float().view_as(weight), weight.detach().bfloat16().float())


@pytest.mark.parametrize(
    "name, verdict",
    [
        ("vit_base_patch32_clip_224", "exact"),
        ("vit_large_patch14_clip_224", "column_space_restricted"),
    ],
)
def test_verdict_of_a_backbone(name, verdict, backbone_of):
    options = {b[0]: b[1] for b in BACKBONES}[name]
    backbone = backbone_of(name, options)
    patch_map = PatchMap.from_backbone(backbone, layout=CanvasLayout.border((4, 4), (2, 2), 6))
    report = analyze(patch_map)
    assert report.verdict == verdict
    assert report.unreachable_share == pytest.approx(0 if verdict == "exact" else 0.652, abs=0.02)
    assert verdict in str(report)
