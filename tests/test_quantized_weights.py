"""Frozen weights in 8 bits: how far from float, when they are used, and where they are refused."""

from __future__ import annotations

import re

import pytest
import torch
from small_world import tiny_vit
from test_backbone_launches import Launches
from torch import Tensor

import pgn_fast
from pgn_fast import demo
from pgn_fast.adapters import save_pretrained
from pgn_fast.backbone import quantized
from pgn_fast.backbone.load import load_backbone
from pgn_fast.backbone.options import FastOptions
from pgn_fast.backbone.quantized import Float8Linear, Int8Linear
from pgn_fast.backbone.weights import PLACES, FrozenLinear
from pgn_fast.digits import load_digits
from pgn_fast.errors import UserError
from pgn_fast.ops import onednn

INT8 = FastOptions(weights="int8")
needs_int8 = pytest.mark.skipif(
    onednn.int8_missing() is not None, reason=str(onednn.int8_missing())
)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def linear(rows=200, width=96, outputs=160, bias=True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and channels of very different size: one scale for all would lose most of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randn(outputs, width, generator=generator)
    weight *= torch.logspace(-2, 2, outputs)[:, None]
    return x, weight, torch.randn(outputs, generator=generator) if bias else None


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """The formula in float64: both sides times a block-diagonal Hadamard matrix, then rounded to
    whole numbers, one scale a row."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < block:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), signs)

    def rounded(t: Tensor) -> Tensor:
        mixed = (t.unflatten(1, (-1, block)) @ signs / block**0.5).flatten(1)
        scale = mixed.abs().amax(dim=1, keepdim=True) / 127
        return (mixed / scale).round() * scale

    y = rounded(x.double()) @ rounded(weight.double()).T
    return y if bias is None else y + bias.double()


# ---- int8 -----------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, block", [(96, 32), (192, 64), (65, 1), (36, 4)])
def test_the_product_is_the_formula(width, block, bias):
    x, weight, b = linear(width=width, bias=bias)
    y = Int8Linear(weight, b)(x.view(4, 50, width))
    expected = by_hand(x, weight, b, block).view(4, 50, 160)
    largest = expected.abs().amax(dim=-1, keepdim=True)
    # a code may round to its neighbor: one part in 127 of one term
    assert ((y - expected).abs() / largest).max() <= 2e-3
    errors = (y - torch.nn.functional.linear(x, weight, b).view_as(y)).norm(dim=-1)
    assert (errors / y.norm(dim=-1)).max() <= 0.02


@needs_int8
def test_a_channel_that_is_far_larger_than_the_others_costs_them_little():
    x, weight, _ = linear(width=192)
    x[:, 7] *= 100  # by a scale for itself and all others these would have 1 of 127 steps
    y, expected = Int8Linear(weight)(x[None])[0], x @ weight.T
    assert relative(y, expected) <= 0.02
    others = weight.clone()
    others[:, 7] = 0
    lengths = x.norm(dim=1, keepdim=True) * others.norm(dim=1)
    assert ((Int8Linear(others)(x[None])[0] - x @ others.T).abs() / lengths).max() <= 0.01


@needs_int8
def test_tokens_of_zeros_and_of_no_numbers():
    x, weight, b = linear()
    x[3], x[5, 7], x[6, 0] = 0, torch.nan, torch.inf
    y = Int8Linear(weight, b)(x[None])[0]
    assert torch.equal(y[3], b)
    assert not y[5].isfinite().any() and not y[6].isfinite().any()
    others = [i for i in range(len(x)) if i not in (5, 6)]
    assert y[others].isfinite().all()


@needs_int8
def test_what_stays_in_float():
    """By a token's place, never by the number of images."""
    x, weight, b = linear()
    for few in (x[:, None], x[:195].view(13, 15, 96), x):
        assert torch.equal(Int8Linear(weight, b)(few), FrozenLinear(weight, b)(few))
    images = x.view(10, 20, 96)
    together = Int8Linear(weight, b)(images)
    alone = torch.cat([Int8Linear(weight, b)(image[None]) for image in images])
    assert relative(alone, together) <= 1e-6 < relative(alone, x.view_as(images) @ weight.T + b)
    for depth, last in ((1, 0), (2, 1), (4, 1), (12, 2)):
        model = pgn_fast.VPT(tiny_vit(depth=depth), 10, num_prompts=2, fast=INT8)
        with torch.no_grad():
            weights = model.engine.cache.weights(torch.float32)
        for place in PLACES:
            kinds = [type(getattr(w, place)) for w in weights]
            assert kinds == [Int8Linear] * (depth - last) + [FrozenLinear] * last


@needs_int8
def test_an_answer_does_not_depend_on_the_batch():
    backbone = tiny_vit(img_size=32)
    bank = pgn_fast.TaskBank(backbone, fast=INT8)
    methods = {"deep": ("vpt-deep", 2), "three": ("vpt-shallow", 3), "five": ("vpt-shallow", 5)}
    for name, (method, count) in methods.items():
        torch.manual_seed(count)
        model = pgn_fast.create_model(method, backbone, 10, num_prompts=count)
        torch.nn.init.normal_(model.head.weight)
        bank.add(name, model)
    images = torch.nn.functional.interpolate(IMAGES, size=32)
    images = torch.cat([a * images + b for a in (1, -1, 2) for b in (0, 1, 2)])
    tasks = [*methods] * 6
    with torch.no_grad():
        together = bank(images, tasks)
        alone = [bank(image[None], [task])[0] for image, task in zip(images, tasks, strict=True)]
    # float sums of another batch size may bring a code to its neighbor
    assert all(relative(a, b) <= 3e-3 for a, b in zip(together, alone, strict=True))


@needs_int8
@pytest.mark.parametrize("method", ["pgn", "vpt-shallow", "vpt-deep"])
def test_inference_is_near_float_and_training_is_float(method):
    options = {"num_prompts": 2}
    if method == "pgn":
        options |= {"library_size": 8, "resolution": 32, "generator": torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 16))}  # fmt: skip
    torch.manual_seed(0)
    model = pgn_fast.create_model(method, tiny_vit(img_size=96), 10, fast=INT8, **options)
    torch.nn.init.normal_(model.head.weight)
    images = torch.nn.functional.interpolate(IMAGES, size=96)
    exact = model(images)
    assert torch.allclose(exact, model.forward_reference(images), atol=1e-5)
    exact.square().mean().backward()  # gradients are those of the float weights
    grads = [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]
    model.zero_grad()
    model.forward_reference(images).square().mean().backward()
    plain = [p.grad for p in model.trainable_parameters() if p.grad is not None]
    assert all(relative(a, b) <= 1e-3 for a, b in zip(grads, plain, strict=True))
    with torch.no_grad():
        rounded = model(images)
    assert 1e-5 < relative(rounded, exact.detach()) < 0.1
    with torch.inference_mode():
        assert torch.equal(model(images), rounded)
    bank = pgn_fast.TaskBank(model.backbone, fast=INT8)
    bank.add("a", model)
    with torch.no_grad():
        assert relative(torch.stack(bank(images, ["a", "a"])), rounded) <= 1e-2


