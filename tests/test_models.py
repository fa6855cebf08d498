"""PGN and VPT as modules: what they compute on every kind of backbone, and what they refuse."""

from __future__ import annotations

import copy
import math
import re

import huggingface_hub
import pytest
import timm
import torch
from small_world import skip_what_older_timm_cannot
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from pgn_fast import PGN, VPT, PromptedViT, PromptGenerator, hub
from pgn_fast.backbone.load import load_backbone
from pgn_fast.models.base import POOLS
from pgn_fast.models.vpt import TOKEN_LOCATIONS
from pgn_fast.prompts.pixels import LOCATIONS as PIXEL_LOCATIONS

# name -> what about it is special; built small, see `backbone`
NAMES = {
    "vit_base_patch16_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},  # norm_pre, patch projection without bias
    "vit_base_patch16_siglip_224": {},  # no prefix token, attention pool
    "vit_base_patch16_siglip_gap_224": {},  # no prefix token, average pool
    "vit_small_patch14_reg4_dinov2": {},  # registers, LayerScale, no position for prefix tokens
    "vit_betwixt_patch16_reg4_gap_256": {},  # registers, average pool, fc_norm
    "deit_tiny_distilled_patch16_224": {},  # two prefix tokens, two heads
    "deit3_small_patch16_224": {},  # no position for the class token
    "aimv2_large_patch14_224": {},  # no prefix token, gated MLP, RMS norm
    "vit_pe_core_tiny_patch16_384": {},  # Eva with attention pool
    "eva02_tiny_patch14_224": {},  # Eva: rotary positions, SwiGLU
    "vit_small_patch16_dinov3": {},  # Eva with registers
    "vit_small_patch16_rope_mixed_224": {},  # Eva with positions of each block's own
    "beit_base_patch16_224": {},  # relative position bias in every block
    "vit_relpos_small_patch16_224": {},  # the same by a small network, no position embedding
}


def tiny(name: str = "vit_base_patch16_224", **kwargs) -> nn.Module:
    """A timm model cut down to 2 blocks of width 32 on 32 x 32 pixels; no weight is trivial."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(1)
    skip_what_older_timm_cannot(name)
    backbone = timm.create_model(name, **{**sizes, "num_classes": 7, **kwargs})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone


def images(count: int = 3, channels: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(2))


def classes(kwargs: dict) -> int | None:
    """Five classes for a new head; other heads know their own number."""
    return 5 if kwargs.get("head", "linear") == "linear" else None


def pgn(backbone: nn.Module | None = None, num_classes: int | None = ..., **kwargs) -> PGN:
    num_classes = classes(kwargs) if num_classes is ... else num_classes
    small = {"num_prompts": 3, "library_size": 8, "resolution": 32}
    kwargs = {"generator_kwargs": {"channels": 4, "groups": 2}, **small, **kwargs}
    return PGN(backbone or tiny(), num_classes, **kwargs)


def vpt(backbone: nn.Module | None = None, num_classes: int | None = ..., **kwargs) -> VPT:
    num_classes = classes(kwargs) if num_classes is ... else num_classes
    return VPT(backbone or tiny(), num_classes, **{"num_prompts": 3, **kwargs})


def by_hand(backbone: nn.Module, x: torch.Tensor, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Tokens without prompts, from one set of prompts (B, P, D) per block or one in all.

    On a copy whose blocks are told that prompts are prefix tokens: their place among the tokens is
    nothing to attention, so this is the oracle for prompts after the patches, too.
    """
    backbone = copy.deepcopy(backbone)
    num_prefix, num_prompts, rope = backbone.num_prefix_tokens, prompts[0].shape[1], None
    x = backbone.patch_embed(x)
    if hasattr(backbone, "_pos_embed"):
        x = backbone._pos_embed(x)
        x, rope = x if isinstance(x, tuple) else (x, None)
    elif num_prefix:  # BEiT
        x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
    for i, block in enumerate(backbone.blocks):
        if i < len(prompts):
            patches = x[:, num_prefix + (num_prompts if i else 0) :]
            x = torch.cat([x[:, :num_prefix], prompts[i], patches], dim=1)
        if i == 0 and hasattr(backbone, "norm_pre"):
            x = backbone.norm_pre(x)
        if isinstance(backbone, Eva):
            block.attn.num_prefix_tokens += num_prompts
            x = block(x, rope=rope[i] if backbone.rope_mixed else rope)
        elif hasattr(block.attn, "_get_rel_pos_bias") or hasattr(block.attn, "rel_pos"):
            owner, method = getattr(block.attn, "rel_pos", block.attn), "get_bias"
            method = method if hasattr(owner, method) else "_get_rel_pos_bias"
            bias = getattr(owner, method)()
            padded = bias.new_zeros(*bias.shape[:2], x.shape[1], x.shape[1])
            kept = torch.tensor([*range(num_prefix), *range(num_prefix + num_prompts, x.shape[1])])
            padded[..., kept[:, None], kept] = bias
            setattr(owner, method, lambda padded=padded: padded)
            x = block(x)
        else:
            x = block(x)
    x = backbone.norm(x)
    return torch.cat([x[:, :num_prefix], x[:, num_prefix + num_prompts :]], dim=1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_on_every_kind_of_backbone(name, fast):
    """PGN, VPT-Shallow and VPT-Deep against blocks run by hand; prompts never enter a pool."""
    backbone, x = tiny(name).double(), images().double()
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    for build, options in ((pgn, {}), (vpt, {"deep": False}), (vpt, {"deep": True})):
        model = build(backbone, head="keep", fast=fast, **options).eval()
        with torch.no_grad():
            prompts = [model.prompts(x)]
            if options.get("deep"):
                prompts += [p.expand(len(x), -1, -1) for p in model.prompter.prompts[1:]]
            want = by_hand(backbone, x, prompts)
            got = model.forward_features(x)
            assert got.shape == want.shape == backbone.forward_features(x).shape
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            logits = backbone.forward_head(want)
            torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(model.forward_reference(x), logits, rtol=1e-9, atol=1e-9)
            pooled = model.forward_head(got, pre_logits=True)
            assert pooled.shape == (len(x), model.num_features)
            assert not torch.allclose(logits, backbone(x))  # the prompts do something
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())
    assert all(
        block.attn.num_prefix_tokens == backbone.num_prefix_tokens
        for block in backbone.blocks
        if isinstance(backbone, Eva)
    )


