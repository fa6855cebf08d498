"""Methods as plug-ins: two from outside, by public names only, and what guards the door."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from test_backbone_works_with import backbone as small_backbone
from torch import Tensor, nn

import pgn_fast
from pgn_fast.cli import main
from pgn_fast.export import export
from pgn_fast.methods import METHODS
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.methods import build_model, load_backbone_for


class FreeKeys(pgn_fast.Prompter):
    """Prompt tokens and free keys and values in every block, pruned to P that falls with depth."""

    def __init__(self, backbone, *, num_prompts: int = 4, num_keys: int = 3) -> None:
        super().__init__()
        attention = backbone.blocks[0].attn
        h, d = attention.num_heads, backbone.embed_dim // attention.num_heads
        self.tokens, self.k, self.v = (nn.ParameterList() for _ in range(3))
        for i in range(len(backbone.blocks)):
            self.tokens.append(0.1 * torch.randn(max(num_prompts - i, 1), backbone.embed_dim))
            self.k.append(0.1 * torch.randn(h, num_keys + i, d))
            self.v.append(0.1 * torch.randn(h, num_keys + i, d))

    def schedule(self, images: Tensor) -> pgn_fast.PromptSchedule:
        return pgn_fast.PromptSchedule(
            "prepend",
            {
                i: (tokens, pgn_fast.KeyValues(k, v))
                for i, (tokens, k, v) in enumerate(zip(self.tokens, self.k, self.v, strict=True))
            },
        )


class FromTokens(pgn_fast.Prompter):
    """Every block's prompts are computed from the tokens that enter it."""

    def __init__(self, backbone, *, num_prompts: int = 2, hidden: int = 8) -> None:
        super().__init__()
        D = backbone.embed_dim
        self.queries = nn.Parameter(torch.randn(len(backbone.blocks), num_prompts, D))
        self.reduce, self.expand = nn.Linear(D, hidden), nn.Linear(hidden, D)

    def schedule(self, images: Tensor) -> pgn_fast.PromptSchedule:
        def prompts_of(queries: Tensor):
            def prompts(x: Tensor) -> Tensor:  # (B, S + N, D) -> (B, P, D)
                weights = (queries.to(x.dtype) @ x.mT / math.sqrt(x.shape[-1])).softmax(dim=-1)
                pooled = (weights @ x).to(self.reduce.weight.dtype)
                return self.expand(torch.tanh(self.reduce(pooled)))

            return prompts

        return pgn_fast.PromptSchedule("append", dict(enumerate(map(prompts_of, self.queries))))


@pytest.fixture(params=[FreeKeys, FromTokens])
def method(request):
    name = f"test-{request.param.__name__.lower()}"
    pgn_fast.register_method(name, training={"lr": 0.02})(request.param)
    yield name
    METHODS.pop(name, None)