@needs_int8
def test_digits_get_the_same_class():
    """The demonstration's backbone, which has learned. On photos: bench/quantized_photos.py."""
    held = load_digits()
    images = torch.from_numpy(held.images)[:, None].float().mul(15 / 127.5).sub(1)
    images = torch.nn.functional.interpolate(images, size=demo.backbone().patch_embed.img_size)
    train, test = (images[i[:400]].expand(-1, 3, -1, -1) for i in (held.train, held.test))
    labels = torch.from_numpy(held.labels)[held.train[:400]]
    torch.manual_seed(0)
    model = pgn_fast.VPT(load_backbone("pgn_demo_vit"), 10, num_prompts=4, fast=INT8).eval()
    fit_head(model, train, labels)
    exact = model(test).argmax(dim=1)
    with torch.no_grad():
        same = (model(test).argmax(dim=1) == exact).double().mean()
    right = (exact == torch.from_numpy(held.labels)[held.test[:400]]).double().mean()
    assert right >= 0.85 and same >= 0.99, (right, same)


def fit_head(model: pgn_fast.VPT, images: Tensor, labels: Tensor) -> None:
    """The head by ridge regression on the float model's features: no training that takes time."""
    with torch.enable_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True).detach()
    center = features.mean(dim=0)
    x, y = features - center, torch.nn.functional.one_hot(labels).float()
    ridge = 1e-3 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
    with torch.no_grad():
        model.head.weight.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y).T)
        model.head.bias.copy_(y.mean(dim=0) - model.head.weight @ center)