@torch.no_grad()
def test_pgn_prompts_stand_behind_the_patches_and_vpt_prompts_before_them():
    x = images()
    for model, position in ((pgn(), slice(-3, None)), (vpt(deep=False), slice(1, 4))):
        seen = {}
        block = model.eval().backbone.blocks[0]
        block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(x=inputs[0]))
        model.forward_reference(x)
        assert seen["x"].shape == (3, 1 + 16 + 3, 32)
        torch.testing.assert_close(seen["x"][:, position], model.prompts(x))


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layers", [[0], [1], [3], [0, 1], [2, 3], [0, 2], [0, 3], [1, 3]], ids=str)
@pytest.mark.parametrize("expand", [True, False])
def test_layers_and_expand(layers, expand, fast):
    """Inserted at the first, replaced at each further one, kept or removed after the last."""
    backbone, x = tiny(depth=4).double(), images().double()
    model = vpt(backbone, layers=layers, expand=expand, head="keep", fast=fast).eval()
    assert model.prompter.prompts.shape == (len(layers), 3, 32)
    y = backbone._pos_embed(backbone.patch_embed(x))
    inside = False
    for i, block in enumerate(backbone.blocks):
        if i in layers:
            prompts = model.prompter.prompts[layers.index(i)].expand(len(x), -1, -1)
            y = torch.cat([y[:, :1], prompts, y[:, 4 if inside else 1 :]], dim=1)
            inside = True
        y = block(y)
        if i == max(layers) and not expand:
            y, inside = torch.cat([y[:, :1], y[:, 4:]], dim=1), False
    want = backbone.head(backbone.norm(y)[:, 0])
    torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    assert model.forward_features(x).shape == (3, 17, 32)


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("pool", POOLS)
def test_pools(name, pool, fast):
    model = vpt(tiny(name), pool=pool, fast=fast).eval()
    x = images()
    y, num_prefix = model._encode(*model._prompted(x, None)), model.backbone.num_prefix_tokens
    want = {
        "original": y[:, 0],
        "img_pool": y[:, num_prefix + 3 :].mean(1),
        "prompt_pool": y[:, num_prefix : num_prefix + 3].mean(1),
        "imgprompt_pool": y[:, num_prefix:].mean(1),
    }[pool]
    torch.testing.assert_close(model(x), model.head(want), rtol=1e-4, atol=1e-5)
    features = model.forward_features(x)
    if pool in ("original", "img_pool"):
        torch.testing.assert_close(model.forward_head(features), model(x), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="reads prompt tokens, which forward_features"):
            model.forward_head(features)


def test_shared_prompts_and_projection():
    x = images()
    shared = vpt(shared=True, fast=False)
    assert shared.prompter.prompts.shape == (1, 3, 32)
    single = vpt(shared.backbone, fast=False)
    single.head.load_state_dict(shared.head.state_dict())
    with torch.no_grad():
        single.prompter.prompts.copy_(shared.prompter.prompts.expand(2, -1, -1))
    assert torch.equal(shared(x), single(x))

    projected = vpt(project_dim=6)
    prompts, projection = projected.prompter.prompts, projected.prompter.projection
    assert prompts.shape == (2, 3, 6)
    assert (projection.in_features, projection.out_features) == (6, 32)
    first = projection(prompts[0]).expand(3, -1, -1)
    torch.testing.assert_close(projected.prompts(x), first)
    projected(x).sum().backward()
    assert prompts.grad[1].abs().sum() > 0
    assert projection.bias.grad.abs().sum() > 0


