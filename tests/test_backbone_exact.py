"""The engine gives the reference's numbers: every saving, schedule, memory plan and backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from pgn_fast.backbone.eager import encode_eager
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.options import FastOptions
from pgn_fast.backbone.readout import Readout
from pgn_fast.backbone.schedule import PromptSchedule

SMALL = {"depth": 3, "num_classes": 0, "embed_dim": 24, "num_heads": 3, "img_size": 32}
OFF = FastOptions(
    kv_only=False, last_rows=False, absorb=False, first=False, fold=False, biases=False
)


def randomize(backbone: nn.Module) -> nn.Module:
    """Every weight away from its initial 0 or 1, or a lost bias would not show."""
    generator = torch.Generator().manual_seed(1)
    for p in backbone.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.add_(noise.to(p.dtype) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5 / 2))
    return backbone.requires_grad_(False).eval()


def small_vit(**kwargs) -> nn.Module:
    options = SMALL | {"patch_size": 8, "init_values": 0.3, "reg_tokens": 1} | kwargs
    return randomize(timm.create_model("vit_tiny_patch16_224", **options).double())


def schedules(depth: int, D: int, B: int) -> dict[str, PromptSchedule]:
    """Name -> schedule; the prompts are leaves with gradients."""
    torch.manual_seed(0)
    shared = lambda layers: {
        i: torch.randn(4, D, dtype=torch.float64, requires_grad=True) for i in layers
    }
    own = lambda layers: {
        i: torch.randn(B, 4, D, dtype=torch.float64, requires_grad=True) for i in layers
    }
    everywhere = range(depth)
    return {
        "pgn": PromptSchedule("append", own([0])),
        "deep": PromptSchedule("prepend", shared(everywhere)),
        "deep-left": PromptSchedule("prepend", shared(everywhere), keep=False),
        "dropout": PromptSchedule("prepend", own(everywhere)),
        "shallow": PromptSchedule("prepend", shared([0])),
        "shallow-left": PromptSchedule("prepend", shared([0]), keep=False),
        "partial": PromptSchedule("prepend", shared(range(depth - 1))),
        "partial-left": PromptSchedule("prepend", shared(range(depth - 1)), keep=False),
        "last": PromptSchedule("prepend", shared([depth - 1])),
        "gaps": PromptSchedule("append", shared([0, depth - 1])),
    }


def compare(
    backbone: nn.Module,
    images: Tensor,
    schedule: PromptSchedule,
    options: FastOptions,
    rows: int | None,
    tolerance: float = 1e-10,
) -> None:
    leaves = list(schedule.entries.values())
    expected = encode_eager(backbone, images, schedule, Readout(rows=rows))
    engine = FastBackbone(backbone, options)
    assert engine.cache.unsupported_reason is None
    actual = engine.encode(images, schedule, Readout(rows=rows))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    weight = torch.randn(expected.shape[1:], dtype=expected.dtype)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    got = torch.autograd.grad((actual * weight).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    with torch.no_grad():
        inferred = engine.encode(images, schedule, Readout(rows=rows))
        again = engine.encode(images, schedule, Readout(rows=rows))
    assert (inferred - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(inferred, again)


@pytest.mark.parametrize("rows", [None, 1])
def test_one_block_gets_prompts_and_is_the_last(rows: int | None) -> None:
    """Prompts that are placed by the embedding's op must not be attended to twice."""
    backbone, images = small_vit(depth=1), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for keep in (True, False):
        for kv_only in (True, False):
            schedule = replace(schedules(1, 24, 2)["pgn"], keep=keep)
            compare(backbone, images, schedule, FastOptions(kv_only=kv_only), rows)


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("name", schedules(3, 24, 2))
def test_every_schedule(name: str, rows: int | None) -> None:
    backbone = small_vit()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    schedule = schedules(3, 24, 2)[name]
    for memory in ("fast", "balanced", "min"):
        compare(backbone, images, schedule, FastOptions(memory=memory), rows)
    compare(backbone, images, schedule, OFF, rows)
    for saving in ("kv_only", "last_rows", "absorb", "first", "fold", "biases"):
        compare(backbone, images, schedule, replace(OFF, **{saving: True}), rows)