@needs_int8
def test_weights_that_change_are_rounded_anew():
    model = pgn_fast.VPT(tiny_vit(img_size=96), 10, num_prompts=2, fast=INT8).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.nn.functional.interpolate(IMAGES, size=96)
    with torch.no_grad():
        before = model(images)
        model.backbone.blocks[1].mlp.fc2.weight.data.mul_(-1.5)
        after, expected = model(images), model.forward_reference(images)
    assert relative(after, expected) < 0.1 < relative(before, expected)


@needs_int8
def test_the_error_is_reported_and_the_option_travels(tmp_path):
    model = pgn_fast.VPT(tiny_vit(img_size=96), 10, num_prompts=2, fast=INT8)
    (line,) = [x for x in model.explain().splitlines() if x.split()[1:2] == ["weights"]]
    assert "on   weights    int8 in inference, float where gradients are enabled" in line
    error = float(line.split("changes by ")[1].split()[0])
    assert 0 < error < 0.1
    assert "off  weights    switched off" in pgn_fast.VPT(tiny_vit(), 10).explain()
    model.save_pretrained(tmp_path)
    assert pgn_fast.from_pretrained(tmp_path, tiny_vit(img_size=96)).engine.options == INT8
    with torch.no_grad():
        assert "int8 in inference" in model.explain()


@needs_int8
def test_what_was_trained_in_float_is_loaded_in_int8(tmp_path):
    backbone = tiny_vit(img_size=96)
    model = pgn_fast.VPT(backbone, 10, num_prompts=2)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    load = lambda **given: pgn_fast.from_pretrained(tmp_path, backbone, **given)
    images = torch.nn.functional.interpolate(IMAGES, size=96)
    with torch.no_grad():
        exact, rounded = load()(images), load(fast={"weights": "int8"})(images)
        assert torch.equal(load(fast=INT8)(images), rounded)
        assert torch.equal(exact, model(images))
        assert torch.allclose(load(fast=False)(images), exact, atol=1e-5)
    assert 1e-5 < relative(rounded, exact) < 0.1
    for given in ({"fast": {"weights": "int4"}}, {"fast": {"bits": 8}}, {"backend": "reference"}):
        with pytest.raises(UserError, match=r"int4|bits|modules of your own by name"):
            load(**given)
    save_pretrained(pgn_fast.create_model("linear", backbone, 10), tmp_path / "linear")
    with pytest.raises(UserError, match="a linear adapter takes no savings"):
        pgn_fast.from_pretrained(tmp_path / "linear", backbone, fast=INT8)


@needs_int8
def test_compiled_and_exported_models_multiply_in_float():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=2, fast=INT8).eval()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGES,))
        assert torch.allclose(program.module()(IMAGES), model.forward_reference(IMAGES), atol=1e-5)


def test_other_dtypes_are_refused_by_a_sentence():
    model = pgn_fast.VPT(tiny_vit().double(), 10, num_prompts=2, fast=INT8).double()
    images = IMAGES.double()
    model(images)  # training is in float
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"int8.*float32 models on cpu, .*64"):
        model(images)
    assert "off  weights    int8 weights run in float32 models on cpu" in model.explain()