def test_dropout_acts_on_every_image_and_block_on_its_own():
    model, x = vpt(dropout=0.5, shared=True, num_prompts=16), images(1).expand(4, -1, -1, -1)
    _, schedule = model.train()._prompted(x, None)
    prompts = model.prompter.prompts[0]
    masks = []
    for layer in schedule.entries.values():
        assert layer.shape == (4, 16, 32)
        kept = layer != 0
        torch.testing.assert_close(layer[kept], (2 * prompts).expand_as(layer)[kept])
        assert 0.4 < kept.float().mean() < 0.6
        masks += list(kept)
    assert len(masks) == 2 * 4
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert not torch.allclose(model(x)[0], model(x)[1])
    model.eval()
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x)[0], model(x)[1])


@pytest.mark.parametrize("location", TOKEN_LOCATIONS + PIXEL_LOCATIONS)
def test_locations_train_only_what_is_theirs(location):
    model = vpt(tiny(img_size=40) if location == "pad" else None, location=location, num_prompts=4)
    frozen = copy.deepcopy(model.backbone.state_dict())
    x = images()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = [p.clone() for p in model.trainable_parameters()]
    F.cross_entropy(model.train()(x), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable_parameters())
    sgd.step()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, model.trainable_parameters(), strict=True)
    )
    assert all(torch.equal(frozen[n], t) for n, t in model.backbone.state_dict().items())
    assert model.eval()(x).shape == (3, 5)
    torch.testing.assert_close(model(x), model.forward_reference(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_padded_image_need_not_be_whole_patches():
    model = vpt(tiny(img_size=30, patch_size=4), location="pad", num_prompts=3)
    x = images(size=(24, 24))
    assert model.forward_features(x).shape == (3, 1 + 7 * 7, 32)
    padded = model.prompter.images(x)
    assert padded.shape == (3, 3, 30, 30)
    assert torch.equal(padded[:, :, 3:27, 3:27], x)
    with pytest.raises(ValueError, match=r"images are 30x30 pixels, this backbone takes 24x24"):
        model(images(size=(30, 30)))


@pytest.mark.parametrize("build", [pgn, vpt])
def test_frozen_stays_frozen(build):
    """No bit of the backbone changes, whatever the optimizer gets; all that is trained does."""
    backbone = tiny(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5)
    backbone.head_drop.p = 0.5
    backbone.train()
    model, x = build(backbone), images()
    assert model.train() is model
    assert model.training and model.prompter.training and model.head.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert torch.equal(model(x), model(x))  # no dropout of the backbone's is at work
    frozen = copy.deepcopy(model.backbone.state_dict())
    before = copy.deepcopy(model.adapter_state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert all(torch.equal(frozen[n], t) for n, t in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())
    unmoved = [n for n, t in model.adapter_state_dict().items() if torch.equal(t, before[n])]
    assert not unmoved
    assert model.eval() is model
    assert not model.prompter.training


def test_gradients_can_be_switched_but_not_the_backbones():
    model = vpt()
    assert model.requires_grad_(False) is model and model.trainable_parameters() == []
    assert model.requires_grad_(True) is model and len(model.trainable_parameters()) == 3
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_the_generators_batch_norm_learns_in_train_mode_only():
    model, x = pgn(), images()
    norm = model.prompter.generator.stem[1]
    model.eval()(x)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
    model.train()(x)
    assert norm.num_batches_tracked == 1 and norm.running_mean.any()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_generator_mixes_its_library(activation):
    generator = PromptGenerator(
        24, num_prompts=2, library_size=5, resolution=32, activation=activation
    )
    x = images()
    logits = generator.eval().mixture_logits(x)
    assert logits.shape == (3, 2, 5)
    mixture = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    assert torch.equal(generator.mixture(x), mixture)
    torch.testing.assert_close(generator(x), mixture @ generator.token_library)
    assert generator(x).shape == (3, 2, 24)


@torch.no_grad()
def test_generators_of_every_kind():
    x = images()
    own = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3 * 8))
    for generator, kwargs in (("resnet18", None), ("test_resnet", {"drop_rate": 0.1}), (own, None)):
        model = pgn(generator=generator, generator_kwargs=kwargs).eval()
        assert model.prompts(x).shape == (3, 3, 32)
        assert model(x).shape == (3, 5)
    assert pgn(generator=own, generator_kwargs=None).prompter.generator is own

    ready = PromptGenerator(32, num_prompts=2, library_size=4, resolution=48, activation="sigmoid")
    model = PGN(tiny(), 5, generator=ready)
    assert model.prompter is ready
    expected = {"num_prompts": 2, "library_size": 4, "resolution": 48, "activation": "sigmoid"}
    assert model.adapter_config.items() >= expected.items()
    assert model.num_prompts == 2


def test_a_module_can_be_the_token_library():
    class Library(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.randn(8, 32))

        def forward(self):
            return self.raw.tanh()

    library = Library()
    model = pgn(token_library=library)
    model(images()).sum().backward()
    assert library.raw.grad.abs().sum() > 0
    assert torch.equal(model.prompter.library(), library())
    with pytest.raises(ValueError, match=r"token_library yields \(8, 32\), .* \(9, 32\)"):
        pgn(token_library=Library(), library_size=9)


def test_initial_values():
    """The official ones: see the fixtures' READMEs."""
    model = PGN(tiny(embed_dim=64), 50, library_size=256)
    library = model.prompter.token_library
    assert library.shape == (256, 64)
    assert abs(library.std().item() - 0.02) < 5e-4 and abs(library.mean().item()) < 5e-4
    convolutions = [m for m in model.prompter.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 2 + 3
    for layer in convolutions:
        fan_out = layer.out_channels * math.prod(layer.kernel_size)
        expected = (2 / fan_out) ** 0.5
        assert abs(layer.weight.std().item() / expected - 1) < 0.15

    model = VPT(tiny(embed_dim=64), 50, num_prompts=200, project_dim=20, head_init="official")
    bound = (6 / (3 * 8 * 8 + 20)) ** 0.5
    prompts = model.prompter.prompts
    assert prompts.abs().max() <= bound and prompts.abs().max() > 0.99 * bound
    assert abs(prompts.std().item() / (bound / 3**0.5) - 1) < 0.05
    assert abs(model.prompter.projection.weight.std().item() / (2 / 64) ** 0.5 - 1) < 0.1
    assert abs(model.head.weight.std().item() / (2 / 50) ** 0.5 - 1) < 0.1
    assert torch.allclose(model.head.bias, torch.tensor(-math.log(99)))
    for location in ("pad", "prepend-pixel-imgnettransform"):
        for pixels in vpt(location=location).prompter.parameters():
            assert pixels.min() >= 0 and pixels.max() <= 1 and pixels.max() > 0.9


@torch.no_grad()
def test_zero_shot_head():
    backbone, x = tiny(), images()
    embeddings = torch.randn(4, 7)
    model = pgn(
        backbone, None, head="zero_shot", class_embeddings=embeddings, logit_scale=20
    ).eval()
    features = backbone.forward_head(model.forward_features(x))  # through the projection, (B, 7)
    want = 20 * F.normalize(features, dim=-1) @ F.normalize(embeddings, dim=-1).T
    torch.testing.assert_close(model(x), want)
    assert model.num_classes == 4
    assert list(model.head.parameters()) == []
    assert not any(n.startswith("head") for n, p in model.named_parameters() if p.requires_grad)

    # normalized once, at construction, and the caller's tensor is not looked at again
    torch.testing.assert_close(model.head.class_embeddings.norm(dim=-1), torch.ones(4))
    embeddings.zero_()
    torch.testing.assert_close(model(x), want)

    texts = torch.randn(4, 32)  # as wide as the tokens: pooled features, without the projection
    model = vpt(backbone, None, head="zero_shot", class_embeddings=texts).eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    want = 100 * F.normalize(pooled, dim=-1) @ F.normalize(texts, dim=-1).T
    torch.testing.assert_close(model(x), want)


def test_keep_module_and_no_head():
    backbone, x = tiny(), images()
    model = pgn(backbone, None, head="keep")
    assert model.num_classes == 7 and model.get_classifier() is backbone.head
    assert not any(n.startswith("head") for n in model.state_dict())
    assert len(list(model.named_parameters())) == len(set(map(id, model.parameters())))
    own = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 6))
    model = vpt(backbone, None, head=own)
    assert model.num_classes == 6 and model.get_classifier() is own
    assert model(x).shape == (3, 6)
    assert all(p.requires_grad for p in own.parameters())
    model = vpt(backbone, 0)
    assert model(x).shape == (3, 32) and model.num_classes == 0
    assert vpt(backbone, None).num_classes == 7  # as many as the backbone has


