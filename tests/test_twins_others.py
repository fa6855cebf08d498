"""Twins of open_clip's and torchvision's vision transformers, and timm models in wrappers."""

from __future__ import annotations

import random

import pytest
import torch
from small_world import MODEL, SIZES
from torch import nn

import pgn_fast
from pgn_fast.backbone import support
from pgn_fast.backbone.load import load_backbone
from pgn_fast.backbone.twins import TwinRefused

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


def torchvision_vit(seed=0, **changes):
    from torchvision.models.vision_transformer import VisionTransformer

    draw = random.Random(f"torchvision {seed}")
    heads = draw.choice([2, 3, 4])
    patch = draw.choice([4, 8])
    values = {
        "image_size": patch * draw.choice([2, 3]),
        "patch_size": patch,
        "num_layers": draw.choice([1, 2, 3]),
        "num_heads": heads,
        "hidden_dim": 16 * heads,
        "mlp_dim": draw.choice([40, 64]),
        "dropout": draw.choice([0.0, 0.3]),
        "num_classes": 5,
    }
    return randomized(VisionTransformer(**values | changes))


def open_clip_vit(seed=0, **changes):
    transformer = pytest.importorskip("open_clip").transformer
    draw = random.Random(f"open_clip {seed}")
    heads = draw.choice([2, 3, 4])
    patch = draw.choice([4, 8])
    values = {
        "image_size": patch * draw.choice([2, 3]),
        "patch_size": patch,
        "width": 16 * heads,
        "layers": draw.choice([1, 2, 3]),
        "heads": heads,
        "mlp_ratio": draw.choice([2.0, 3.0]),
        "ls_init_value": draw.choice([None, 0.3]),
        "patch_dropout": draw.choice([0.0, 0.5]),
        "no_ln_pre": draw.choice([True, False]),
        "pool_type": draw.choice(["tok", "avg"]),
        "final_ln_after_pool": draw.choice([True, False]),
        "act_layer": draw.choice([nn.GELU, transformer.QuickGELU]),
        "norm_layer": draw.choice([transformer.LayerNorm, transformer.LayerNormFp32]),
        "output_dim": 24,
    }
    return randomized(transformer.VisionTransformer(**values | changes))


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


