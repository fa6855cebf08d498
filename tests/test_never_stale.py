"""Frozen weights that change: the next forward equals the reference, whatever changed them.

Every way of changing them that torch, timm and PEFT offer, in training, no_grad and inference_mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from torch import Tensor, nn

import pgn_fast
from pgn_fast import _native
from pgn_fast.backbone import watch
from pgn_fast.backbone.options import FastOptions

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
every_mode = pytest.mark.parametrize("mode", MODES)
needs_cpu_kernels = pytest.mark.skipif(
    _native.cpu_missing is not None, reason=f"no CPU kernels: {_native.cpu_missing}"
)


def vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    made = timm.create_model("vit_tiny_patch16_224", **(sizes | options))
    with torch.no_grad():  # timm starts biases at zero and gains at one
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.requires_grad_(False).eval()


def vpt(backbone: nn.Module, fast: object = True) -> nn.Module:
    torch.manual_seed(2)
    return pgn_fast.VPT(backbone, 5, num_prompts=3, fast=fast).eval()


def blocks(model: nn.Module) -> list[Tensor]:
    return list(model.backbone.blocks.parameters())


def error(model: nn.Module) -> float:
    actual, expected = model(IMAGES), model.forward_reference(IMAGES)
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in blocks(model):
            p.mul_(1.2)


def in_place_one_element(model: nn.Module) -> None:
    with torch.no_grad():
        blocks(model)[2].view(-1)[7] += 5


def data_mul(model: nn.Module) -> None:
    for p in blocks(model):
        p.data.mul_(1.2)


def data_copy(model: nn.Module) -> None:
    for p, q in zip(blocks(model), vit(seed=7).blocks.parameters(), strict=True):
        p.data.copy_(q)


def data_lerp(model: nn.Module) -> None:
    for p, q in zip(blocks(model), vit(seed=7).blocks.parameters(), strict=True):
        p.data.lerp_(q, 0.3)


def data_negated(model: nn.Module) -> None:
    for p in model.backbone.blocks[0].attn.parameters():
        p.data.neg_()


def data_rows_swapped(model: nn.Module) -> None:
    weight = model.backbone.blocks[1].mlp.fc1.weight.data
    weight.copy_(weight.flip(0))


def data_one_element(model: nn.Module) -> None:
    model.backbone.blocks[1].attn.qkv.weight.data[3, 5] += 5


def data_assigned(model: nn.Module) -> None:
    for p in blocks(model):
        p.data = p.data * 1.2


def data_swapped_twice(model: nn.Module) -> None:
    """The weights of an average come and go at the same addresses."""
    others = [q.clone() for q in vit(seed=7).blocks.parameters()]
    for p, q in zip(blocks(model), others, strict=True):
        p.data, q.data = q.data, p.data
    model(IMAGES)
    for p, q in zip(blocks(model), others, strict=True):
        q.mul_(1.2)
        p.data, q.data = q.data, p.data


def numpy_view(model: nn.Module) -> None:
    for p in blocks(model):
        p.numpy()[...] *= 1.2


def numpy_element(model: nn.Module) -> None:
    model.backbone.blocks[0].mlp.fc2.bias.numpy()[3] += 5


def dlpack(model: nn.Module) -> None:
    for p in blocks(model):
        torch.from_dlpack(p.detach()).mul_(1.2)


def foreach(model: nn.Module) -> None:
    torch._foreach_mul_([p.detach() for p in blocks(model)], 1.2)


def foreach_data(model: nn.Module) -> None:
    torch._foreach_add_([p.data for p in blocks(model)], 0.05)


def load(model: nn.Module) -> None:
    model.backbone.load_state_dict(vit(seed=7).state_dict())


def load_by_assignment(model: nn.Module) -> None:
    model.backbone.load_state_dict(vit(seed=7).state_dict(), assign=True)
    model.backbone.requires_grad_(False)


def swap_tensors(model: nn.Module) -> None:
    for p, q in zip(blocks(model), list(vit(seed=7).blocks.parameters()), strict=True):
        torch.utils.swap_tensors(p, nn.Parameter(q.detach().clone(), requires_grad=False))


def average(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model.backbone)
    averaged.update_parameters(vit(seed=7))
    averaged.update_parameters(vit(seed=8))
    for p, q in zip(blocks(model), averaged.module.blocks.parameters(), strict=True):
        p.data.copy_(q.data)


def set_submodule(model: nn.Module) -> None:
    model.backbone.set_submodule("blocks.0.mlp.fc1", vit(seed=7).blocks[0].mlp.fc1)


def replaced_block(model: nn.Module) -> None:
    model.backbone.blocks[1] = vit(seed=7).blocks[1]


def replaced_backbone(model: nn.Module) -> None:
    model.backbone = vit(seed=7)


def removed_block(model: nn.Module) -> None:
    del model.backbone.blocks[0]


def quantized(model: nn.Module) -> None:
    for i, block in enumerate(model.backbone.blocks):
        fc1 = block.mlp.fc1

        class Quantized(nn.Module):
            def __init__(self, linear: nn.Linear) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.linear.weight.round(decimals=1))

        model.backbone.set_submodule(f"blocks.{i}.mlp.fc1", Quantized(fc1))


def eps(model: nn.Module) -> None:
    for block in model.backbone.blocks:
        block.norm1.eps = 0.5


def heads(model: nn.Module) -> None:
    for block in model.backbone.blocks:
        block.attn.num_heads, block.attn.head_dim = 1, 32


def scale(model: nn.Module) -> None:
    for block in model.backbone.blocks:  # timm's fused attention does not read the scale
        block.attn.scale, block.attn.fused_attn = 3.0, False


def activation(model: nn.Module) -> None:
    for block in model.backbone.blocks:
        block.mlp.act = nn.ReLU()


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


def other_class(model: nn.Module) -> None:
    for block in model.backbone.blocks:
        block.mlp.fc2.__class__ = Louder


def own_forward(model: nn.Module) -> None:
    fc2 = model.backbone.blocks[0].mlp.fc2
    fc2.forward = lambda x: 1.5 * nn.Linear.forward(fc2, x)


def hook(model: nn.Module) -> None:
    model.backbone.blocks[0].mlp.register_forward_hook(lambda module, args, out: 1.1 * out)


CHANGES = [
    in_place,
    in_place_one_element,
    data_mul,
    data_copy,
    data_lerp,
    data_negated,
    data_rows_swapped,
    data_one_element,
    data_assigned,
    data_swapped_twice,
    numpy_view,
    numpy_element,
    dlpack,
    foreach,
    foreach_data,
    load,
    load_by_assignment,
    swap_tensors,
    average,
    set_submodule,
    replaced_block,
    replaced_backbone,
    removed_block,
    quantized,
    eps,
    heads,
    scale,
    activation,
    other_class,
    own_forward,
    hook,
]


@every_mode
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_forward_sees(change: Callable[[nn.Module], None], mode: str) -> None:
    fast = FastOptions(packed=mode == "no_grad")
    torch.manual_seed(2)
    # deep prompts of a block that is gone could not enter
    model = pgn_fast.VPT(
        vit(), 5, num_prompts=3, deep=change is not removed_block, fast=fast
    ).eval()
    with MODES[mode]():
        before = model(IMAGES)
        change(model)
        assert error(model) <= 1e-5
        after = model(IMAGES)
        assert float((after - before).detach().abs().max()) > 1e-4


@every_mode
def test_casts(mode: str) -> None:
    model = vpt(vit())
    with MODES[mode]():
        model(IMAGES)
        model.backbone.half()
        images = IMAGES.half()
        expected = model.forward_reference(images)
        assert float((model(images) - expected).detach().abs().max()) <= 2e-2
        model.to(torch.float64)
        images = IMAGES.double()
        assert float((model(images) - model.forward_reference(images)).detach().abs().max()) <= 1e-5


def test_weights_made_in_inference_mode_are_not_copied() -> None:
    """Their writes are not counted, so that nothing could be noticed but by the bytes."""
    with torch.inference_mode():
        model = vpt(vit())
        model(IMAGES)
        assert "is an inference tensor" in model.explain() and error(model) <= 1e-5
        for change in (data_one_element, numpy_element, load, in_place_one_element, in_place):
            change(model)
            assert error(model) <= 1e-5


def test_peft_merges_and_unmerges() -> None:
    peft = pytest.importorskip("peft")
    model = vpt(vit())
    before = model(IMAGES)
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(model.backbone, config)
    assert error(model) <= 1e-5
    tuned.merge_adapter()
    assert error(model) <= 1e-5
    tuned.unmerge_adapter()
    assert error(model) <= 1e-5
    tuned.merge_and_unload()
    model.backbone.requires_grad_(False)
    assert model.engine.cache.unsupported_reason is None
    assert error(model) <= 1e-5
    assert float((model(IMAGES) - before).detach().abs().max()) > 1e-3
    # PEFT's own way of merging, on a model that runs the merged weights already
    model.backbone.blocks[0].attn.qkv.weight.data += 0.1
    assert error(model) <= 1e-5


@every_mode
@pytest.mark.parametrize(
    "register",
    ["register_module_forward_hook", "register_module_forward_pre_hook"],
)
def test_hooks_on_all_modules(register: str, mode: str) -> None:
    model, seen = vpt(vit()), []
    with MODES[mode]():
        model(IMAGES)
        handle = getattr(nn.modules.module, register)(lambda module, *args: seen.append(module))
        try:
            assert "a hook is registered on all modules" in model.engine.cache.unsupported_reason
            assert error(model) == 0
            assert model.backbone.blocks[0].attn.qkv in seen
        finally:
            handle.remove()
        assert model.engine.cache.unsupported_reason is None and error(model) <= 1e-5


@pytest.mark.parametrize("pre", [True, False])
def test_backward_hooks_are_called(pre: bool) -> None:
    model, seen = vpt(vit()), []
    block = model.backbone.blocks[1]
    register = block.register_full_backward_pre_hook if pre else block.register_full_backward_hook
    register(lambda *args: seen.append(1))
    model(IMAGES).sum().backward()
    assert seen == [1]


@every_mode
@pytest.mark.parametrize("cls", ["attention", "linear", "norm"])
def test_a_class_whose_forward_is_replaced(
    cls: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vpt(vit())
    block = model.backbone.blocks[0]
    found = type({"attention": block.attn, "linear": block.mlp.fc1, "norm": block.norm1}[cls])
    own = found.forward
    with MODES[mode]():
        model(IMAGES)
        monkeypatch.setattr(found, "forward", lambda self, *a, **k: 1.1 * own(self, *a, **k))
        assert (
            f"forward of the class {found.__name__} was replaced"
            in model.engine.cache.unsupported_reason
        )
        assert error(model) == 0
        monkeypatch.undo()
        assert model.engine.cache.unsupported_reason is None and error(model) <= 1e-5


def test_flops_can_be_counted_on_the_fast_path() -> None:
    """torch's counter registers hooks on all modules, which change nothing."""
    model = vpt(vit())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as fast:
        model(IMAGES)
        assert model.engine.cache.unsupported_reason is None
    with torch.utils.flop_counter.FlopCounterMode(display=False) as eager:
        model.forward_reference(IMAGES)
    assert fast.get_total_flops() < eager.get_total_flops()


