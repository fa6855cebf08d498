"""The engine under what people put around a model: casts, compilers, exporters, copies, DDP."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_backbone_exact import randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pgn_fast
from pgn_fast.backbone import blocks, cache
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.options import FastOptions


def backbone(**kwargs) -> nn.Module:
    options = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "patch_size": 8}
    options |= {"num_classes": 0, "init_values": 0.3} | kwargs
    return randomize(timm.create_model("vit_tiny_patch16_224", **options))


def vpt(fast: bool | str | FastOptions = True, **kwargs) -> pgn_fast.VPT:
    return pgn_fast.VPT(backbone(**kwargs), 5, num_prompts=3, fast=fast)


def pgn(**kwargs) -> pgn_fast.PGN:
    return pgn_fast.PGN(backbone(**kwargs), 5, num_prompts=3, library_size=8)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logits.float().square().mean(), model.trainable_parameters()))


@pytest.mark.parametrize("make", [vpt, pgn, lambda: vpt("balanced"), lambda: vpt("min")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_as_timm_under_it(make, dtype: torch.dtype) -> None:
    model, images = make(), torch.randn(4, 3, 32, 32)
    exact = model.forward_reference(images)
    exact_grads = gradients(model, exact)
    with torch.autocast("cpu", dtype=dtype):
        ours, timms = model(images), model.forward_reference(images)
    assert ours.dtype == timms.dtype
    bound = 2 * relative(timms, exact) + torch.finfo(dtype).eps
    assert relative(ours, exact) <= bound
    grads = zip(gradients(model, ours), gradients(model, timms), exact_grads, strict=True)
    for own, timm_s, wanted in grads:
        assert own.dtype == torch.float32
        assert relative(own, wanted) <= 2 * relative(timm_s, wanted) + torch.finfo(dtype).eps


def test_pure_bfloat16_is_as_close_as_timm_in_it() -> None:
    model, images = vpt(), torch.randn(4, 3, 32, 32)
    exact = model(images)
    model.to(torch.bfloat16)
    half = images.to(torch.bfloat16)
    ours, timms = model(half), model.forward_reference(half)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) <= 2 * relative(timms, exact) + 2**-8


@pytest.mark.parametrize(
    "memory, batches", [("fast", (2, 3, 4, 5)), ("balanced", (2,)), ("min", (2,))]
)
def test_compiles_whole_and_once_for_every_batch_size(memory: str, batches: tuple[int]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = vpt(memory)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for B in batches:
        images = torch.randn(B, 3, 32, 32)
        logits, expected = compiled(images), model(images)
        assert relative(logits, expected) <= 2e-6
        pairs = zip(gradients(model, logits), gradients(model, expected), strict=True)
        assert all(relative(a, b) <= 1e-5 for a, b in pairs)
    assert counter.frame_count <= 2


def test_compiled_model_sees_changed_weights() -> None:
    model, images = vpt(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(images)
        model.backbone.blocks[0].norm1.weight.mul_(2)
        after = compiled(images)
        assert relative(after, model.forward_reference(images)) <= 2e-6
        assert relative(after, before) > 1e-3


@pytest.mark.parametrize("make", [vpt, pgn])
def test_exports_with_dynamic_batch(make, tmp_path) -> None:
    model = make().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"images": {0: batch}}
        )
        images = torch.randn(5, 3, 32, 32)
        expected = model.forward_reference(images)
        assert relative(program.module()(images), expected) <= 2e-6
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=str(path), input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert relative(torch.from_numpy(logits), expected) <= 1e-5


def _ddp_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model, images = vpt("balanced"), torch.randn(4, 3, 32, 32)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # DDP reports a parameter that got no gradient at the next forward
        model.zero_grad()
        parallel(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


def fork_two(port: int, folder: str) -> None:
    torch.multiprocessing.start_processes(
        _ddp_worker, (port, folder), nprocs=2, start_method="fork"
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("make", [vpt, pgn])
def test_traces_alike_with_gradients_and_without(make, gradients: bool) -> None:
    model, images = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, images)
        others = torch.randn(3, 3, 32, 32)
        assert relative(traced(others), model(others)) <= 1e-5


def test_trains_under_ddp_without_unused_parameters(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # one new process that forks: autograd's threads, once started here, do not survive a fork, and
    # two processes that import torch and timm take half a minute
    code = f"import {Path(__file__).stem} as tests; tests.fork_two({port}, {str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    torch.manual_seed(0)
    model, images = vpt(), torch.randn(4, 3, 32, 32)
    model.forward_reference(images).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative(grads[name], p.grad) <= 1e-5


def test_accumulates_gradients_and_checkpoints() -> None:
    model, images = vpt(), torch.randn(4, 3, 32, 32)
    expected = gradients(model, model.forward_reference(images))
    model.set_grad_checkpointing()
    for half in images.split(2):
        (model(half).square().mean() / 2).backward()
    for p, wanted in zip(model.trainable_parameters(), expected, strict=True):
        assert relative(p.grad, wanted) <= 1e-5
    outer = torch.utils.checkpoint.checkpoint(model, images, use_reentrant=False)
    for own, wanted in zip(gradients(model, outer), expected, strict=True):
        assert relative(own, wanted) <= 1e-5


@pytest.mark.parametrize(
    "options, size",
    [
        ({"dynamic_img_size": True}, (48, 64)),
        ({"img_size": 384, "patch_size": 32}, (384, 384)),
        ({"in_chans": 1}, (32, 32)),
        ({"class_token": False, "global_pool": "avg"}, (32, 32)),
        ({"pre_norm": True}, (32, 32)),
    ],
    ids=str,
)
def test_backbones_made_differently(options: dict, size: tuple[int, int]) -> None:
    model = vpt(**options)
    images = torch.randn(2, options.get("in_chans", 3), *size)
    assert relative(model(images), model.forward_reference(images)) <= 5e-6
    last = images.to(memory_format=torch.channels_last)
    assert relative(model(last), model.forward_reference(images)) <= 5e-6


def test_folded_weights_follow_the_backbone() -> None:
    model, images = vpt(), torch.randn(2, 3, 32, 32)
    engine = model.engine

    def agrees() -> bool:
        like = images.to(model.backbone.pos_embed.dtype)
        return relative(model(like), model.forward_reference(like)) <= 5e-6

    assert agrees()
    folded = engine.cache.weights(torch.float32)[0].qkv.weight
    assert agrees() and engine.cache.weights(torch.float32)[0].qkv.weight is folded
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight.mul_(1.5)
    assert agrees()
    model.backbone.load_state_dict(backbone(depth=2).state_dict())
    assert agrees()
    model.double()
    assert agrees()
    twin = copy.deepcopy(model)
    assert twin.engine.backbone is twin.backbone is not model.backbone
    with torch.no_grad():
        twin.backbone.blocks[0].norm2.bias.add_(1)
    assert relative(twin(images.double()), model(images.double())) > 1e-3
    assert agrees()
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(images.double()), model(images.double()))


CHANGES_OF_A_BACKBONE_THAT_RAN: list[tuple[Callable[[Any], object], tuple[int, int]]] = [
    (lambda vit: vit.set_input_size((64, 32)), (64, 32)),
    (lambda vit: vit.set_input_size((32, 32), patch_size=(4, 4)), (32, 32)),
    (lambda vit: vit.prune_intermediate_layers([0]), (32, 32)),
]


@pytest.mark.parametrize("make", [vpt, pgn])
@pytest.mark.parametrize("change, size", CHANGES_OF_A_BACKBONE_THAT_RAN)
def test_another_size_or_depth_after_the_first_forward(make, change, size) -> None:
    model = make()
    model(torch.randn(2, 3, 32, 32))
    change(model.backbone)
    model.backbone.requires_grad_(False)  # timm before 1.0.31 makes position embeddings that train
    images = torch.randn(2, 3, *size)
    assert relative(model(images), model.forward_reference(images)) <= 1e-5
    assert model.engine.cache.refused is None
    model.explain()


def test_changed_blocks_go_the_reference_path() -> None:
    model, images = vpt(), torch.randn(2, 3, 32, 32)
    assert model.engine.cache.unsupported_reason is None
    seen = []
    handle = model.backbone.blocks[0].attn.register_forward_hook(lambda *args: seen.append(1))
    assert "hook" in model.engine.cache.unsupported_reason
    model(images)
    assert seen
    handle.remove()
    assert model.engine.cache.unsupported_reason is None
    model.backbone.blocks[1].attn.qkv = nn.Sequential(model.backbone.blocks[1].attn.qkv)
    assert (
        "attn.qkv is a torch.nn.modules.container.Sequential"
        in model.engine.cache.unsupported_reason
    )
    assert torch.equal(model(images), model.forward_reference(images))
    vit = backbone()
    vit.blocks[0].attn.forward = lambda x, **_: x
    assert "forward of attn was replaced" in FastBackbone(vit).cache.unsupported_reason
    model.backbone.requires_grad_(True)
    assert "require a gradient" in model.engine.cache.unsupported_reason


def test_large_activations_are_no_mistake_of_the_engine() -> None:
    vit = backbone()
    with torch.no_grad():
        vit.pos_embed.add_(1e4)
    model, images = pgn_fast.VPT(vit, 5, num_prompts=3).eval(), torch.randn(2, 3, 32, 32)
    assert model.engine.cache.refused is None
    exact = copy.deepcopy(model).double().forward_reference(images.double())
    timms = relative(model.forward_reference(images), exact)
    assert timms > 1e-4  # such a backbone rounds that much by itself
    assert relative(model(images), exact) <= 4 * timms


def test_engine_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocks.hidden
    monkeypatch.setattr(blocks, "hidden", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(RuntimeError, match="differs from timm's own blocks by"):
        vpt()
    assert vpt(False).engine is None


def test_backbone_is_not_changed() -> None:
    vit = backbone()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    model = pgn_fast.VPT(vit, 5, num_prompts=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in vit.parameters())


def test_inference_reuses_prompt_keys_only_while_prompts_stay() -> None:
    model, images = vpt().eval(), torch.randn(2, 3, 32, 32)
    for _ in range(3):
        with torch.inference_mode():
            model(images)
            assert relative(model(images), model.forward_reference(images)) <= 5e-6
        # a write that no version counter sees
        model.prompter.prompts.data.mul_(1.1)


def test_memory_plans_keep_fewer_bytes() -> None:
    vit = backbone(depth=6)
    kept = {}
    for memory in ("reference", "fast", "balanced", "min"):
        model = pgn_fast.VPT(vit, 5, num_prompts=8, fast=memory != "reference" and memory)
        kept[memory] = _bytes_kept(model, torch.randn(4, 3, 32, 32))
    assert kept["fast"] < 0.85 * kept["reference"]
    assert kept["balanced"] < 0.55 * kept["reference"]
    assert kept["min"] < 0.25 * kept["reference"]


def _bytes_kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for backward, weights aside."""
    model(images)  # folds
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    if model.engine is not None:
        for block in model.engine.cache.weights(torch.float32):
            weights |= {t.untyped_storage().data_ptr() for t in block.tensors()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(images)
        assert logits.requires_grad
    return sum(kept.values())


def test_memory_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"'fast', 'balanced', 'min' .*got 'tiny'"):
        vpt("tiny")
    assert isinstance(FastBackbone(backbone()).options, FastOptions)


