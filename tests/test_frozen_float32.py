"""Real widths in float32, where the products run by oneDNN: timm's numbers to its own rounding."""

from __future__ import annotations

import pytest
import timm
import torch
from test_frozen_exact import randomize
from test_frozen_works_with import relative
from torch.utils._python_dispatch import TorchDispatchMode

import pgn_fast
from pgn_fast.frozen.plan import FastOptions
from pgn_fast.frozen.schedule import PromptSchedule
from pgn_fast.ops import onednn


class Called(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def wide(name: str):
    size = {"img_size": 6 * 14} if "patch14" in name else {"img_size": 96}
    return randomize(timm.create_model(name, depth=2, num_classes=0, **size))


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "deit_small_distilled_patch16_224",
        "eva02_base_patch14_224",
    ],
)
def test_equals_timm(name: str) -> None:
    backbone = wide(name)
    images = torch.randn(8, 3, *backbone.patch_embed.img_size)
    none = torch.zeros(0, backbone.embed_dim)
    vpt = pgn_fast.VPT(backbone, 5, num_prompts=10)
    with torch.no_grad():
        tokens = vpt.trunk.encode(images, PromptSchedule("append", {0: none}))
        assert relative(tokens, backbone.forward_features(images)) <= 1e-5
    for model in (vpt, pgn_fast.PGN(backbone, 5, num_prompts=4, library_size=16)):
        logits, expected = model(images), model.forward_reference(images)
        assert relative(logits, expected) <= 1e-5
        weights = model.trainable_parameters()
        pairs = zip(
            torch.autograd.grad(logits.square().mean(), weights),
            torch.autograd.grad(expected.square().mean(), weights),
            strict=True,
        )
        assert all(relative(a, b) <= 2e-4 for a, b in pairs)


@pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN: {onednn.missing()}")
def test_large_products_run_by_onednn_unless_plain_torch_is_named() -> None:
    backbone, images = wide("vit_base_patch16_224"), torch.randn(4, 3, 96, 96)
    product = "pgn_fast::frozen_linear"
    for backend, runs in ((None, "backend cpu"), ("reference", "plain torch")):
        model = pgn_fast.VPT(backbone, 5, num_prompts=3, backend=backend)
        assert f"matrix products: {runs}" in model.explain()
        with Called() as called:
            model(images)
        assert (product in called.names) == (backend is None)


def test_packed_engine_equals_the_plain_one() -> None:
    backbone, images = wide("vit_base_patch16_224"), torch.randn(4, 3, 96, 96)
    plain = pgn_fast.VPT(backbone, 5, num_prompts=3)
    packed = pgn_fast.VPT(backbone, 5, num_prompts=3, fast=FastOptions(packed=True))
    packed.load_adapter_state_dict(plain.adapter_state_dict())
    ours, expected = packed(images), plain(images)
    assert relative(ours, expected) <= 2e-6
    pairs = zip(
        torch.autograd.grad(ours.sum(), packed.trainable_parameters()),
        torch.autograd.grad(expected.sum(), plain.trainable_parameters()),
        strict=True,
    )
    assert all(relative(a, b) <= 2e-5 for a, b in pairs)
