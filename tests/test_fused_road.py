"""Prompts of block 0 are mixed and placed by the embedding's op, or explain() says why not."""

from __future__ import annotations

import pytest
import torch
from test_backbone_works_with import backbone, gradients, pgn, relative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import pgn_fast
from pgn_fast.backbone import embedding as embedding_module
from pgn_fast.backbone import schedule as schedule_module
from pgn_fast.backbone.options import FastOptions
from pgn_fast.backbone.readout import Readout


class Concatenations(TorchFunctionMode):
    """Remembers what is concatenated along the tokens: the shapes of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[tuple[int, ...]]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cat:
            shapes = [tuple(t.shape) for t in args[0]]
            if len(shapes) > 1 and len(shapes[0]) >= 3 and shapes[0][0] > 1:
                self.found.append(shapes)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that a model calls: an embedding with logits, with prompts, or without."""
    found: list[str] = []
    embed, mix = embedding_module.prompted_patch_embed, schedule_module.mix_prompts

    def counted_embed(*args, prompts=None, **kwargs):
        mixed, given = args[5] is not None, prompts is not None
        found.append("embed with " + ("logits" if mixed else "prompts" if given else "neither"))
        return embed(*args, prompts=prompts, **kwargs)

    def counted_mix(*args, **kwargs):
        found.append("mix")
        return mix(*args, **kwargs)

    monkeypatch.setattr(embedding_module, "prompted_patch_embed", counted_embed)
    monkeypatch.setattr(schedule_module, "mix_prompts", counted_mix)
    return found


def shallow(**kwargs) -> pgn_fast.VPT:
    return pgn_fast.VPT(backbone(), 5, num_prompts=3, deep=False, **kwargs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(
    "make, expected",
    [
        (pgn, "embed with logits"),
        (shallow, "embed with prompts"),
        (lambda: shallow(dropout=0.3), "embed with prompts"),
    ],
)
def test_one_op_and_no_concatenation(make, expected, uint8, training, calls) -> None:
    model = make().train(training)
    calls.clear()  # those of the engine's check of itself
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    images = images if uint8 else torch.randn(4, 3, 32, 32)
    with Concatenations() as concatenations, torch.set_grad_enabled(training):
        logits = model(images)
    assert calls == [expected]
    assert concatenations.found == []
    assert "prompts of block 0: written by the embedding's op" in model.explain()
    if training:
        assert all(grad.abs().max() > 0 for grad in gradients(model, logits))


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("memory", ["fast", "balanced", "min"])
def test_gradients_are_the_references(memory: str, name: str) -> None:
    """In float32, by the kernels; test_prompt_schedule holds the same in float64."""
    import timm
    from test_backbone_exact import randomize

    options = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 0}
    vit = randomize(timm.create_model(name, **options))
    images = torch.randn(3, 3, 64, 64)
    for model in (
        pgn_fast.PGN(vit, 5, num_prompts=3, library_size=8, resolution=64, fast=memory),
        pgn_fast.VPT(vit, 5, num_prompts=3, deep=False, fast=memory),
    ):
        model.eval()  # batch norm of the generator
        logits, expected = model(images), model.forward_reference(images)
        assert relative(logits, expected) <= 1e-5
        pairs = zip(gradients(model, logits), gradients(model, expected), strict=True)
        assert all(relative(own, wanted) <= 2e-4 for own, wanted in pairs)


def test_nothing_is_kept_for_the_rows_of_patches() -> None:
    """The first block's projections get no gradient through patches, which none could use."""
    model, images = shallow(), torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        model.engine.encode(images, model.prompter.schedule(images), Readout(rows=1))
    tokens = 1 + 16 + 3
    first = model.engine.cache.weights(torch.float32)[0].norm1
    with torch.no_grad():
        whole = model.engine.embedding.by_op(images, None, model.prompter.prompts[0])
        normed = first(whole)
    kept = [t for t in seen if t.shape == (2, tokens, 64)]
    assert not any(torch.allclose(t, normed) or torch.allclose(t, whole) for t in kept)


def test_second_derivatives_go_through() -> None:
    model = pgn_fast.PGN(backbone().double(), 5, num_prompts=3, library_size=8).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    library = model.prompter.token_library
    vector = torch.randn_like(library)
    products = []
    for forward in (model, model.forward_reference):
        with sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with second derivatives
            loss = forward(images).square().sum()
            (grad,) = torch.autograd.grad(loss, library, create_graph=True)
            (product,) = torch.autograd.grad((grad * vector).sum(), library)
        products.append(product)
    assert relative(*products) <= 1e-9


@pytest.mark.parametrize(
    "make, reason, ops",
    [
        (lambda: pgn_fast.VPT(backbone(), 5, num_prompts=3), "keys and values only", ["neither"]),
        (lambda: shallow(fast=FastOptions(embed=False)), "embed is switched off", []),
        (lambda: hooked(), "its patch embedding has a hook", []),
    ],
)
def test_explain_says_why_prompts_stay_apart(make, reason: str, ops, calls) -> None:
    model = make()
    calls.clear()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert calls == [f"embed with {op}" for op in ops]
    assert f"prompts of block 0: not written by the embedding's op: {reason}" in str(
        model.explain()
    ).replace("the prompts of block 0 are ", "")


def hooked() -> pgn_fast.VPT:
    model = shallow()
    model.backbone.patch_embed.register_forward_hook(lambda *_: None)
    return model


def test_a_mixture_of_another_dtype_is_mixed_apart_and_explain_says_so(calls) -> None:
    model = pgn_fast.PGN(backbone().bfloat16(), 5, num_prompts=3, library_size=8).eval()
    calls.clear()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert calls == ["mix", "embed with prompts"]
    assert (
        "prompts of block 0: written by the embedding's op into its buffer, not mixed by it: the "
        "mixture is torch.float32, the backbone torch.bfloat16" in model.explain()
    )
    assert "not mixed by it" not in pgn().explain() + shallow().explain()


def test_autocast_and_gradients_of_images_take_their_own_ways(calls) -> None:
    model, images = pgn(), torch.randn(2, 3, 32, 32)
    model.eval()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "under autocast timm adds its position embedding in float32" in model.explain()
        model(images)
    assert calls == ["mix"]
    calls.clear()
    pixels = images.requires_grad_()
    own = torch.autograd.grad(model(pixels).square().sum(), pixels)[0]
    assert calls == ["embed with logits"]
    wanted = torch.autograd.grad(model.forward_reference(pixels).square().sum(), pixels)[0]
    assert relative(own, wanted) <= 1e-5


@pytest.mark.parametrize("make", [pgn, shallow])
def test_compiled_gradients_are_the_same(make) -> None:
    torch._dynamo.reset()
    model, images = make().eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, expected = compiled(images), model(images)
    assert relative(logits, expected) <= 2e-6
    pairs = zip(gradients(model, logits), gradients(model, expected), strict=True)
    assert all(relative(a, b) <= 1e-5 for a, b in pairs)
