"""Twins of transformers' image encoders: the same tokens, on the engine, on the same weights."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from small_world import transformers_of_the_twins
from torch import nn

import pgn_fast
from pgn_fast.backbone import support
from pgn_fast.backbone.load import load_backbone
from pgn_fast.backbone.twins import TwinRefused

transformers = transformers_of_the_twins()
from pgn_fast.backbone.twins import transformers as reader  # noqa: E402

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50000,
}
WHOLE = {"CLIP": "CLIPConfig", "Siglip": "SiglipConfig", "Siglip2": "Siglip2Config"}
CONFIG_OF = {
    "ViT": "ViTConfig",
    "DeiT": "DeiTConfig",
    "CLIP": "CLIPVisionConfig",
    "Siglip": "SiglipVisionConfig",
    "Siglip2": "Siglip2VisionConfig",
    "Dinov2": "Dinov2Config",
    "Dinov2WithRegisters": "Dinov2WithRegistersConfig",
    "DINOv3ViT": "DINOv3ViTConfig",
}
# class of the tower alone
TOWER = {family: f"{family}Model" for family in CONFIG_OF} | {
    family: f"{family}VisionModel" for family in WHOLE
}


def config_values(family, seed):
    """Sizes drawn by seed, small enough for a test of many."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice([2, 3, 4])
    width = heads * draw.choice([8, 12, 16])
    patch = draw.choice([4, 6, 8])
    values = {
        "hidden_size": width,
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": heads,
        "patch_size": patch,
        "layer_norm_eps": draw.choice([1e-12, 1e-6, 1e-5, 1e-3]),
        "hidden_act": draw.choice(["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]),
    }
    if family == "Siglip2":
        values["num_patches"] = draw.choice([9, 16])
    else:
        values["image_size"] = patch * draw.choice([3, 4]) + draw.choice([0, 1])
    if family.startswith("Dinov2"):
        values |= {"mlp_ratio": draw.choice([2, 4]), "use_swiglu_ffn": draw.choice([True, False])}
        values["qkv_bias"] = draw.choice([True, False])
    else:
        values["intermediate_size"] = width * draw.choice([2, 3]) + draw.choice([0, 4])
    if family in ("ViT", "DeiT"):
        values["qkv_bias"] = draw.choice([True, False])
    if family == "DINOv3ViT":
        for name in ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"):
            values[name] = draw.choice([True, False])
        values |= {
            "use_gated_mlp": draw.choice([True, False]),
            "num_register_tokens": draw.choice([0, 1, 4]),
            "rope_theta": draw.choice([100.0, 37.0]),
        }
    return values


def build(kind, config):
    """A model of random weights that are far from their usual start: no gain is 1, no bias 0."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


def tower(family, seed=0, **changes):
    config = getattr(transformers, CONFIG_OF[family])(**config_values(family, seed) | changes)
    return build(TOWER[family], config)


def images_for(backbone, count=2):
    size = (count, backbone.in_chans, *backbone.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(next(backbone.parameters()).dtype)


def error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", CONFIG_OF)
def test_tokens_equal_the_originals(family, seed, dtype):
    original = tower(family, seed).to(dtype)
    model = pgn_fast.VPT(original, 3, num_prompts=2)
    backbone, images = model.backbone, images_for(model.backbone)
    assert support.unsupported_reason(backbone) is None
    with torch.no_grad():
        expected = reader.tokens_of(original, images)
        assert error(backbone.forward_features(images), expected) <= BOUND[dtype]
        # by the engine, which runs prompts, and without any
        with_prompts = model.forward_features(images)
        assert (
            error(with_prompts, by_hand(original, images, model.prompter.prompts)) <= BOUND[dtype]
        )
    assert not any(p.requires_grad for p in original.parameters())


def by_hand(original, images, prompts):
    """VPT-Deep by the original's own layers: tokens (B, S + N, D) without the prompts (L, P, D)."""
    kind = type(original).__name__
    extra = {}
    if kind == "Siglip2VisionModel":
        inputs = reader._siglip2_inputs(original, images)
        x = original.embeddings(inputs["pixel_values"], inputs["spatial_shapes"])
    else:
        x = original.embeddings(images)
    if kind.startswith(("ViT", "DeiT")):
        layers, norm, S = original.layers, original.layernorm, 1 + kind.startswith("DeiT")
    elif kind.startswith("Dinov2"):
        layers, norm = original.encoder.layer, original.layernorm
        S = 1 + getattr(original.config, "num_register_tokens", 0)
    elif kind.startswith("DINOv3"):
        layers, norm, S = (
            original.model.layer,
            original.norm,
            1 + original.config.num_register_tokens,
        )
        extra = {"position_embeddings": original.rope_embeddings(images)}
    else:
        layers, norm, S = original.encoder.layers, original.post_layernorm, 0
        extra = {"attention_mask": None}
    pre = nn.Identity()
    if kind.startswith("CLIP"):
        # its tokens leave without the last norm
        pre, norm, S = original.pre_layrnorm, nn.Identity(), 1
    P = prompts.shape[1]
    for i, layer in enumerate(layers):
        entering = prompts[i].expand(len(x), -1, -1)
        patches = x[:, S + (P if i else 0) :]
        x = torch.cat([x[:, :S], entering, patches], dim=1)
        x = layer(pre(x) if i == 0 else x, **extra)
    return norm(torch.cat([x[:, :S], x[:, S + P :]], dim=1))


@pytest.mark.parametrize("family", CONFIG_OF)
def test_gradients_equal_those_of_the_originals_own_layers(family):
    original = tower(family, 1).double()
    model = pgn_fast.VPT(original, 3, num_prompts=2).double()
    images = images_for(model.backbone)
    prompts = model.prompter.prompts
    tokens, expected = model.forward_features(images), by_hand(original, images, prompts)
    weights = torch.randn(tokens.shape, dtype=tokens.dtype)
    ours, theirs = (
        torch.autograd.grad((t * weights).sum(), prompts)[0] for t in (tokens, expected)
    )
    assert error(ours, theirs) <= 1e-12


def classifiers():
    for family in ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"):
        yield f"{family}ForImageClassification", family
    yield "DeiTForImageClassificationWithTeacher", "DeiT"
    for family in WHOLE:
        yield f"{family}ForImageClassification", family


@pytest.mark.parametrize("kind, family", list(classifiers()))
def test_a_kept_head_gives_the_originals_logits(kind, family):
    vision = getattr(transformers, CONFIG_OF[family])(**config_values(family, 0))
    if family in WHOLE:
        whole = getattr(transformers, WHOLE[family])
        config = whole(vision_config=vision.to_dict(), text_config=TEXT)
    else:
        config = vision
    config.num_labels = 5
    original = build(kind, config)
    backbone = load_backbone(original)
    images = images_for(backbone)
    inputs = {"pixel_values": images}
    if family == "Siglip2":
        inputs = reader._siglip2_inputs(original.vision_model, images)
    with torch.no_grad():
        expected = original(**inputs).logits
        assert error(backbone(images), expected) <= 1e-6
        # the engine with no prompts in the way
        kept = pgn_fast.VPT(backbone, head="keep", num_prompts=1)
        with_prompts = kept.forward_reference(images)
        assert kept(images).shape == expected.shape == with_prompts.shape
        assert error(kept(images), with_prompts) <= 1e-6
    new = pgn_fast.VPT(original, 7, num_prompts=1)
    assert new(images).shape == (2, 7)


@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_model_gives_its_image_features(family):
    vision = getattr(transformers, CONFIG_OF[family])(**config_values(family, 2))
    config = getattr(transformers, WHOLE[family])(vision_config=vision.to_dict(), text_config=TEXT)
    original = build(f"{family}Model", config)
    backbone = load_backbone(original)
    images = images_for(backbone)
    inputs = {"pixel_values": images}
    if family == "Siglip2":
        inputs = reader._siglip2_inputs(original.vision_model, images)
    with torch.no_grad():
        expected = original.get_image_features(**inputs).pooler_output
        assert error(backbone(images), expected) <= 1e-6
    # the text tower is left alone
    assert all(p.requires_grad for p in original.text_model.parameters())


def test_clip_with_its_projection():
    config = transformers.CLIPVisionConfig(**config_values("CLIP", 0), projection_dim=20)
    original = build("CLIPVisionModelWithProjection", config)
    backbone = load_backbone(original)
    images = images_for(backbone)
    texts = torch.randn(4, 20)
    model = pgn_fast.PGN(
        backbone, head="zero_shot", class_embeddings=texts, num_prompts=2, library_size=4
    )
    with torch.no_grad():
        assert error(backbone(images), original(images).image_embeds) <= 1e-6
        assert model(images).shape == (2, 4)


@pytest.mark.parametrize("family", CONFIG_OF)
def test_weights_are_shared(family):
    original = tower(family)
    before = {n: p.clone() for n, p in original.named_parameters()}
    backbone = load_backbone(original)
    storages = {p.untyped_storage().data_ptr() for p in original.parameters()}
    copied = dict(backbone.origin.copied)
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        if name == "rope.periods" or name.endswith("k_bias"):
            continue
        alone = tensor.untyped_storage().data_ptr() not in storages
        assert alone == (name.replace("pos_embed_cached", "").rstrip(".") in copied), name
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # a second twin does not make the original's weights again
    again = load_backbone(original)
    assert (
        again.blocks[0].attn.qkv.weight.data_ptr() == backbone.blocks[0].attn.qkv.weight.data_ptr()
    )
    # a write to the original is a write to the twin, and the engine sees it
    model = pgn_fast.VPT(backbone, 3, num_prompts=1)
    images = images_for(backbone)
    with torch.no_grad():
        old = model(images)
        for linear in original.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.mul_(1.5)
        new = model(images)
        assert not torch.allclose(old, new)
        assert error(new, model.forward_reference(images)) <= 1e-5
    assert f"twin of transformers's {type(original).__name__}" in model.explain()


# ---- every configuration value, changed once ---------------------

VALUES = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "mlp_ratio": 3,
    "layer_norm_eps": 0.1,
    "image_size": 40,
    "patch_size": 4,
    "num_patches": 25,
    "num_channels": 1,
    "num_register_tokens": 3,
    "layerscale_value": 0.3,
    "rope_theta": 11.0,
    "projection_dim": 24,
    "encoder_stride": 4,
    "pooler_output_size": 16,
    "initializer_range": 0.5,
    "initializer_factor": 2.0,
    "pos_embed_shift": 0.3,
    "pos_embed_jitter": 2.0,
    "pos_embed_rescale": 3.0,
}
ACTIVATIONS = (
    "gelu_new",
    "gelu_fast",
    "gelu_10",
    "mish",
    "relu2",
    "tanh",
    "sigmoid",
    "relu6",
    "silu",
)


def changes_of(family):
    """(setting, value) for every field of the configuration's class, its base's included."""
    kind = getattr(transformers, CONFIG_OF[family])
    base = {"image_size": 32, "patch_size": 8, "num_patches": 16}
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name, None)
        if field.name == "hidden_act":
            yield from ((field.name, act) for act in ACTIVATIONS)
        elif field.name == "pooler_act":
            yield field.name, "relu"
        elif field.name in VALUES:
            if VALUES[field.name] != base.get(field.name, value):
                yield field.name, VALUES[field.name]
        elif isinstance(value, bool):
            yield field.name, not value
        elif isinstance(value, float) or field.name.endswith(("dropout", "dropout_prob")):
            yield field.name, 0.4
    # settings that are in no class and that its code looks for all the same
    yield "head_dim", 16
    yield "is_causal", True
    yield "_attn_implementation", "eager"


