"""What is made from frozen weights: shared by the models on a backbone, freed with them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn

import pgn_fast
from pgn_fast.backbone import cache
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.options import FastOptions
from pgn_fast.models.heads import ZeroShotHead

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    made = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2} | options,
    )
    with torch.no_grad():  # timm starts biases at zero and gains at one
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def vpt(backbone: nn.Module, fast: object = True, **options) -> nn.Module:
    torch.manual_seed(2)
    return pgn_fast.VPT(backbone, 5, num_prompts=3, fast=fast, **options).eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("assign", ["setattr", "register_module", "_modules"])
@pytest.mark.parametrize("method", ["deep", "shallow", "pgn"])
@pytest.mark.parametrize("fast", [True, False])
def test_another_backbone_is_used_everywhere(assign: str, method: str, fast: bool) -> None:
    if method == "pgn":
        sizes = {"num_prompts": 3, "library_size": 8, "resolution": 32}
        model = pgn_fast.PGN(vit(), 5, fast=fast, **sizes).eval()
    else:
        model = vpt(vit(), fast, deep=method == "deep")
    before, other = model(IMAGES), vit(seed=7).train().requires_grad_(True)
    trained = len(model.trainable_parameters())
    if assign == "setattr":
        model.backbone = other
    elif assign == "register_module":
        model.register_module("backbone", other)
    else:
        model._modules["backbone"] = other
    assert len(model.trainable_parameters()) == trained
    after, expected = model(IMAGES), model.forward_reference(IMAGES)
    assert relative(after, expected) <= 5e-6 < 1e-3 < relative(after, before)
    assert (
        not other.training and model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()
    )


def test_a_backbone_of_another_width_is_refused() -> None:
    model = vpt(vit())
    model.backbone = vit(embed_dim=32)
    with pytest.raises(ValueError, match=r"by a VisionTransformer of width 32; .* width 64"):
        model(IMAGES)


def test_models_on_one_backbone_share_its_folded_weights() -> None:
    backbone = vit()
    first, second = vpt(backbone), vpt(backbone, "min", deep=False)
    assert relative(first(IMAGES), first.forward_reference(IMAGES)) <= 5e-6
    alone = first.engine.cache.extra_bytes()
    assert relative(second(IMAGES), second.forward_reference(IMAGES)) <= 5e-6
    pairs = zip(*(m.engine.cache.weights(torch.float32) for m in (first, second)), strict=True)
    assert all(a is b for a, b in pairs)
    assert first.engine.cache.extra_bytes() == second.engine.cache.extra_bytes() == alone
    assert f"+{alone / 1e6:.1f} MB" in second.explain()

    unfolded = vpt(backbone, FastOptions(fold=False))
    assert relative(unfolded(IMAGES), unfolded.forward_reference(IMAGES)) <= 5e-6
    assert relative(first(IMAGES), first.forward_reference(IMAGES)) <= 5e-6


@pytest.mark.parametrize("packed", [False, True])
def test_folded_weights_are_freed_with_the_last_model(packed: bool) -> None:
    backbone = vit()
    models = [vpt(backbone, FastOptions(packed=packed)) for _ in range(2)]
    for model in models:
        model(IMAGES)
    kept = [weakref.ref(w.qkv.weight) for w in models[0].engine.cache.weights(torch.float32)]
    del models[0], model
    gc.collect()
    assert all(ref() is not None for ref in kept)
    models.clear()
    gc.collect()
    assert all(ref() is None for ref in kept) and id(backbone) not in cache._shared

    model, gone = vpt(backbone), weakref.ref(backbone)
    model(IMAGES)
    del model, backbone
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_leave_the_folded_weights_out() -> None:
    model = vpt(vit())
    expected = model(IMAGES)
    state = model.engine.__getstate__()
    assert set(state) == {"backbone", "options", "backend"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.engine.backbone is twin.backbone is not model.backbone
        assert torch.equal(twin(IMAGES), expected)


def test_threads_fold_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, folds = vit(), []
    own = cache.fold_block
    monkeypatch.setattr(cache, "fold_block", lambda *args: folds.append(1) or own(*args))
    monkeypatch.setattr("pgn_fast.backbone.engine.FastBackbone.check", lambda self: None)
    models = [vpt(backbone) for _ in range(8)]
    expected, found = models[0].forward_reference(IMAGES), []
    start = threading.Barrier(8)

    def run(model: nn.Module) -> None:
        start.wait()
        with torch.no_grad():
            found.append(model(IMAGES))

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(relative(x, expected) <= 5e-6 for x in found)
    assert len(folds) == len(backbone.blocks)


def test_a_backbone_that_moved_unseen_runs_by_its_new_devices_kernels() -> None:
    """A compiler traces a model that was moved after its last forward, and looks at nothing."""
    backbone = vit()
    found = FastBackbone(backbone).cache
    found.backend_for("frozen_linear", torch.float32)
    backbone.to("meta")
    assert found.backend_for("frozen_linear", torch.float32) == "reference"


def test_a_compiler_does_not_trace_the_choice_of_kernels() -> None:
    model = vpt(vit())
    cache._shared_of(model.backbone).backends.clear()  # as after a move to another device
    found = torch._dynamo.explain(model)(IMAGES)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_class_embeddings_go_to_the_backbones_device() -> None:
    head = ZeroShotHead(vit(num_classes=0).to("meta"), torch.randn(4, 64), 1.0)
    assert head.class_embeddings.device.type == "meta"
