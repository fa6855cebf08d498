"""Second derivatives: right wherever they are computed, held against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import pgn_fast
from pgn_fast import ops
from pgn_fast.backbone import packed
from pgn_fast.backbone.options import FastOptions
from pgn_fast.ops import dispatch
from pgn_fast.ops.examples import Sizes, examples

PACKAGE = Path(pgn_fast.__file__).parent


def op_cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """By op: a function of tensors that all get a gradient, and the tensors, in float64."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    weight = normal(5, 4)

    def embed(backend: str | None, *tensors: Tensor) -> Tensor:
        return ops.prompted_patch_embed(*tensors, std=[0.5] * 3, mean=[0.1] * 3, backend=backend)

    embedding = [normal(2, 3, 4, 4), normal(6, 3, 2, 2), normal(6), normal(4, 6), normal(1, 6)]
    return {
        "mix_prompts": (
            lambda backend, *t: ops.mix_prompts(*t, backend=backend),
            [normal(2, 3, 4), normal(4, 5)],
        ),
        "mix_prompts, sigmoid": (
            lambda backend, *t: ops.mix_prompts(*t, "sigmoid", backend=backend),
            [normal(2, 3, 4), normal(4, 5)],
        ),
        "prompt_attention": (
            lambda backend, *t: ops.prompt_attention(*t, backend=backend),
            [normal(2, 2, n, 4) for n in (3, 5, 5)] + [normal(2, 2, 4), normal(2, 2, 4)],
        ),
        "add_layer_norm": (
            lambda backend, *t: torch.cat(ops.add_layer_norm(*t, backend=backend)),
            [normal(3, 5), normal(3, 5)],
        ),
        "frozen_linear": (
            lambda backend, x: ops.frozen_linear(x.tanh(), weight.to(x), backend=backend),
            [normal(3, 4)],
        ),
        "prompted_patch_embed": (embed, [*embedding, normal(2, 3, 4), normal(4, 6)]),
    }