ALL_CHANGES = [(f, *change) for f in CONFIG_OF for change in changes_of(f)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}


@pytest.mark.parametrize("family, name, value", ALL_CHANGES)
def test_every_setting_is_followed_or_refused(family, name, value):
    values = dict(SMALL)
    values |= {"num_patches": 16} if family == "Siglip2" else {"image_size": 32}
    if not family.startswith("Dinov2"):
        values["intermediate_size"] = 64
    config = getattr(transformers, CONFIG_OF[family])(**values)
    try:
        config = type(config)(**values | {name: value})
        original = build(TOWER[family], config)
    except (ValueError, TypeError, KeyError, RuntimeError) as refused_by_itself:
        pytest.skip(f"transformers itself: {refused_by_itself}")
    try:
        backbone = load_backbone(original)
    except TwinRefused as refused:
        assert type(original).__name__ in str(refused) and len(str(refused)) > 60
        return
    images = images_for(backbone)
    with torch.no_grad():
        expected = reader.tokens_of(original, images)
        assert error(backbone.forward_features(images), expected) <= 1e-6
    assert support.unsupported_reason(backbone) is None


# ---- what is refused ---------------------------------------------


def test_what_no_twin_follows_is_named():
    for act in ("gelu_new", "mish"):
        with pytest.raises(TwinRefused, match=r"hidden_act .*known: gelu,"):
            load_backbone(tower("ViT", hidden_act=act))
    original = tower("ViT")
    original.layers[1].register_forward_hook(lambda *a: None)
    with pytest.raises(TwinRefused, match=r"hook is registered on layers\.1"):
        load_backbone(original)
    original = tower("CLIP")
    original.encoder.layers[0].mlp.fc1 = nn.Sequential(original.encoder.layers[0].mlp.fc1)
    with pytest.raises(TwinRefused, match=r"encoder\.layers\.0\.mlp\.fc1 is a .*Sequential"):
        load_backbone(original)
    original = tower("Dinov2")
    original.forward = original.forward
    with pytest.raises(TwinRefused, match="forward of the model was replaced"):
        load_backbone(original)
    with pytest.raises(TwinRefused, match=r"ViTForMaskedImageModeling of transformers has no twin"):
        load_backbone(
            build("ViTForMaskedImageModeling", transformers.ViTConfig(**SMALL, image_size=32))
        )
    with pytest.raises(TwinRefused, match="several dtypes"):
        mixed = tower("ViT")
        mixed.layernorm.half()
        load_backbone(mixed)
    with pytest.raises(ValueError, match="num_heads: a model of transformers takes img_size"):
        load_backbone(tower("ViT"), num_heads=3)