def test_outside_methods_run_on_the_engine_and_match_the_reference(method: str) -> None:
    torch.manual_seed(0)
    model = pgn_fast.create_model(method, small_backbone().double(), 5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert model.engine is not None and model.engine.cache.unsupported_reason is None
    assert "  on   kv_only" in model.explain()
    logits, expected = model(images), model.forward_reference(images)
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    weights = model.trainable_parameters()
    assert {id(p) for p in model.prompter.parameters()} < {id(p) for p in weights}
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((logits * weight).sum(), weights)
    wanted = torch.autograd.grad((expected * weight).sum(), weights)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-8 * b.abs().max()
    features = model.forward_features(images)
    assert features.shape == model.backbone.forward_features(images).shape


def test_outside_methods_are_saved_and_loaded(method: str, tmp_path) -> None:
    vit, images = small_backbone(), torch.randn(2, 3, 32, 32)
    model = pgn_fast.create_model(method, vit, 5, num_prompts=3).eval()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pgn_fast.from_pretrained(tmp_path, vit)
    assert loaded.method == method and loaded.num_prompts == 3
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
    METHODS.pop(method)
    with pytest.raises(ValueError, match=f"{method}.*known: pgn, vpt-deep"):
        pgn_fast.from_pretrained(tmp_path, vit)


def test_outside_methods_are_exported(method: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = pgn_fast.create_model(method, small_backbone(), 5).eval()
    nn.init.normal_(model.head.weight)
    parity = export(model, tmp_path / "model.pt2", "pt2")
    assert parity.equal_argmax == 256 and parity.error <= 1e-5


def test_built_in_methods_go_through_the_same_door() -> None:
    for name, kind in {
        "pgn": pgn_fast.PGN,
        "vpt-deep": pgn_fast.VPT,
        "vpt-shallow": pgn_fast.VPT,
        "linear": pgn_fast.models.LinearProbe,
        "full": pgn_fast.models.FineTuned,
    }.items():
        model = pgn_fast.create_model(name, small_backbone(), 5)
        assert type(model) is kind and model.method == name
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert METHODS["vpt-deep"].types()["num_prompts"] is int
    assert "deep" not in METHODS["vpt-deep"].parameters()


def test_outside_methods_are_built_for_training(method: str) -> None:
    config = TrainConfig.make(method=method, method_kwargs={"num_prompts": 2})
    assert config.lr == 0.02
    model = build_model(config, load_backbone_for(config), num_classes=10)
    assert (model.method, model.num_prompts) == (method, 2)


def test_options_of_another_method_are_refused_by_name(method: str, capsys) -> None:
    assert main(["train", "--method", method, "--num-prompts", "3"]) == 2
    assert "--method-kwargs num_prompts=3" in capsys.readouterr().err
    assert main(["train", "--method", "unheard-of"]) == 2
    assert "known: pgn, vpt-deep, vpt-shallow, linear, full" in capsys.readouterr().err


def test_create_model_names_what_it_does_not_know(method: str) -> None:
    with pytest.raises(ValueError, match="method='mine' is not registered; known: pgn, vpt-deep"):
        pgn_fast.create_model("mine", small_backbone(), 5)
    with pytest.raises(ValueError, match=f"method '{method}' takes no depth; it takes num_prompts"):
        pgn_fast.create_model(method, small_backbone(), 5, depth=3)


def test_register_method_guards_its_door() -> None:
    class KeepsBackbone(pgn_fast.Prompter):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

    class TakesAnything(pgn_fast.Prompter):
        def __init__(self, backbone, **options): ...

    class NamesHead(pgn_fast.Prompter):
        def __init__(self, backbone, *, head=1): ...

    class NamesDepth(pgn_fast.Prompter):
        def __init__(self, backbone, *, depth=1): ...

    class HasNoConstructor(pgn_fast.Prompter): ...

    class IsNoPrompter(nn.Module): ...

    for kind, message in (
        (TakesAnything, r"takes \*\*options; name each argument"),
        (NamesHead, "takes head, which is the model's"),
        (NamesDepth, "takes depth, which is the model's or the adapter's own"),
        (HasNoConstructor, "HasNoConstructor has no constructor"),
        (IsNoPrompter, "takes a subclass of pgn_fast.Prompter"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            pgn_fast.register_method("test-door")(kind)
        assert "test-door" not in METHODS
    with pytest.raises(ValueError, match="'pgn' is PGN already"):
        pgn_fast.register_method("pgn")(KeepsBackbone)
    with pytest.raises(ValueError, match="lower-case letters"):
        pgn_fast.register_method("My VPT")
    pgn_fast.register_method("test-door")(KeepsBackbone)
    pgn_fast.register_method("test-door")(KeepsBackbone)  # a notebook's cell that runs again
    try:
        with pytest.raises(ValueError, match="keeps parameters of the backbone as its own"):
            pgn_fast.create_model("test-door", small_backbone(), 5)
    finally:
        METHODS.pop("test-door")