def _another_embedding(vit: nn.Module) -> None:
    embed = vit._pos_embed
    vit._pos_embed = lambda x: 2 * embed(x)


def _a_hook(vit: nn.Module) -> None:
    vit.pos_drop.register_forward_hook(lambda module, args, output: 2 * output)


def _overlapping_patches(vit: nn.Module) -> None:
    own = vit.patch_embed.proj
    vit.patch_embed.proj = nn.Conv2d(3, own.out_channels, 10, stride=8, padding=1)
    vit.patch_embed.proj.requires_grad_(False)


@pytest.mark.parametrize("change", [_another_embedding, _a_hook, _overlapping_patches])
def test_a_changed_embedding_runs_by_its_own_code(change) -> None:
    model, images = vpt(), torch.randn(2, 3, 32, 32)
    before = model(images)
    assert model.engine.cache.embed_unsupported_reason is None
    change(model.backbone)
    assert model.engine.cache.embed_unsupported_reason is not None
    after = model(images)
    assert relative(after, model.forward_reference(images)) <= 2e-6
    assert relative(after, before) > 1e-3


@pytest.mark.parametrize("deep", [True, False])
def test_heads_too_wide_for_the_kernels_take_torch_s_attention(deep: bool) -> None:
    wide, images = backbone(embed_dim=320, num_heads=1), torch.randn(2, 3, 32, 32)
    model = pgn_fast.VPT(wide, 5, num_prompts=3, deep=deep)
    assert relative(model(images), model.forward_reference(images)) <= 1e-5


def test_a_named_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: its kernels take"):
        pgn_fast.VPT(backbone().double(), 5, num_prompts=3, backend="cpu")


def test_packing_leaves_a_named_plain_torch_alone() -> None:
    packed = FastOptions(packed=True)
    model = pgn_fast.VPT(backbone(), 5, num_prompts=3, backend="reference", fast=packed)
    assert "packed     backend='reference' names eager PyTorch" in model.explain()


@pytest.mark.parametrize("make", [vpt, pgn, lambda: vpt("balanced"), lambda: vpt("min")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_where_no_copies_are_kept(monkeypatch, make, dtype: torch.dtype) -> None:
    """As on a GPU, where the weights stay in float32."""
    monkeypatch.setattr(cache, "copies_unsupported_reason", lambda backbone: "as on a GPU")
    test_autocast_is_as_close_as_timm_under_it(make, dtype)