@torch.no_grad()
@pytest.mark.parametrize("head", ["keep", "linear"])
def test_both_of_deits_heads_are_kept(head):
    backbone, x = tiny("deit_tiny_distilled_patch16_224"), images()
    model = vpt(backbone, 7, head=head).eval()
    tokens = model.forward_features(x)
    if head == "keep":
        want = (backbone.head(tokens[:, 0]) + backbone.head_dist(tokens[:, 1])) / 2
        assert model.get_classifier() == (backbone.head, backbone.head_dist)
    else:
        want = model.head((tokens[:, 0] + tokens[:, 1]) / 2)
    torch.testing.assert_close(model(x), want)


def test_a_new_head_starts_near_chance():
    """Features of a final LayerNorm, few classes: ln C, where the official start is far above."""
    x, labels = images(64), torch.arange(64) % 6
    start = {
        init: nn.functional.cross_entropy(
            VPT(tiny(), 6, num_prompts=4, head_init=init)(x), labels
        ).item()
        for init in ("torch", "zero", "official")
    }
    assert start["zero"] == pytest.approx(math.log(6), abs=1e-6)
    assert start["torch"] < math.log(6) + 0.4 < start["official"]
    assert "head_init" not in VPT(tiny(), 6).adapter_config
    with pytest.raises(ValueError, match="head_init='best'; known: torch, zero, official"):
        VPT(tiny(), 6, head_init="best")