def test_a_value_changed_by_hand_is_followed_where_it_is_used():
    original = tower("ViT", layer_norm_eps=1e-6)
    original.layers[0].layernorm_before.eps = 0.5
    backbone = load_backbone(original)
    images = images_for(backbone)
    with torch.no_grad():
        assert error(backbone.forward_features(images), reader.tokens_of(original, images)) <= 1e-6
    original.layers[0].attention.scaling = 0.7
    with pytest.raises(TwinRefused, match=r"attention scale 0\.7"):
        load_backbone(original)


@pytest.mark.parametrize("family", ["ViT", "DeiT", "CLIP", "Siglip", "Dinov2", "DINOv3ViT"])
def test_another_image_size_by_the_originals_own_interpolation(family):
    original = tower(family, image_size=32, patch_size=8)
    backbone = load_backbone(original, img_size=(40, 40))
    images = images_for(backbone)
    assert images.shape[2:] == (40, 40)
    with torch.no_grad():
        assert error(backbone.forward_features(images), reader.tokens_of(original, images)) <= 1e-6


# ---- preprocessing -----------------------------------------------


def test_the_processor_becomes_the_preprocessing(tmp_path):
    original = tower("Dinov2", image_size=24, patch_size=4)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        resample=3,
    )
    about = load_backbone(original, processor=processor).pretrained_cfg
    assert about["input_size"] == (3, 16, 16)
    assert about["mean"] == (0.1, 0.2, 0.3) and about["std"] == (0.4, 0.5, 0.6)
    assert about["interpolation"] == "bicubic" and about["crop_pct"] == 0.8
    # beside the weights
    original.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert backbone.patch_embed.img_size == (16, 16)
    again = transformers.Dinov2Model.from_pretrained(tmp_path)
    assert load_backbone(again).pretrained_cfg["std"] == (0.4, 0.5, 0.6)
    images = images_for(backbone)
    with torch.no_grad():
        assert error(backbone.forward_features(images), reader.tokens_of(again, images)) <= 1e-6