def images_for(backbone):
    size = (2, backbone.in_chans, *backbone.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(next(backbone.parameters()).dtype)


def error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def by_hand(original, images, prompts=None):
    """Tokens by the original's own layers, with deep prompts (L, P, D) that leave at the end."""
    if hasattr(original, "conv_proj"):
        x = original._process_input(images)
        x = torch.cat([original.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + original.encoder.pos_embedding
        layers, norm, pre = original.encoder.layers, original.encoder.ln, nn.Identity()
    else:
        pre, original.ln_pre = original.ln_pre, nn.Identity()
        x = original._embeds(images)
        original.ln_pre = pre
        layers = original.transformer.resblocks
        norm = nn.Identity() if original.final_ln_after_pool else original.ln_post
    P = 0 if prompts is None else prompts.shape[1]
    for i, layer in enumerate(layers):
        if prompts is not None:
            patches = x[:, 1 + (P if i else 0) :]
            x = torch.cat([x[:, :1], prompts[i].expand(len(x), -1, -1), patches], dim=1)
        x = layer(pre(x) if i == 0 else x)
    return norm(torch.cat([x[:, :1], x[:, 1 + P :]], dim=1))


BUILD = {"torchvision": torchvision_vit, "open_clip": open_clip_vit}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("library", BUILD)
def test_tokens_and_logits_equal_the_originals(library, seed, dtype):
    changes = {}
    if library == "open_clip" and dtype == torch.float64:
        # LayerNormFp32 rounds to float32 whatever the model's dtype
        changes["norm_layer"] = pytest.importorskip("open_clip").transformer.LayerNorm
    original = BUILD[library](seed, **changes).to(dtype)
    model = pgn_fast.VPT(original, 3, num_prompts=2)
    backbone, images = model.backbone, images_for(model.backbone)
    assert support.unsupported_reason(backbone) is None and backbone.origin.library == library
    with torch.no_grad():
        assert error(backbone.forward_features(images), by_hand(original, images)) <= BOUND[dtype]
        assert error(backbone(images), original(images)) <= 2 * BOUND[dtype]
        expected = by_hand(original, images, model.prompter.prompts)
        assert error(model.forward_features(images), expected) <= 2 * BOUND[dtype]


@pytest.mark.parametrize("library", BUILD)
def test_gradients_equal_those_of_the_originals_own_layers(library):
    original = BUILD[library](2)
    if library == "open_clip":
        original = BUILD[library](
            2, norm_layer=pytest.importorskip("open_clip").transformer.LayerNorm
        )
    model = pgn_fast.VPT(original.double(), 3, num_prompts=2)
    images, prompts = images_for(model.backbone), model.prompter.prompts
    tokens, expected = model.forward_features(images), by_hand(original, images, prompts)
    weights = torch.randn(tokens.shape, dtype=tokens.dtype)
    ours, theirs = (
        torch.autograd.grad((t * weights).sum(), prompts)[0] for t in (tokens, expected)
    )
    assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("library", BUILD)
def test_all_weights_are_shared(library):
    original = BUILD[library]()
    backbone = load_backbone(original)
    storages = {p.untyped_storage().data_ptr() for p in original.parameters()}
    assert not [
        n for n, p in backbone.named_parameters() if p.untyped_storage().data_ptr() not in storages
    ]
    assert not backbone.origin.copied
    assert "nothing is copied" in pgn_fast.VPT(backbone, 2, num_prompts=1).explain()


def test_settings_that_no_twin_follows_are_named():
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
    with pytest.raises(TwinRefused, match="conv_stem_configs"):
        load_backbone(torchvision_vit(conv_stem_configs=stem, patch_size=4, image_size=16))
    for changes, message in (
        ({"attentional_pool": True}, "attentional_pool"),
        ({"pool_type": "none"}, "pool_type='none'"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"scale_fc": True}, "CustomResidualAttentionBlock"),
        ({"act_layer": nn.Tanh}, r"gelu is a .*Tanh"),
    ):
        with pytest.raises(TwinRefused, match=message):
            load_backbone(open_clip_vit(**changes))
    with pytest.raises(TwinRefused, match="ResNet of torchvision has no twin"):
        import torchvision

        load_backbone(torchvision.models.resnet18())
    with pytest.raises(TwinRefused, match="force_image_size"):
        load_backbone(open_clip_vit(), img_size=40)


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed_type": "sin_cos_2d"},
        {"output_tokens": True},
        {"no_ln_pre": True},
        {"final_ln_after_pool": True, "pool_type": "avg"},
        {"final_ln_after_pool": False, "pool_type": "avg"},
        {"patch_dropout": 0.4, "ls_init_value": 0.1},
    ],
    ids=str,
)
def test_open_clips_settings_are_followed(changes):
    original = open_clip_vit(**changes)
    backbone = load_backbone(original)
    images = images_for(backbone)
    expected = original(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert error(backbone(images), expected) <= 2e-6


def test_a_head_of_the_users_own_on_torchvision():
    original = torchvision_vit(representation_size=12)
    backbone = load_backbone(original)
    images = images_for(backbone)
    assert error(backbone(images), original(images)) <= 2e-6 and backbone.num_classes == 5
    original = torchvision_vit()
    original.heads = nn.Identity()
    assert load_backbone(original).num_classes == 0
    original.heads = nn.Linear(original.hidden_dim, 7)
    assert load_backbone(original).num_classes == 7


def test_torchvisions_transforms_become_the_preprocessing():
    from torchvision.models import ViT_B_16_Weights

    original = torchvision_vit(image_size=384, patch_size=96)
    processor = ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms()
    about = load_backbone(original, processor=processor).pretrained_cfg
    assert about["interpolation"] == "bicubic" and about["crop_pct"] == 1.0
    with pytest.raises(TwinRefused, match="224x224 pixels, the model takes 384x384"):
        load_backbone(original, processor=ViT_B_16_Weights.IMAGENET1K_V1.transforms())


def test_a_whole_open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    whole = randomized(open_clip.model.CLIP(24, vision, text))
    open_clip.model.set_model_preprocess_cfg(
        whole,
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "size": 16, "resize_mode": "squash"},
    )
    backbone = load_backbone(whole)
    images = images_for(backbone)
    with torch.no_grad():
        assert error(backbone(images), whole.encode_image(images)) <= 1e-6
    assert backbone.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert backbone.pretrained_cfg["crop_mode"] == "squash"
    model = pgn_fast.VPT(
        whole.visual, head="zero_shot", class_embeddings=torch.randn(3, 24), num_prompts=1
    )
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize("proj", ["linear", "mlp", ""])
def test_timms_trunk_inside_open_clip(proj, monkeypatch):
    timm_model = pytest.importorskip("open_clip.timm_model")
    make = timm_model.timm.create_model

    def small(name, num_classes=3, global_pool="token", **ignored):
        return make(MODEL, num_classes=num_classes, global_pool=global_pool, **SIZES)

    monkeypatch.setattr(timm_model.timm, "create_model", small)
    visual = randomized(timm_model.TimmModel("vit", 12, image_size=16, pool="avg", proj=proj))
    backbone = load_backbone(visual)
    images = images_for(backbone)
    with torch.no_grad():
        assert error(backbone(images), visual(images)) <= 1e-6
    assert backbone.num_classes == 12 and backbone.blocks is visual.trunk.blocks
    # the original is as it was
    assert proj == "" or isinstance(visual.trunk.head, nn.Identity)


def test_timm_wrapper_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=4,
        model_args={"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2},
        pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 16, 16]},
    )
    original = randomized(transformers.TimmWrapperForImageClassification(config))
    backbone = load_backbone(original)
    assert backbone is original.timm_model
    assert backbone.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    images = images_for(backbone)
    assert torch.equal(backbone(images), original(images).logits)