@needs_cpu_kernels
def test_a_write_to_one_element_of_a_large_backbone_is_seen_in_time() -> None:
    large = {"embed_dim": 192, "num_heads": 3, "depth": 4}
    model = vpt(vit(**large))
    with torch.no_grad():
        model(IMAGES)
        found = model.engine.cache._shared.watch
        chunks = len(found._prefixes) - 1
        assert chunks > 2 * watch._LEAST  # too large to be looked at whole each time
        for change in (model.refresh, model.train, lambda: None):
            assert error(model) <= 1e-5
            weight = model.backbone.blocks[3].mlp.fc1.weight.data
            weight[5, 77] += 5
            change()
            runs = 1
            while error(model) > 1e-5:
                runs += 1
                assert runs <= -(-chunks // watch._LEAST)
            assert runs == 1 or change not in (model.refresh, model.train)
            model.eval()


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_sees_every_byte(dtype: torch.dtype) -> None:
    """Bit by bit, at every place, in odd sizes; and a range is a difference of prefixes."""
    op = torch.ops.pgn_fast_C.weights_fingerprint.default
    random = torch.Generator().manual_seed(0)
    weights = [torch.randint(0, 256, (n,), generator=random).to(dtype) for n in (1, 7, 300, 13)]
    as_bytes = [watch._as_bytes(w) for w in weights]
    words = sum(-(-t.numel() // 8) for t in as_bytes)
    whole = op(as_bytes, 0, 0, words)
    assert whole == op([t.clone() for t in as_bytes], 0, 0, words)
    parts = sum(op(as_bytes, 0, start, start + 11) for start in range(0, words, 11))
    assert (parts - whole) % 2**64 == 0
    seen = {whole}
    for t in as_bytes:
        for place in range(0, t.numel(), max(1, t.numel() // 50)):
            for bit in (0, 7):
                t[place] ^= 1 << bit
                seen.add(op(as_bytes, 0, 0, words))
                t[place] ^= 1 << bit
    flips = sum(2 * len(range(0, t.numel(), max(1, t.numel() // 50))) for t in as_bytes)
    assert len(seen) == 1 + flips
    assert op(as_bytes, 10**6, 0, 0) == whole  # as many lines as there are: all bytes
    assert op(as_bytes, 16, 0, 0) == op(as_bytes, 16, 0, 0)


@needs_cpu_kernels
def test_the_sum_is_the_same_for_every_instruction_set() -> None:
    from pgn_fast import _C

    op = torch.ops.pgn_fast_C.weights_fingerprint.default
    data = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (5000, 77, 200_003)]
    chosen, found = _C.build_info()["cpu_isa"], set()
    try:
        for isa in ("scalar", "avx2", "avx512"):
            if _C.set_isa(isa):
                found.add((op(data, 0, 3, 20_000), op(data, 16, 0, 0)))
    finally:
        _C.set_isa(chosen)
    assert len(found) == 1


def test_copies_watch_on_their_own() -> None:
    model = vpt(vit())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(IMAGES), twin(IMAGES)
        data_mul(twin)
        assert error(twin) <= 1e-5 and error(model) <= 1e-5
