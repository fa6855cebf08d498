"""Every kind of entry of a PromptSchedule: the engine against timm's own blocks in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_backbone_coverage import tiny
from test_backbone_exact import OFF, small_vit
from torch import Tensor, nn

from pgn_fast import KeyValues, Mixture, PromptSchedule
from pgn_fast.backbone import families
from pgn_fast.backbone.eager import encode_eager
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.options import FastOptions
from pgn_fast.backbone.readout import Readout

B = 2


class Leaves:
    """Makes random leaves with gradients and remembers them."""

    def __init__(self, backbone: nn.Module) -> None:
        self.all: list[Tensor] = []
        self.D = backbone.embed_dim
        attention = backbone.blocks[0].attn
        self.h, self.d = attention.num_heads, self.D // attention.num_heads
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        leaf = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        self.all.append(leaf.requires_grad_())
        return leaf

    def tokens(self, P: int, *batch: int) -> Tensor:
        return self(*batch, P, self.D)

    def keys(self, P: int, *batch: int) -> KeyValues:
        return KeyValues(self(*batch, self.h, P, self.d), self(*batch, self.h, P, self.d))

    def mixture(self, P: int) -> Mixture:
        return Mixture(self(B, P, 6), self(6, self.D))

    def function(self, P: int) -> Callable[[Tensor], Tensor]:
        mix, weight = self(P, 1), self(self.D, self.D)
        return lambda x: (mix * x[:, :1]) @ weight


SCHEDULES: dict[str, Callable[[Leaves], PromptSchedule]] = {
    "unequal": lambda n: PromptSchedule(
        "prepend", {0: n.tokens(5), 1: n.tokens(2), 2: n.tokens(3)}
    ),
    "unequal-per-image": lambda n: PromptSchedule("append", {0: n.tokens(1, B), 2: n.tokens(4, B)}),
    "unequal-left": lambda n: PromptSchedule(
        "prepend", {0: n.tokens(5), 1: n.tokens(2)}, keep=False
    ),
    "pruned-away": lambda n: PromptSchedule("prepend", {0: n.tokens(3), 1: n.tokens(0)}),
    "mixture": lambda n: PromptSchedule("append", {0: n.mixture(3)}),
    "mixture-then-tokens": lambda n: PromptSchedule("prepend", {0: n.mixture(3), 1: n.tokens(5)}),
    "keys": lambda n: PromptSchedule("prepend", {i: n.keys(i + 1) for i in range(3)}),
    "keys-per-image": lambda n: PromptSchedule("append", {1: n.keys(3, B)}),
    "tokens-then-keys": lambda n: PromptSchedule("prepend", {0: n.tokens(3), 1: n.keys(2)}),
    "keys-then-tokens": lambda n: PromptSchedule("append", {0: n.keys(2), 1: n.tokens(3)}),
    "both": lambda n: PromptSchedule(
        "prepend", {i: (n.tokens(4 - i), n.keys(2 + i)) for i in range(3)}
    ),
    "both-per-image": lambda n: PromptSchedule("append", {0: (n.tokens(2, B), n.keys(3))}),
    "functions": lambda n: PromptSchedule("prepend", {i: n.function(3 - i) for i in range(3)}),
    "function-that-stays": lambda n: PromptSchedule("prepend", {1: n.function(3)}),
    "function-and-keys": lambda n: PromptSchedule("append", {2: (n.function(3), n.keys(2))}),
    "every-kind": lambda n: PromptSchedule(
        "append", {0: (n.mixture(3), n.keys(2, B)), 1: (n.function(2), n.keys(3))}
    ),
}


def compare(backbone: nn.Module, name: str, options: FastOptions, rows: int | None) -> None:
    leaves = Leaves(backbone)
    schedule = SCHEDULES[name](leaves)
    depth = len(backbone.blocks)
    schedule = replace(schedule, entries={i: e for i, e in schedule.entries.items() if i < depth})
    size = backbone.patch_embed.img_size
    images = torch.randn(B, 3, *size, dtype=torch.float64)
    engine = FastBackbone(backbone, options)
    assert engine.cache.unsupported_reason is None
    expected = encode_eager(backbone, images, schedule, Readout(rows=rows))
    actual = engine.encode(images, schedule, Readout(rows=rows))
    assert_close(actual, expected)
    weight = torch.randn(expected.shape[1:], dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves.all, allow_unused=True)
    got = torch.autograd.grad((actual * weight).sum(), leaves.all, allow_unused=True)
    used = [(a, b) for a, b in zip(got, wanted, strict=True) if b is not None and b.numel()]
    assert used
    for a, b in used:
        assert b.abs().max() > 0
        # a gradient that crosses a whole block of normalized tokens is small, its rounding is not
        assert_close(a, b, tolerance=1e-7)
    with torch.no_grad():
        assert_close(engine.encode(images, schedule, Readout(rows=rows)), expected)
        without = encode_eager(backbone, images, schedule, Readout(prompts=False))
        assert without.shape[1] == backbone.num_prefix_tokens + backbone.patch_embed.num_patches
        assert_close(engine.encode(images, schedule, Readout(prompts=False)), without)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_entry(name: str) -> None:
    backbone = small_vit()
    compare(backbone, name, FastOptions(), rows=None)
    compare(backbone, name, FastOptions(memory="min"), rows=1)
    # the biases that absorption leaves out are still in the weights
    compare(backbone, name, replace(OFF, absorb=True, last_rows=True), rows=1)


@pytest.mark.parametrize(
    "backbone",
    [
        "vit_base_patch32_clip_224",  # norm_pre
        "eva02_tiny_patch14_224",  # rotary, no key bias, norm before the output projection
        "vit_small_patch16_dinov3",
        "vit_pe_core_base_patch16_224",
        "vit_small_patch16_rope_mixed_224",
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",  # relative position bias
        "vit_relpos_medium_patch16_cls_224",
    ],
)
def test_every_kind_of_attention(backbone: str) -> None:
    model = tiny(backbone)
    try:
        model.forward_features(torch.zeros(1, 3, *model.patch_embed.img_size, dtype=torch.float64))
    except RuntimeError as error:  # rotary mixtures in timm 1.0.29
        pytest.skip(f"this timm does not run it in float64: {error}")
    compare(model, "every-kind", FastOptions(), rows=None)


@pytest.mark.parametrize(
    "backbone",
    [
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "eva02_base_patch14_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "vit_relpos_medium_patch16_cls_224",
        "vit_so150m_patch16_reg4_gap_256",
    ],
)
def test_blocks_written_out_for_keys_are_timms(backbone: str) -> None:
    """Without any key they give the backbone's own features; with a token's keys, the token's."""
    vit = tiny(backbone)
    images = torch.randn(B, 3, *vit.patch_embed.img_size, dtype=torch.float64)
    n = Leaves(vit)
    with torch.no_grad():
        none = PromptSchedule("append", {0: n.keys(0), 1: n.keys(0)})
        assert_close(encode_eager(vit, images, none), vit.forward_features(images))
        tokens = n.tokens(3)
        attention, y = vit.blocks[1].attn, vit.blocks[1].norm1(tokens)
        qkv = families.of(vit).project(attention, y)
        k, v = (t.unflatten(-1, (n.h, -1)).transpose(0, 1) for t in qkv[1:])
        k = getattr(attention, "k_norm", nn.Identity())(k)
        as_keys = PromptSchedule("append", {1: KeyValues(k, v)})
        as_tokens = PromptSchedule("append", {1: tokens}, keep=False)
        assert_close(encode_eager(vit, images, as_keys), encode_eager(vit, images, as_tokens))