def by_example(op: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The same of an op's first example: a function of the tensors that get a gradient."""
    tiny = Sizes(B=2, D=4, h=2, patch=2, image=4, P=3, K=4)
    example = examples(op, tiny, torch.float64, torch.device("cpu"))[0]

    def run(backend: str | None, *leaves: Tensor) -> Tensor:
        given = iter(leaves)
        tensors = [
            next(given) if t.requires_grad else t.to(leaves[0]) if t.is_floating_point() else t
            for t in example.tensors
        ]
        outputs = example.call(backend)(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.cat([x.flatten() for x in outputs])

    return run, [t.detach() for t in example.tensors if t.requires_grad]


CASES = op_cases()
CASES |= {op: by_example(op) for op, row in dispatch.OPS.items() if row.timed and op not in CASES}
every_op = pytest.mark.parametrize("name", CASES)


def products(
    run: Callable[..., Tensor], tensors: list[Tensor], vectors: list[Tensor]
) -> list[Tensor]:
    """Hessian-vector products of a curved scalar, by two calls of torch.autograd.grad."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = run(*leaves).square().mean() + run(*leaves).sin().mean()
    first = torch.autograd.grad(value, leaves, create_graph=True)
    inner = sum((g * v.to(g)).sum() for g, v in zip(first, vectors, strict=True))
    return [g.detach() for g in torch.autograd.grad(inner, leaves)]


def relative(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


@every_op
def test_ops_in_float64_against_finite_differences(name: str) -> None:
    run, tensors = CASES[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(lambda *t: run(None, *t), leaves)


@every_op
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_ops_on_their_kernels(name: str, backend: str | None) -> None:
    run, tensors = CASES[name]
    op = name.partition(",")[0]
    single = [t.float() for t in tensors]
    if reason := dispatch.unsupported_reason("cpu", op, *single):
        pytest.skip(reason)
    vectors = [torch.randn_like(t) for t in tensors]
    expected = products(lambda *t: run("reference", *t), tensors, vectors)
    assert relative(products(lambda *t: run(backend, *t), single, vectors), expected) < 1e-4


@every_op
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_gradient_of_some_inputs_alone_has_all_terms(name: str, backend: str | None) -> None:
    """torch.autograd.grad(inputs=...) prunes the graph: a node that would raise is never run."""
    run, tensors = CASES[name]
    op = name.partition(",")[0]
    if backend and (reason := dispatch.unsupported_reason("cpu", op, tensors[0].float())):
        pytest.skip(reason)
    vectors = [torch.randn_like(t) for t in tensors]
    for i in range(len(tensors)):

        def one(t: Tensor, backend: str | None, i: int = i) -> Tensor:
            others = [x.to(t) for x in tensors]
            return run(backend, *others[:i], t, *others[i + 1 :])

        expected = products(lambda t: one(t, "reference"), [tensors[i]], [vectors[i]])
        found = products(lambda t: one(t, backend), [tensors[i].float()], [vectors[i]])
        assert relative(found, expected) < 1e-4


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
    made = timm.create_model("vit_tiny_patch16_224", **sizes, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


MODELS = {
    "deep": lambda backbone, **o: pgn_fast.VPT(backbone, 3, num_prompts=2, **o),
    "shallow": lambda backbone, **o: pgn_fast.VPT(backbone, 3, num_prompts=2, deep=False, **o),
    "pgn": lambda backbone, **o: pgn_fast.PGN(
        backbone, 3, num_prompts=2, library_size=4, resolution=32, **o
    ),
}
OPTIONS = {
    "default": {},
    "balanced": {"fast": "balanced"},
    "min": {"fast": "min"},
    "packed": {"fast": FastOptions(packed=True)},
    "unfolded": {"fast": FastOptions(fold=False, biases=False)},
    "reference ops": {"backend": "reference"},
}


def model_products(method: str, double: bool, layer_scale: bool = False, **options) -> list[Tensor]:
    backbone = vit(init_values=0.3 if layer_scale else None)
    torch.manual_seed(1)
    model = MODELS[method](backbone, **options).eval()
    torch.manual_seed(2)
    with torch.no_grad():  # a head that starts at zero hides what is below it
        for p in model.trainable_parameters():
            p.copy_(p + 0.1 * torch.randn(p.shape, dtype=torch.float64).to(p))
    model = model.double() if double else model  # after the random initialization
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64).to(next(backbone.parameters()))
    wanted = model.trainable_parameters()
    vectors = [torch.randn(p.shape, dtype=torch.float64).to(p) for p in wanted]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 2]))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        inner = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        return [g.detach() for g in torch.autograd.grad(inner, wanted)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", MODELS)
def test_models_in_float64(method: str, options: str) -> None:
    expected = model_products(method, double=True, fast=False)
    assert relative(model_products(method, double=True, **OPTIONS[options]), expected) < 1e-9


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer_scale", [False, True])
def test_models_in_float32(options: str, layer_scale: bool) -> None:
    if options == "packed" and packed.unsupported_reason(torch.device("cpu"), torch.float32):
        pytest.skip("no library packs weights here")
    expected = model_products("deep", True, layer_scale, fast=False)
    found = model_products("deep", False, layer_scale, **OPTIONS[options])
    assert relative(found, expected) < 1e-3


def test_a_gradient_penalty_on_images() -> None:
    """The graph of a penalty runs through the embedding and every block."""
    found = []
    for options in ({"fast": False}, {}, {"fast": "min"}):
        torch.manual_seed(1)
        model = pgn_fast.VPT(vit().double(), 3, num_prompts=2, **options).eval()
        torch.manual_seed(2)
        nn.init.normal_(model.head.weight)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (grad,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
            grad.square().sum().backward()
        found.append([p.grad for p in model.trainable_parameters() if p.grad is not None])
    assert len(found[0]) > 1
    assert relative(found[1], found[0]) < 1e-9 and relative(found[2], found[0]) < 1e-9


@pytest.mark.parametrize("method", MODELS)
def test_torch_func_grad(method: str) -> None:
    torch.manual_seed(1)
    model = MODELS[method](vit()).eval()
    nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 32)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model(images).square().mean().backward()

    def loss(values: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (images,)).square().mean()

    values = {n: p.detach() for n, p in trained.items()}
    found = torch.func.grad(loss)(values, images)
    pairs = [(found[n], p.grad.double()) for n, p in trained.items()]
    assert relative(*map(list, zip(*pairs, strict=True))) < 1e-4

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, images[:, None])
    alone = [torch.func.grad(loss)(values, image[None]) for image in images]
    pairs = [(each[n][i], alone[i][n].double()) for n in values for i in range(2)]
    assert relative(*map(list, zip(*pairs, strict=True))) < 1e-4


def test_no_node_cuts_the_graph() -> None:
    """once_differentiable hides the terms below it where the graph is pruned; nothing is said."""
    for file in PACKAGE.rglob("*.py"):
        assert "once_differentiable" not in file.read_text(), file
