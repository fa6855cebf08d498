"""Real widths in float32, where the products run by oneDNN: timm's numbers to its own rounding."""

from __future__ import annotations

import pytest
import timm
import torch
from test_backbone_exact import randomize
from test_backbone_works_with import gradients, relative
from torch.utils._python_dispatch import TorchDispatchMode

import pgn_fast
from pgn_fast.backbone.options import FastOptions
from pgn_fast.backbone.schedule import PromptSchedule
from pgn_fast.ops import onednn, prompted_patch_embed


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
        tokens = vpt.engine.encode(images, PromptSchedule("append", {0: none}))
        assert relative(tokens, backbone.forward_features(images)) <= 1e-5
    for model in (vpt, pgn_fast.PGN(backbone, 5, num_prompts=4, library_size=16)):
        logits, expected = model(images), model.forward_reference(images)
        assert relative(logits, expected) <= 1e-5
        pairs = zip(gradients(model, logits), gradients(model, expected), strict=True)
        assert all(relative(a, b) <= 2e-4 for a, b in pairs)


needs_onednn = pytest.mark.skipif(
    onednn.missing() is not None, reason=f"no oneDNN: {onednn.missing()}"
)
OPS = {"prompted_patch_embed", "frozen_linear", "add_layer_norm", "prompt_attention"}


@needs_onednn
@pytest.mark.parametrize("build", [pgn_fast.VPT, pgn_fast.PGN])
def test_every_op_runs_in_the_engine_unless_plain_torch_is_named(build) -> None:
    backbone, images = wide("vit_base_patch16_224"), torch.randn(4, 3, 96, 96)
    for backend, runs in ((None, "backend cpu"), ("reference", "eager PyTorch")):
        model = build(backbone, 5, num_prompts=3, backend=backend)
        assert f"linear layers: {runs}" in model.explain()
        assert f"residual and norm: {runs}" in model.explain()
        with Called() as called:
            model(images)
        ours = {name.removeprefix("pgn_fast::") for name in called.names if "pgn_fast::" in name}
        assert ours & OPS == (OPS if backend is None else set())


@needs_onednn
def test_large_products_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    multiply = onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *a: calls.append(a[0].shape) or multiply(*a))
    model = pgn_fast.VPT(wide("vit_base_patch16_224"), 5, num_prompts=3)
    calls.clear()
    model(torch.randn(4, 3, 96, 96)).sum().backward()
    tokens = (4, 37)  # forward qkv, projection, fc1, fc2; backward fc2, fc1, projection
    assert sum(shape[:2] == tokens for shape in calls) == 7
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        weight = model.backbone.patch_embed.proj.weight
        prompted_patch_embed(torch.randn(4, 3, 96, 96), weight, *(None,) * 5)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


def test_quick_gelu_is_folded() -> None:
    model = pgn_fast.VPT(wide("vit_base_patch32_clip_quickgelu_224"), 5, num_prompts=3)
    acts = {type(w.act) for w in model.engine.cache.weights(torch.float32)}
    assert acts == {torch.nn.SiLU}


def test_packed_engine_equals_the_plain_one() -> None:
    backbone, images = wide("vit_base_patch16_224"), torch.randn(4, 3, 96, 96)
    plain = pgn_fast.VPT(backbone, 5, num_prompts=3)
    packed = pgn_fast.VPT(backbone, 5, num_prompts=3, fast=FastOptions(packed=True))
    packed.load_adapter_state_dict(plain.adapter_state_dict())
    ours, expected = packed(images), plain(images)
    assert relative(ours, expected) <= 2e-6
    pairs = zip(gradients(packed, ours), gradients(plain, expected), strict=True)
    assert all(relative(a, b) <= 2e-5 for a, b in pairs)
