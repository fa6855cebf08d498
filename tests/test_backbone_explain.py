"""What ``explain`` says, and what packing changes: nothing but the time."""

from __future__ import annotations

import pytest
import timm
import torch
from test_backbone_works_with import backbone, relative, vpt

import pgn_fast
from pgn_fast.backbone import packed
from pgn_fast.backbone.options import FastOptions
from pgn_fast.ops import dispatch


def line(text: str, name: str) -> str:
    (found,) = (row for row in text.splitlines() if row.split()[1:2] == [name])
    return found.strip()


def test_deep_prompts() -> None:
    text = vpt().explain()
    assert line(text, "kv_only").startswith("on") and "2 blocks" in line(text, "kv_only")
    assert line(text, "absorb").startswith("on")
    assert "block 1 computes 1 row(s)" in line(text, "last_rows")
    assert line(text, "fold").startswith("on") and "MB" in line(text, "fold")
    assert line(text, "packed") == "off  packed     switched off"
    assert "10 D numbers" in text and "6 D numbers" in vpt("balanced").explain()


def test_ops_are_named_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "attention: backend cpu" in vpt().explain()
    named = pgn_fast.VPT(backbone(), 5, num_prompts=3, backend="reference").explain()
    assert "attention: eager PyTorch" in named
    assert "linear layers: backend cpu" in vpt().explain()
    monkeypatch.setattr(dispatch, "PREFER_OVER_SDPA", ())
    assert "attention with prompts: backend cpu" in vpt().explain()
    shallow = pgn_fast.VPT(backbone(depth=3), 5, num_prompts=2, deep=False).explain()
    assert "attention" not in shallow.partition("memory=")[2]
    assert "mixing by" in pgn_fast.PGN(backbone(), 5, num_prompts=2).explain()


def test_an_unfrozen_patch_embedding_is_noticed() -> None:
    model = vpt()
    model.backbone.patch_embed.proj.weight.requires_grad = True
    assert "require a gradient" in model.explain()


def test_every_saving_can_be_switched_off() -> None:
    for name in ("kv_only", "last_rows", "absorb", "first", "fold", "biases"):
        text = vpt(FastOptions(**{name: False})).explain()
        assert line(text, name).split(maxsplit=2)[2] == "switched off"


def test_reasons() -> None:
    shallow = pgn_fast.VPT(backbone(depth=3), 5, num_prompts=2, deep=False).explain()
    assert line(shallow, "kv_only").startswith("off")
    mean = pgn_fast.VPT(backbone(global_pool="avg"), 5, num_prompts=2).explain()
    assert "reads all tokens" in line(mean, "last_rows")
    rope = timm.create_model(
        "vit_small_patch16_rope_224", depth=2, embed_dim=48, num_heads=3, img_size=48
    )
    assert "rotated" in line(pgn_fast.VPT(rope, 5).explain(), "absorb")
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    beit = pgn_fast.VPT(timm.create_model("beit_base_patch16_224", **small), 5)
    assert "attention: eager PyTorch, because a relative position bias is added" in beit.explain()
    parallel = pgn_fast.VPT(timm.create_model("vit_base_patch16_xp_224", **small), 5).explain()
    assert "block 0: unsupported block class ParallelScalingBlock (supported: Block)" in parallel
    assert "fast=False" in vpt(False).explain()


def test_fold_says_its_memory() -> None:
    engine = vpt().engine
    D, H, depth = 64, 256, 2
    matrices = 3 * D * D + D * D + 2 * D * H  # LayerScale is in the output weights, too
    vectors = D + D + H + D + 2 * D  # q bias, and zeros kept for keys and values
    assert engine.cache.extra_bytes() == 4 * depth * (matrices + vectors)
    assert vpt(FastOptions(fold=False, biases=False)).engine.cache.extra_bytes() == 0


@pytest.mark.skipif(
    packed.unsupported_reason(torch.device("cpu"), torch.float32) is not None,
    reason="no library packs weights here",
)
def test_packed_weights_change_nothing() -> None:
    plain, images = vpt(), torch.randn(8, 3, 32, 32)
    model = pgn_fast.VPT(plain.backbone, 5, num_prompts=3, fast=FastOptions(packed=True))
    model.load_adapter_state_dict(plain.adapter_state_dict())
    for B in (8, 5, 8, 4):
        logits, expected = model(images[:B]), plain(images[:B])
        assert relative(logits, expected) <= 2e-6
        pairs = zip(
            torch.autograd.grad(logits.sum(), model.trainable_parameters()),
            torch.autograd.grad(expected.sum(), plain.trainable_parameters()),
            strict=True,
        )
        assert all(relative(a, b) <= 5e-6 for a, b in pairs)
    linear = model.engine.cache.weights(torch.float32)[0].fc1
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 256)  # two blocks of D = 64
    assert f"+{4e-6 * matrices:.1f} MB for each direction" in model.explain()
    kept = {4 * 17, 8 * 17} if packed.gemm_library() == "mkl" else {0}  # the last two, or any
    assert {rows for _, rows in linear.packed} == kept