def test_reset_classifier():
    model, x = vpt(), images()
    model.reset_classifier(9)
    assert model(x).shape == (3, 9) and model.num_classes == 9
    model.reset_classifier(0)
    assert model(x).shape == (3, 32) and model.num_classes == 0
    model.reset_classifier(4, global_pool="token")
    with pytest.raises(ValueError, match="global_pool='avg': the frozen backbone pools by 'token'"):
        model.reset_classifier(4, global_pool="avg")


def test_parameter_counts_and_petfs_line(capsys):
    model = vpt(deep=False)
    own = 3 * 32 + 32 * 5 + 5
    total = own + sum(p.numel() for p in model.backbone.parameters())
    assert model.get_nb_trainable_parameters() == (own, total)
    assert sum(p.numel() for p in model.trainable_parameters()) == own
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {own:,d} || all params: {total:,d} || "
        f"trainable%: {100 * own / total:.4f}\n"
    )


def test_no_weight_decay_keeps_the_official_recipe():
    for model in (vpt(), pgn(), pgn(generator="test_vit", generator_kwargs={"img_size": 32})):
        names = model.no_weight_decay()
        assert {"backbone.cls_token", "backbone.pos_embed"} <= names
        # the official code decays the prompts and the library
        assert not names & {"prompter.prompts", "prompter.token_library"}
    assert "prompter.generator.pos_embed" in names


def test_adapter_state_is_small_and_whole():
    backbone = timm.create_model("vit_small_patch16_224", depth=1, num_classes=0)
    model = VPT(backbone, 10, num_prompts=5, deep=False)
    state = model.adapter_state_dict()
    assert set(state) == {"prompter.prompts", "head.weight", "head.bias"}
    assert sum(t.numel() * t.element_size() for t in state.values()) < 100_000

    for build in (pgn, vpt):
        source, target = build(), build()
        with torch.no_grad():
            for parameter in source.trainable_parameters():
                parameter.normal_()
        source.train()(images())  # batch-norm statistics travel with the rest
        assert not torch.equal(source.eval()(images()), target.eval()(images()))
        target.load_adapter_state_dict(source.adapter_state_dict())
        assert torch.equal(source(images()), target(images()))
        state = source.adapter_state_dict()
        state["surprise"] = state.pop("head.bias")
        with pytest.raises(RuntimeError, match=r"missing: 'head.bias'; unknown: 'surprise'"):
            target.load_adapter_state_dict(state)


def test_a_copy_stands_on_its_own():
    x = images()
    for options in ({"head": "keep"}, {"head": "zero_shot", "class_embeddings": torch.randn(4, 7)}):
        model = vpt(num_classes=None, **options).eval()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            want = model(x)
            assert torch.equal(twin(x), want)
            twin.backbone.head.weight.mul_(2)
            twin.prompter.prompts.add_(1)
            assert torch.equal(model(x), want)
            assert not torch.allclose(twin(x), want)


def test_the_reference_draws_the_same_dropout():
    """Same seed, same masks, same order: training with dropout can be compared, too."""
    model, x = vpt(tiny().double(), dropout=0.3).train(), images().double()
    outputs = []
    for call in (model, model.forward_reference):
        torch.manual_seed(3)
        logits = call(x)
        outputs.append((logits, *torch.autograd.grad(logits.sum(), model.trainable_parameters())))
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("build", [pgn, vpt])
def test_made_in_inference_mode(build):
    with torch.inference_mode():
        model, x = build().eval(), images()
        torch.testing.assert_close(model(x), model.forward_reference(x))


@pytest.mark.parametrize("build", [pgn, vpt])
def test_training_after_inference_mode(build):
    """Nothing that inference mode computed is kept where a gradient would need it."""
    model, x = build().eval(), images()
    with torch.inference_mode():
        want = model(x)
    logits = model(x)
    torch.testing.assert_close(logits, want)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters())


