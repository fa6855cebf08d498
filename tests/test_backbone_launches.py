"""How many kernels a step launches where the host's launches are what it waits for: few batches of
few images on a GPU, seen here as operations that reach the dispatcher."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import timm
import torch
from test_backbone_exact import randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pgn_fast
from pgn_fast.backbone import cache, splitting
from pgn_fast.backbone.options import FastOptions

# operations that launch nothing: views, and memory that is only set aside
VIEWS = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "alias", "detach"),
    *("t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "unflatten", "lift_fresh"),
    *("select", "slice", "split", "split_with_sizes", "chunk", "unbind"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """No copies of the weights, no kernel of ours: eager PyTorch, as CUDA's default is."""
    monkeypatch.setattr(cache, "copies_unsupported_reason", lambda backbone: "as on a GPU")


def backbone(depth: int = 12, **changes) -> nn.Module:
    options = {"depth": depth, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8}
    return randomize(timm.create_model("vit_base_patch16_224", num_classes=0, **options | changes))


def step(model: nn.Module, forward, images: Tensor) -> tuple[Tensor, ...]:
    labels = torch.zeros(len(images), dtype=torch.long)
    loss = nn.functional.cross_entropy(forward(images), labels)
    return torch.autograd.grad(loss, model.trainable_parameters())


def launches(run) -> Counter[str]:
    run()
    with Launches() as seen:
        run()
    return seen.seen


@pytest.mark.parametrize("method, most", [("VPT", 320), ("PGN", 400)])
def test_a_training_step_of_few_images(method, most) -> None:
    model = getattr(pgn_fast, method)(backbone(), 10, num_prompts=5, backend="reference")
    seen = launches(lambda: step(model, model, torch.randn(2, 3, 32, 32)))
    assert seen.total() < most, seen


def test_an_inference_of_few_images() -> None:
    model = pgn_fast.VPT(backbone(), 10, num_prompts=5, backend="reference").eval()
    seen = launches(lambda: torch.no_grad()(model)(torch.randn(2, 3, 32, 32)))
    assert seen.total() < 180, seen


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, {}),
        ({"init_values": 0.3, "qk_norm": True}, {}),
        ({"qkv_bias": False}, {}),
        ({"pre_norm": True}, {}),
        ({}, {"deep": False}),
        ({}, {"layers": [0, 2]}),
        ({}, {"fast": "min"}),
        ({}, {"fast": "balanced"}),
        ({}, {"fast": FastOptions(kv_only=False)}),
        ({}, {"dropout": 0.2}),
        ({}, {"shared": True}),
    ],
)
def test_the_numbers_stay(monkeypatch, changes, options, few) -> None:
    """Logits and gradients by the reference path, for few tokens and for many."""
    monkeypatch.setattr("pgn_fast.backbone.splitting.HOST_BOUND_TOKENS", 10**6 if few else 0)
    vit = backbone(3, **changes).double()
    model = pgn_fast.VPT(vit, 5, num_prompts=4, backend="reference", **options).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(0)
    ours = step(model, model, images)
    torch.manual_seed(0)
    theirs = step(model, model.forward_reference, images)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_trained_prompts_on_a_half_precision_backbone_are_cast_once() -> None:
    model = pgn_fast.VPT(backbone().to(torch.bfloat16), 10, num_prompts=5, backend="reference")
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    seen = launches(lambda: step(model, lambda x: model(x).float(), images))
    assert seen["_to_copy"] < 12, seen


def test_second_derivatives_are_those_of_plain_views() -> None:
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    split = lambda x: torch.cat(
        [p.square().sum().view(1) for p in splitting.split_projection(x, 3, 2)]
    )
    assert torch.autograd.gradcheck(split, x) and torch.autograd.gradgradcheck(split, x)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_a_forward_plans_its_blocks_once(deep):
    """One list of steps for embedding and blocks, one input for each block."""
    model = pgn_fast.VPT(backbone(depth=4), 3, num_prompts=2, deep=deep).eval()
    images = torch.randn(2, 3, 32, 32)
    seen: Counter[str] = Counter()

    def profile(frame, event, argument):
        code = frame.f_code
        if event == "call" and "pgn_fast/backbone" in code.co_filename:
            seen[code.co_name] += 1

    with torch.no_grad():
        model(images)
        sys.setprofile(profile)
        try:
            model(images)
        finally:
            sys.setprofile(None)
    assert seen["block_steps"] == 1
    assert seen["_block"] == 4