def test_a_block_without_keys_is_refused_by_name() -> None:
    vit = tiny("vit_base_patch16_xp_224")
    images = torch.randn(B, 3, *vit.patch_embed.img_size, dtype=torch.float64)
    keys = torch.zeros(3, 2, 16, dtype=torch.float64)
    schedule = PromptSchedule("append", {0: KeyValues(keys, keys)})
    with pytest.raises(
        ValueError, match="block 0 takes no KeyValues: unsupported block class ParallelScalingBlock"
    ):
        FastBackbone(vit).encode(images, schedule)


@pytest.mark.parametrize("encode", ["engine", "eager"])
@pytest.mark.parametrize(
    "entries, message",
    [
        (lambda n: {3: n.tokens(2)}, "has block 3, the backbone's last is 2"),
        (lambda n: {0: n(2, 7)}, r"block 0 has prompt tokens \(2, 7\); .* D=24 would fit"),
        (lambda n: {1: n.tokens(2, 5)}, r"block 1 has prompt tokens \(5, 2, 24\); .* B=2"),
        (lambda n: {0: Mixture(n(3, 2, 6), n(6, 24))}, r"block 0 mixes logits \(3, 2, 6\)"),
        (lambda n: {0: Mixture(n(2, 2, 6), n(6, 7))}, r"block 0 mixes .* library \(6, 7\)"),
        (lambda n: {1: KeyValues(n(2, 4, 8), n(2, 4, 8))}, r"block 1 has keys \(2, 4, 8\)"),
        (lambda n: {1: KeyValues(n(3, 4, 8), n(3, 5, 8))}, r"block 1 has keys .* one shape"),
        (lambda n: {0: lambda x: x[0, :, :3]}, r"block 0 has prompt tokens \(18, 3\)"),
        (lambda n: {0: lambda x: None}, "block 0 is a function that returned a NoneType"),
    ],
)
def test_entries_that_do_not_fit_are_named(entries, message: str, encode: str) -> None:
    backbone = small_vit()
    schedule = PromptSchedule("prepend", entries(Leaves(backbone)))
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    with pytest.raises((ValueError, TypeError), match=message):
        if encode == "engine":
            FastBackbone(backbone).encode(images, schedule)
        else:
            encode_eager(backbone, images, schedule)


def test_schedules_that_make_no_sense_are_refused() -> None:
    tokens = torch.randn(2, 4)
    mixture = Mixture(torch.randn(1, 2, 3), torch.randn(3, 4))
    keys = KeyValues(tokens[None], tokens[None])
    for make, message in (
        (lambda: PromptSchedule("front", {}), "position='front'; known: 'append'"),
        (lambda: PromptSchedule("append", {-1: tokens}), "has the key -1"),
        (lambda: PromptSchedule("append", {1: mixture}), "block 1 is a Mixture"),
        (lambda: PromptSchedule("append", {0: 3}), "block 0 is a int; an entry is"),
        (lambda: PromptSchedule("append", {0: (tokens, tokens)}), "block 0 is a tuple"),
        (lambda: PromptSchedule("add", {0: keys}), "position='add' adds tensors"),
        (lambda: PromptSchedule("add", {0: lambda x: x}), "position='add' adds tensors"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()
