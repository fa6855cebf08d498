"""Quantized frozen layers: the eager path runs them as they are, and explain() says so."""

from __future__ import annotations

import pytest
import torch
from small_world import tiny_vit

import pgn_fast

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()


def config(kind):
    quantization = pytest.importorskip("torchao.quantization")
    return getattr(quantization, kind)()


def check(model, layer):
    assert "no savings" in model.explain() and layer in model.explain()
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), model.forward_reference(IMAGES))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(kind, when, tmp_path):
    wanted = config(kind)
    from torchao.quantization import quantize_

    vit = tiny_vit(embed_dim=64).requires_grad_(False)
    if when == "before":
        quantize_(vit, wanted)
    model = pgn_fast.VPT(vit, 3, num_prompts=2)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        before = model.eval()(IMAGES)
    if when == "after":
        quantize_(model.backbone, wanted)
    check(model, "the weight of attn.qkv is a Int8Tensor")
    with torch.no_grad():
        found = model(IMAGES)
    if when == "after":
        # it is the quantized layers that ran: near the float ones, and not them
        assert 0 < (found - before).abs().max() < 0.1 * before.abs().max()
    model.train()
    model(IMAGES).square().sum().backward()
    # torchao rounds activations without passing a gradient on; weights alone let it through
    trains = kind == "Int8WeightOnlyConfig"
    assert (model.prompter.prompts.grad.abs().sum() > 0) == trains
    model.save_pretrained(tmp_path)
    again = pgn_fast.from_pretrained(tmp_path, vit)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_torchs_own_dynamic_quantization():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantized layers")
    vit = torch.ao.quantization.quantize_dynamic(tiny_vit(), {torch.nn.Linear}, dtype=torch.qint8)
    model = pgn_fast.VPT(vit, 3, num_prompts=2)
    torch.nn.init.normal_(model.head.weight)
    check(model, "attn.qkv is a torch.ao.nn.quantized.dynamic.modules.linear.Linear")