@torch.no_grad()
def test_two_models_share_one_backbone():
    backbone, x = tiny(), images()
    first, second = pgn(backbone).eval(), vpt(backbone).eval()
    assert first.backbone is second.backbone
    alone = first(x)
    second(x)
    assert torch.equal(first(x), alone)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_gradient_checkpointing_changes_no_number(name, fast):
    model, x = vpt(tiny(name).double(), fast=fast), images().double()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2]))
        grads.append(torch.autograd.grad(loss, model.trainable_parameters()))
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("build", [pgn, vpt])
def test_image_sizes_and_channels(build):
    dynamic = build(tiny(dynamic_img_size=True)).eval()
    assert dynamic.forward_features(images(size=(48, 40))).shape == (3, 1 + 6 * 5, 32)
    assert dynamic(images(size=(48, 40))).shape == (3, 5)
    padded = build(tiny(dynamic_img_size=True, dynamic_img_pad=True)).eval()
    assert padded.forward_features(images(size=(41, 33))).shape == (3, 1 + 6 * 5, 32)
    gray = build(tiny(in_chans=1)).eval()
    assert gray(images(channels=1)).shape == (3, 5)
    large = build(tiny(img_size=384, patch_size=32, depth=1)).eval()
    assert large(images(1, size=(384, 384))).shape == (1, 5)
    oblong = build(tiny(img_size=(32, 48))).eval()
    assert oblong(images(size=(32, 48))).shape == (3, 5)
    assert oblong(images(0, size=(32, 48))).shape == (0, 5)
    eva = build(tiny("eva02_tiny_patch14_224", dynamic_img_size=True)).eval()
    assert eva.forward_features(images(size=(48, 40))).shape == (3, 1 + 6 * 5, 32)


@pytest.mark.parametrize("build", [pgn, vpt])
def test_half_precision_backbones_train_float32_prompts(build):
    exact, x = build(tiny()), images()
    model = build(tiny().bfloat16())
    model.load_adapter_state_dict(exact.adapter_state_dict())
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    logits, want = model(x.bfloat16()), exact(x)
    assert logits.dtype == torch.float32
    assert (logits - want).abs().max() < 0.05 * want.abs().max()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        logits = exact(x)
    assert (logits - want).abs().max() < 0.05 * want.abs().max()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in exact.trainable_parameters())


@pytest.mark.parametrize("build", [pgn, vpt])
def test_one_graph(build):
    """torch.compile sees the whole model, without a break."""
    model, x = build(fast=False).eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images()[0], r"images must be \(B, C, H, W\), got \(3, 32, 32\); add a batch dimension"),
        (images().to(torch.int32), "floating-point, or uint8, got torch.int32"),
        (images().double(), "images are torch.float64, the backbone is torch.float32; cast one"),
        (images(channels=1), "images have 1 channels, the backbone takes 3"),
        (images(size=(48, 48)), r"images are 48x48 pixels, this backbone takes 32x32; resize"),
        (images().to("meta"), "images are on meta, the backbone is on cpu"),
    ],
    ids=["no batch", "integers", "dtype", "channels", "size", "device"],
)
@pytest.mark.parametrize("build", [pgn, vpt])
def test_bad_images_are_refused(build, bad, message):
    model = build().eval()
    for call in (model, model.forward_features, model.forward_reference, model.prompts):
        with pytest.raises(ValueError, match=message):
            call(bad)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize(
    ("build", "options"), [(pgn, {}), (vpt, {}), (vpt, {"location": "pad", "num_prompts": 2})]
)
def test_uint8_images_are_normalized_by_the_backbone(build, options, name):
    size = 32 - 2 * options.get("num_prompts", 0) if options else 32
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    model = build(tiny(name), **options)
    cfg = model.backbone.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    by_hand = (pixels / 255 - mean) / std
    for call in (model, model.forward_features, model.forward_reference):
        torch.testing.assert_close(call(pixels), call(by_hand), rtol=1e-4, atol=1e-4)
    model(pixels).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())


@pytest.mark.parametrize("location", ["below", "prepend-pixel"])
def test_uint8_images_under_autocast_and_with_prompts_in_pixels(location):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for model in (vpt(tiny(), location=location, num_prompts=1), pgn(tiny())):
        with torch.no_grad():
            exact = model(pixels)
            torch.testing.assert_close(exact, model.forward_reference(pixels), rtol=1e-4, atol=1e-4)
            with torch.autocast("cpu", torch.bfloat16):
                assert (model(pixels) - exact).abs().max() < 0.05 * exact.abs().max()


def test_uint8_images_need_a_known_mean_and_std():
    model = vpt(tiny(in_chans=1))
    model.backbone.pretrained_cfg = None
    with pytest.raises(ValueError, match="does not say by which mean and standard deviation"):
        model(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))