def test_a_processor_without_vnni_is_refused_by_a_sentence(monkeypatch):
    onednn.int8_missing.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=2, fast=INT8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"weights='int8'.*(VNNI|x86-64 alone)"):
        model(IMAGES)
    onednn.int8_missing.cache_clear()


@pytest.mark.parametrize("weights", ["int4", None, 8])
def test_other_words_are_refused(weights):
    with pytest.raises(ValueError, match="weights takes 'float', 'int8', 'fp8', got"):
        FastOptions(weights=weights)


# ---- float8 ---------------------------------------------------------------------------------


def test_float8_runs_on_gpus_alone():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=2, fast=FastOptions(weights="fp8"))
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    model(IMAGES)
    message = r"weights='fp8'.*capability 8\.9 and above, these are float32 on cpu\. Use weights="
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        model(IMAGES)


@pytest.mark.parametrize("capability, width, reason", [
    ((8, 6), 32, r"need compute capability 8\.9, this GPU has 8\.6"),
    ((8, 9), 36, r"multiples of 16; a weight here is \(108, 36\)"),
    ((9, 0), 32, None),
])  # fmt: skip
def test_which_gpus_and_widths_take_float8(monkeypatch, capability, width, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    vit = tiny_vit(embed_dim=width, num_heads=2 if width == 32 else 3)
    found = quantized.unsupported_reason("fp8", torch.device("cuda"), torch.bfloat16, vit)
    assert found is None if reason is None else re.search(reason, found)


def test_float8_scales(monkeypatch):
    """The layer around the product, which is written out here: no processor has it with scales
    of rows."""

    def written_out(x, x_scale, weight, weight_scale):
        assert x.dtype == weight.dtype == torch.float8_e4m3fn
        assert x_scale.shape == (len(x), 1) and weight_scale.shape == (len(weight), 1)
        return ((x.float() @ weight.float().T) * x_scale * weight_scale.T).to(torch.bfloat16)

    monkeypatch.setattr(quantized, "scaled_product", written_out)
    x, weight, b = linear()
    y = Float8Linear(weight, b)(x.view(4, 50, 96))
    expected = torch.nn.functional.linear(x, weight, b).view_as(y)
    assert y.dtype == torch.float32
    # three bits of fraction: a factor is off by 1 / 16 at most, and 96 of them by less together
    lengths = x.norm(dim=1).view(4, 50, 1) * weight.norm(dim=1)
    assert ((y - expected).abs() / lengths).max() <= 0.03
    x[3] = 0
    assert torch.equal(Float8Linear(weight, b)(x)[3], b)
    codes, scale = quantized.to_float8(x[:3])
    assert codes.float().abs().amax(dim=1).eq(448).all() and scale.shape == (3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float8_codes_are_those_of_the_formula(dtype):
    """Bit for bit, whatever a row holds; five operations, three of them over all elements."""

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = (x.abs().amax(dim=1, keepdim=True) / 448).clamp(torch.finfo(torch.float32).tiny)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator) * torch.logspace(-7, 4, 4096)[:, None]
    x = x.to(dtype)
    x[0], x[1, 5], x[2, 6], x[3, :9] = 0, torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6] = 1e-45, torch.finfo(dtype).tiny, -torch.finfo(dtype).max
    with Launches() as launched:
        codes, scale = quantized.to_float8(x)
    expected, expected_scale = formula(x)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert launched.seen.total() == 5 + (dtype == torch.float64)


def test_float8_linears_launch_few_operations(monkeypatch):
    """Two roundings of five, the product and the bias; no copy to another dtype in bfloat16."""
    product = lambda x, x_scale, weight, weight_scale: x.new_zeros(
        len(x), len(weight), dtype=torch.bfloat16
    )
    monkeypatch.setattr(quantized, "scaled_product", product)  # one operation, as on a GPU
    x, weight, b = (t.bfloat16() for t in linear())
    with Launches() as launched:
        Float8Linear(weight, b)(x.view(4, 50, 96))
    assert launched.seen.total() == 12