def test_a_processor_that_fits_no_image_of_the_model_is_refused():
    with pytest.raises(TwinRefused, match=r"makes images of 20x20 pixels, the model takes 32x32"):
        load_backbone(
            tower("ViT", image_size=32, patch_size=8),
            processor={"size": {"height": 20, "width": 20}, "do_normalize": False},
        )
    with pytest.raises(TwinRefused, match="do_pad=True is not known"):
        load_backbone(tower("ViT"), processor={"do_pad": True})


def test_processors_pixels_equal_timms(tmp_path):
    """The whole way: a picture through the processor and through timm's transform of the twin."""
    import numpy as np
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    rng = np.random.default_rng(0)
    picture = Image.fromarray(
        rng.integers(0, 255, (50, 70, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1)
    )
    original = tower("ViT", image_size=32, patch_size=8)
    for settings in (
        {"size": {"height": 32, "width": 32}, "resample": 2},
        {"size": {"height": 40, "width": 40}, "resample": 3, "do_center_crop": True,
         "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 32}, "resample": 2, "rescale_factor": 1 / 127.5},
    ):  # fmt: skip
        processor = (
            transformers.ViTImageProcessorPil(**settings)
            if hasattr(transformers, "ViTImageProcessorPil")
            else transformers.ViTImageProcessor(**settings)
        )
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        backbone = load_backbone(original, processor=processor)
        transform = create_transform(**resolve_model_data_config(backbone))
        # resampling by two libraries: a pixel may be rounded the other way
        assert (transform(picture) - expected).abs().max() <= 0.03, settings