def test_images_that_are_no_whole_patches_are_refused():
    model = vpt(tiny(dynamic_img_size=True))
    with pytest.raises(ValueError, match="45x32 pixels are not whole patches of 8x8"):
        model(images(size=(45, 32)))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (pgn, {"num_prompts": 0}, "num_prompts takes a whole number from 1 .*, got 0"),
        (vpt, {"num_prompts": 0}, "num_prompts takes a whole number from 1 .*, got 0"),
        (vpt, {"num_prompts": 2.5}, "num_prompts takes a whole number from 1 .*, got 2.5"),
        (vpt, {"num_prompts": True}, "num_prompts takes a whole number"),
        (pgn, {"num_prompts": "5"}, "num_prompts takes a whole number from 1 .*, got '5'"),
        (pgn, {"library_size": 0}, "library_size takes a whole number from 1 .*, got 0"),
        (pgn, {"resolution": -3}, "resolution takes a whole number from 1 .* or None, got -3"),
        (
            pgn,
            {"backend": "gpu"},
            "backend takes one of 'reference', 'cpu', 'triton', 'cuda' or None, got 'gpu'",
        ),
        (pgn, {"activation": "relu"}, "activation takes one of 'softmax', 'sigmoid', got 'relu'"),
        (
            pgn,
            {"generator": "resnet99", "generator_kwargs": {}},
            "'resnet99' is neither 'resnet10' nor a timm model name",
        ),
        (
            pgn,
            {"generator_kwargs": {"groups": 0}},
            "groups takes a whole number from 1 to 8, got 0",
        ),
        (pgn, {"generator": nn.Flatten()}, "generator_kwargs .* already there"),
        (vpt, {"dropout": 1.0}, r"dropout takes a number in \[0, 1\), got 1.0"),
        (vpt, {"project_dim": 0}, "project_dim takes a whole number from 1"),
        (vpt, {"location": "above"}, "location='above'; known: prepend, add"),
        (vpt, {"pool": "max"}, "pool='max'; known: original"),
        (vpt, {"layers": [2]}, r"layers=\[2\] must be different block indices from 0 to 1"),
        (vpt, {"layers": [-1]}, "from 0 to 1"),
        (vpt, {"layers": [0, 0]}, "different block indices"),
        (vpt, {"layers": []}, "different block indices"),
        (vpt, {"layers": [0], "deep": False}, "give one"),
        (vpt, {"location": "add", "expand": False}, "expand=False removes prompt tokens"),
        (vpt, {"location": "add", "pool": "prompt_pool"}, "none are there after the last block"),
        (vpt, {"expand": False, "pool": "prompt_pool"}, "none are there after the last block"),
        (vpt, {"location": "pad", "dropout": 0.1, "shared": True}, "shared, dropout cannot apply"),
        (vpt, {"location": "pad", "num_prompts": 16}, "leaves no image inside"),
        (vpt, {"head": "mlp"}, "head takes one of 'linear', 'keep', 'zero_shot', got 'mlp'"),
        (vpt, {"head": "zero_shot"}, r"needs class_embeddings \(C, E\)"),
        (vpt, {"class_embeddings": torch.ones(5, 7)}, "head='linear' does not use them"),
        (vpt, {"num_classes": 5, "head": "keep"}, "num_classes=5, but head='keep' has 7"),
        (vpt, {"num_classes": -1}, "num_classes takes a whole number from 0"),
        (
            vpt,
            {"head": "zero_shot", "class_embeddings": torch.ones(5, 9)},
            "9 wide, but this backbone's features are 32 wide and its head gives 7",
        ),
        (
            vpt,
            {"num_classes": 5, "head": "zero_shot", "class_embeddings": torch.ones(4, 7)},
            "num_classes=5, but head='zero_shot' has 4",
        ),
        (vpt, {"head": "zero_shot", "class_embeddings": torch.ones(7)}, "must be floating-point"),
    ],
)
def test_bad_arguments_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("location", ["add", "pad", "below"])
def test_prompts_for_one_image_size_refuse_another(location):
    """A backbone of dynamic size takes it, the prompts do not."""
    model = vpt(tiny(dynamic_img_size=True), location=location, num_prompts=4)
    own = 24 if location == "pad" else 32
    assert model(images(size=(own, own))).shape == (3, 5)
    with pytest.raises(ValueError, match=f"of location='{location}' were made for {own}x{own}"):
        model(images(size=(own + 8, own)))


@torch.no_grad()
@pytest.mark.parametrize("location", [*TOKEN_LOCATIONS, *PIXEL_LOCATIONS])
def test_first_prompts_of_every_location(location):
    x = images(size=(24, 24)) if location == "pad" else images()
    model = vpt(location=location, num_prompts=4).eval()
    count = {"add": 17, "add-1": 1}.get(location, 4)
    if location in ("pad", "below"):
        with pytest.raises(ValueError, match="prompts the image itself; it has no tokens"):
            model.prompts(x)
    else:
        assert model.prompts(x).shape == (3, count, 32)
    assert model.forward_features(x).shape == (3, 17, 32)


@torch.no_grad()
@pytest.mark.parametrize("build", [pgn, vpt])
def test_a_convolutional_stem(build):
    """timm's hybrids run by the reference path; pixel prompts have no patch projection to widen."""
    backbone = tiny("vit_tiny_r_s16_p8_224", img_size=64, patch_size=1)
    model = build(backbone).eval()
    x = images(size=(64, 64))
    torch.testing.assert_close(model(x), model.forward_reference(x), rtol=1e-4, atol=1e-5)
    tokens = backbone._pos_embed(backbone.patch_embed(x))
    assert model.forward_features(x).shape == tokens.shape
    with pytest.raises(ValueError, match="works on the pixels of the patch projection"):
        vpt(backbone, location="below")


