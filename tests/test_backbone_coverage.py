"""Every backbone of the first two tiers, made small: timm's numbers without prompts, the
reference's with them. Backbones that the engine does not know run by the reference, and say so."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from small_world import skip_what_older_timm_cannot
from test_backbone_exact import randomize
from torch import nn

import pgn_fast
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.readout import pool
from pgn_fast.backbone.schedule import PromptSchedule

TIER_1 = """
    vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 vit_large_patch16_224
    vit_base_patch32_224 vit_base_patch16_384 vit_base_patch8_224
    deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224
    vit_base_patch32_clip_224 vit_base_patch16_clip_224
    vit_base_patch32_clip_quickgelu_224 vit_base_patch16_clip_quickgelu_224
    vit_large_patch14_clip_224 vit_large_patch14_clip_336 vit_large_patch14_clip_quickgelu_224
    vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2
    vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2
    test_vit test_vit2 test_vit3
"""
TIER_2 = """
    vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224 vit_so400m_patch14_siglip_224
    deit3_small_patch16_224 deit3_base_patch16_224 deit3_large_patch16_224
    deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224
    deit_base_distilled_patch16_224 flexivit_small flexivit_base flexivit_large
    vit_giant_patch14_dinov2 vit_huge_patch14_clip_224
    vit_small_patch16_dinov3 vit_small_plus_patch16_dinov3 vit_base_patch16_dinov3
    eva02_tiny_patch14_224 eva02_base_patch14_224 eva02_base_patch16_clip_224
    eva_large_patch14_196 eva_giant_patch14_224
    vit_small_patch16_rope_224 vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224
    vit_small_patch16_rope_mixed_ape_224 vit_base_patch16_rope_reg1_gap_256
    vit_pe_core_base_patch16_224 vit_pe_lang_large_patch14_448 vit_pe_spatial_base_patch16_512
    vit_medium_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_256
    aimv2_large_patch14_224 beit3_base_patch16_224
    beit_base_patch16_224 beitv2_base_patch16_224
    vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_relpos_medium_patch16_cls_224
"""
# name -> the word that its reason must have
BY_REFERENCE = {
    "vit_base_patch16_rpn_224": "ResPostBlock",
    "vit_relpos_small_patch16_rpn_224": "ResPostRelPosBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
}


def tiny(name: str) -> nn.Module:
    """The named backbone with two blocks of width 48 on 3 x 3 patches, in float64."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    skip_what_older_timm_cannot(name)
    options = {"depth": 2, "num_classes": 0}
    if not name.startswith("test_"):
        patch = re.search(r"patch(\d+)", name)
        size = 3 * int(patch.group(1)) if patch else 48
        options |= {"embed_dim": 48, "num_heads": 3, "img_size": size}
    return randomize(timm.create_model(name, **options).double())


@pytest.mark.parametrize("name", TIER_1.split() + TIER_2.split())
def test_backbone_runs_on_the_engine(name: str) -> None:
    backbone = tiny(name)
    assert FastBackbone(backbone).cache.unsupported_reason is None
    check_numbers(backbone)


@pytest.mark.parametrize("name", BY_REFERENCE)
def test_unknown_blocks_run_by_the_reference(name: str) -> None:
    backbone = tiny(name)
    assert BY_REFERENCE[name] in (FastBackbone(backbone).cache.unsupported_reason or "")
    check_numbers(backbone)


def check_numbers(backbone: nn.Module) -> None:
    images = torch.randn(2, 3, *backbone.patch_embed.img_size, dtype=torch.float64)
    none = torch.zeros(0, backbone.embed_dim, dtype=torch.float64)
    with torch.no_grad():
        own = backbone.forward_features(images)
        for position in ("append", "prepend"):
            tokens = FastBackbone(backbone).encode(images, PromptSchedule(position, {0: none}))
            assert_close(tokens, own, 1e-9)

    generator = nn.Sequential(nn.Flatten(), nn.LazyLinear(3 * 8)).double()
    generator(images)
    for model in (
        pgn_fast.VPT(backbone, 5, num_prompts=3),
        pgn_fast.VPT(backbone, 5, num_prompts=3, deep=False),
        pgn_fast.PGN(
            backbone, 5, num_prompts=3, library_size=8, generator=generator, resolution=None
        ),
    ):
        logits, expected = model(images), model.forward_reference(images)
        assert_close(logits, expected, 1e-9)
        weights = model.trainable_parameters()
        weight = torch.randn_like(logits)
        actual = torch.autograd.grad((logits * weight).sum(), weights)
        wanted = torch.autograd.grad((expected * weight).sum(), weights)
        for a, b in zip(actual, wanted, strict=True):
            assert b.abs().max() > 0
            assert_close(a, b, 1e-8)
        # pooling sees the backbone's own tokens only
        with torch.no_grad():
            features = model.forward_features(images)
            assert features.shape == own.shape
            assert_close(model.head(pool(backbone, features)), logits, 1e-9)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