@torch.no_grad()
def test_no_pooling_gives_logits_of_every_token_but_prompts():
    model = pgn(tiny(global_pool="")).eval()
    assert model(images()).shape == (3, 17, 5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("build", [pgn, vpt])
def test_gradients_reach_the_images_where_asked(build, fast):
    model = build(tiny().double(), fast=fast).eval()
    x = images().double().requires_grad_()
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    (want,) = torch.autograd.grad(model.forward_reference(x).square().sum(), x)
    assert got.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_more_arguments_that_contradict_each_other():
    ready = PromptGenerator(16, num_prompts=2, library_size=4)
    with pytest.raises(ValueError, match="prompts of width 16, the backbone's tokens are 32 wide"):
        PGN(tiny(), 5, generator=ready)
    with pytest.raises(ValueError, match="leave out generator_kwargs and token_library"):
        PGN(tiny(), 5, generator=ready, generator_kwargs={"groups": 2})
    with pytest.raises(ValueError, match="head='keep': this backbone has none"):
        vpt(tiny(num_classes=0), None, head="keep")
    with pytest.raises(ValueError, match="3 channels; this backbone has 1"):
        vpt(tiny(in_chans=1), location="pad")
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 23))
    with pytest.raises(ValueError, match=r"generator: Sequential gives \(3, 23\); .* \(3, 24\)"):
        pgn(generator=wrong, generator_kwargs=None)(images())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "Swin attends inside windows"),
        ("swinv2_tiny_window8_256", "Swin attends inside windows"),
        ("hiera_tiny_224", "Hiera attends inside windows"),
        ("samvit_base_patch16", "SAM's blocks work on an image grid"),
        ("cait_xxs24_224", "CaiT adds its class token only after"),
        ("xcit_nano_12_p16_224", "XCiT attends between channels"),
    ],
)
def test_other_transformers_are_refused_by_name_and_as_modules(name, reason):
    message = f"{re.escape(name)} is not supported: .*{reason}"
    for build in (pgn, vpt):
        with pytest.raises(ValueError, match=message):
            build(name)
    with torch.device("meta"):
        module = timm.create_model(name)
    with pytest.raises(ValueError, match=f"{type(module).__name__} is not supported: .*{reason}"):
        load_backbone(module)


def test_what_is_no_backbone_at_all_is_refused():
    with pytest.raises(ValueError, match="ResNet is not a vision transformer that prompts can"):
        load_backbone(timm.create_model("test_resnet"))
    with pytest.raises(ValueError, match="Linear is not a vision transformer"):
        pgn(nn.Linear(3, 3))
    with pytest.raises(
        TypeError, match=r"takes a vision transformer of timm, .* or a name, got int"
    ):
        load_backbone(3)
    with pytest.raises(ValueError, match="no model named 'vit_base_patch16_2244'; near it: vit_"):
        load_backbone("vit_base_patch16_2244")
    with pytest.raises(ValueError, match="num_classes: given with a model that is already there"):
        load_backbone(tiny(), num_classes=3)


def test_backbones_by_name(monkeypatch):
    backbone = load_backbone("test_vit", pretrained=False)
    assert isinstance(backbone, VisionTransformer) and not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())

    def offline(name, pretrained, **kwargs):
        assert pretrained  # a frozen backbone of random weights is of no use
        raise OSError("no route to host")

    demo = load_backbone("pgn_demo_vit")
    assert isinstance(demo, VisionTransformer) and not demo.training
    assert PGN("pgn_demo_vit", 5, resolution=32).prompter.embed_dim == demo.embed_dim
    with pytest.raises(ValueError, match="pgn_demo_vit has one size, it does not take img_size"):
        load_backbone("pgn_demo_vit", img_size=64)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    failed = r"the pretrained weights of 'test_vit' could not be loaded \("
    for reachable, reason in (
        (True, r"no route to host\)\. Without a network, give a local file"),
        (False, r"\S+ does not answer \(HF_ENDPOINT names another\), and it is not in"),
    ):
        monkeypatch.setattr(hub, "reachable", lambda answer=reachable: answer)
        with pytest.raises(RuntimeError, match=failed + reason):
            pgn("test_vit")


def test_both_are_prompted_vits():
    for model in (pgn(), vpt()):
        assert isinstance(model, PromptedViT)
        assert model.embed_dim == model.num_features == 32
        assert model.num_prompts == 3 and model.num_classes == 5
        assert model.pretrained_cfg is model.backbone.pretrained_cfg
        assert isinstance(model.explain(), str) and model.explain()


@pytest.mark.parametrize("training", [True, False])
def test_generator_gradients_do_not_depend_on_the_layout_of_images(training):
    generator = PromptGenerator(8, num_prompts=2, library_size=4, resolution=64).train(training)
    images = torch.randn(3, 3, 64, 64)
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        prompts = generator(images.contiguous(memory_format=layout))
        grads.append(torch.autograd.grad(prompts.square().sum(), list(generator.parameters())))
    for plain, last in zip(*grads, strict=True):
        torch.testing.assert_close(last, plain)
