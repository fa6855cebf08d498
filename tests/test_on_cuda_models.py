"""Models on a CUDA device, by everything that people put around them. See on_device.py."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from on_device import exact, is_on, relative
from test_backbone_works_with import pgn, vpt
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pgn_fast
from pgn_fast.backbone.options import FastOptions
from pgn_fast.errors import UserError
from pgn_fast.export import export

pytestmark = pytest.mark.gpu
__all__ = ["exact"]  # a fixture


def shallow(**kwargs) -> pgn_fast.VPT:
    deep = vpt(**kwargs)
    return pgn_fast.VPT(deep.backbone, 5, num_prompts=3, deep=False)


MODELS = {"pgn": pgn, "vpt-shallow": shallow, "vpt-deep": vpt}
every_model = pytest.mark.parametrize("method", MODELS)


def made(method: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[method]()
    nn.init.normal_(model.head.weight)
    return model.to(device)


def with_options(model: nn.Module, **options) -> nn.Module:
    """The same model, built with other options."""
    arguments = {"backend": None, "fast": True} | options
    kinds = {"num_prompts": 3}
    if isinstance(model, pgn_fast.PGN):
        again = pgn_fast.PGN(model.backbone, 5, library_size=8, **kinds, **arguments)
    else:
        deep = model.method == "vpt-deep"
        again = pgn_fast.VPT(model.backbone, 5, deep=deep, **kinds, **arguments)
    again.load_adapter_state_dict(model.adapter_state_dict())
    return again


def images(device: torch.device, count: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 32, 32, generator=draw).to(device)


def gradients(model: nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return list(torch.autograd.grad(logits.square().mean(), model.trainable_parameters()))


@torch.enable_grad()
def in_float64(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Logits and gradients by timm's own blocks."""
    wide = copy.deepcopy(model).double()
    pixels = pixels if pixels.dtype == torch.uint8 else pixels.double()
    logits = wide.forward_reference(pixels)
    return [logits, *gradients(wide, logits)]


def assert_near(found, expected, bound: float) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative(a, b) <= bound, f"number {number}: {relative(a, b):.1e}"


@every_model
@pytest.mark.parametrize("backend", [None, "reference"])
def test_float32_is_float64(device, method, backend) -> None:
    model, pixels = made(method, device), images(device)
    model = with_options(model, backend=backend)
    logits = model(pixels)
    found = [logits, *gradients(model, logits)]
    assert is_on(device, *found)
    expected = in_float64(model, pixels)
    assert_near(found[:1], expected[:1], 1e-5)
    assert_near(found[1:], expected[1:], 1e-4)
    with torch.no_grad():
        assert_near([model.eval()(pixels)], [in_float64(model, pixels)[0]], 1e-5)


@every_model
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_memory_plans_give_the_same_gradients(device, method, memory) -> None:
    model, pixels = made(method, device), images(device)
    other = with_options(model, fast=memory)
    assert_near(gradients(other, other(pixels)), gradients(model, model(pixels)), 1e-4)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_close_as_timm_under_it(device, method, dtype) -> None:
    model, pixels = made(method, device), images(device)
    expected = in_float64(model, pixels)
    with torch.autocast(device.type, dtype=dtype):
        ours, timms = model(pixels), model.forward_reference(pixels)
    assert ours.dtype == timms.dtype
    found, theirs = ([x, *gradients(model, x)] for x in (ours, timms))
    for a, b, c in zip(found, theirs, expected, strict=True):
        assert relative(a, c) <= 3 * relative(b, c) + 4 * torch.finfo(dtype).eps
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        model.eval()
        assert relative(model(pixels), in_float64(model, pixels)[0]) <= 0.1


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_backbones_of_other_dtypes(device, method, dtype) -> None:
    wide = made(method, device)
    expected = in_float64(wide, images(device))[0]
    model = wide.to(dtype)
    pixels = images(device).to(dtype)
    logits = model(pixels)
    assert logits.dtype == dtype
    bound = {torch.float64: 1e-12, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert relative(logits, expected) <= bound
    assert all(g.isfinite().all() for g in gradients(model, logits))


@every_model
def test_uint8_and_channels_last(device, method) -> None:
    model = made(method, device).eval()
    levels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    assert_near([model(levels)], in_float64(model, levels)[:1], 1e-5)
    pixels = images(device)
    expected = in_float64(model, pixels)
    logits = model(pixels.to(memory_format=torch.channels_last))
    assert_near([logits], expected[:1], 1e-5)
    assert_near(gradients(model, logits), expected[1:], 2e-3)
    model.to(memory_format=torch.channels_last)
    assert_near([model(pixels)], expected[:1], 1e-5)


@every_model
def test_there_and_back(device, method, tmp_path) -> None:
    model, pixels = made(method, torch.device("cpu")).eval(), images(torch.device("cpu"))
    before = model(pixels)
    model.to(device)
    assert_near([model(pixels.to(device))], [before], 1e-4)
    if device.type != "cpu":
        with pytest.raises(ValueError, match="images are on cpu, the backbone is on cuda"):
            model(pixels)
    assert str(model.explain())
    model.save_pretrained(tmp_path / "adapter")
    model.cpu()
    assert_near([model(pixels)], [before], 1e-6)
    again = pgn_fast.from_pretrained(tmp_path / "adapter", model.backbone).eval()
    assert_near([again(pixels)], [before], 1e-6)
    there = pgn_fast.from_pretrained(tmp_path / "adapter", copy.deepcopy(model.backbone).to(device))
    assert is_on(device, *there.parameters())
    assert_near([there.eval()(pixels.to(device))], [before], 1e-4)
    state = {name: t.to(device) for name, t in model.state_dict().items()}
    again.load_state_dict(state)
    assert_near([again(pixels)], [before], 1e-6)


def test_explain_names_what_runs_on_the_device(device) -> None:
    text = made("vpt-deep", device).explain()
    if device.type == "cuda":
        assert "could not be seen without waiting" in text  # nothing is folded
        assert "attention with prompts:" in text
    assert "kernels: " in text


@every_model
def test_other_streams(device, method) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU has no streams")
    model, pixels = made(method, device), images(device)
    logits = model(pixels)
    expected = [logits, *gradients(model, logits)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = model(pixels)
            found = [logits, *gradients(model, logits)]
        torch.cuda.current_stream().wait_stream(stream)
        assert_near(found, expected, 2e-5)  # cuDNN may take another algorithm


@pytest.mark.parametrize(
    "method, backend", [*((method, "aot_eager") for method in MODELS), ("vpt-deep", "inductor")]
)
def test_compiled(device, method, backend) -> None:
    torch._dynamo.reset()
    model, pixels = made(method, device), images(device)
    compiled = torch.compile(model, backend=backend)
    logits = compiled(pixels)
    found, expected = [logits, *gradients(model, logits)], in_float64(model, pixels)
    assert_near(found, expected, 1e-4)


@every_model
def test_torch_func(device, method) -> None:
    model, pixels = made(method, device).eval(), images(device, 2)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, pixels):
        return torch.func.functional_call(model, values, (pixels,)).square().mean()

    expected = gradients(model, model(pixels))
    found = torch.func.grad(loss)(values, pixels)
    assert_near(found.values(), expected, 1e-4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, pixels[:, None])
    alone = torch.func.grad(loss)(values, pixels[:1])
    assert_near([t[0] for t in each.values()], alone.values(), 1e-4)


@every_model
def test_second_derivatives(device, method) -> None:
    found = []
    for fast in (True, False):
        model = with_options(made(method, device), fast=fast).double().eval()
        parameters = list(model.trainable_parameters())
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(images(device, 2).double()).square().mean()
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            total = sum(g.square().sum() for g in grads)
            found.append(torch.autograd.grad(total, parameters, allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if b is not None and b.abs().max() > 0]
    assert len(pairs) >= 2
    assert_near(*zip(*pairs, strict=True), 1e-8)


@every_model
def test_data_parallel_on_one_device(device, method) -> None:
    model, pixels = made(method, device), images(device)
    ids = [0] if device.type == "cuda" else None
    logits = nn.DataParallel(model, device_ids=ids)(pixels)
    assert_near([logits], [model(pixels)], 1e-6)


@every_model
def test_distributed_data_parallel_of_one_process(device, method) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        model, pixels = made(method, device), images(device)
        expected = gradients(model, model(pixels))
        ids = [0] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        for _ in range(2):
            model.zero_grad()
            parallel(pixels).float().square().mean().backward()
        assert_near([p.grad for p in model.trainable_parameters()], expected, 1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_float8_weights(device) -> None:
    torch.manual_seed(0)
    model = vpt(fast=FastOptions(weights="fp8")).to(device).eval()
    nn.init.normal_(model.head.weight)
    pixels = images(device, 8)
    exact_logits = model(pixels)  # gradients are enabled: float
    assert_near([exact_logits], in_float64(model, pixels)[:1], 1e-5)
    if device.type == "cpu":
        with torch.no_grad(), pytest.raises(RuntimeError, match="float8 weights run on NVIDIA"):
            model(pixels)
        return
    with torch.no_grad():
        rounded = model(pixels)
        assert 1e-6 < relative(rounded, exact_logits) < 0.2
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert relative(model(pixels), exact_logits) < 0.3
    with torch.inference_mode():
        assert torch.equal(model(pixels), rounded)
    assert "fp8 in inference" in model.explain()


def test_int8_weights_say_where_they_run(device) -> None:
    model = vpt(fast=FastOptions(weights="int8")).to(device).eval()
    pixels = images(device)
    assert_near([model(pixels)], in_float64(model, pixels)[:1], 1e-5)
    if device.type == "cuda":
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"Use weights='float'"):
            model(pixels)
        assert "off  weights" in model.explain()


def test_a_named_backend_runs_or_says_why_not(device) -> None:
    torch.manual_seed(0)
    plain, pixels = vpt().to(device), images(device)
    for name, sentence in pgn_fast.backends().items():
        try:
            logits = with_options(plain, backend=name)(pixels)
        except RuntimeError as error:
            assert f"backend='{name}' cannot run" in str(error), (sentence, error)
        else:
            assert_near([logits], in_float64(plain, pixels)[:1], 1e-5)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_export_of_a_model_on_the_device(device, tmp_path, format) -> None:
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = made("vpt-deep", device).eval()
    if device.type == "cuda":
        with pytest.raises(UserError, match=r"on cuda:0; .*: pass model\.float\(\)\.cpu\(\)"):
            export(model, tmp_path / f"model.{format}", format)
        assert is_on(device, *model.parameters())
        model.cpu()
    assert export(model, tmp_path / f"model.{format}", format).error <= 1e-4


def test_a_program_of_a_model_on_the_device(device) -> None:
    model, pixels = made("pgn", device).eval(), images(device)
    with torch.no_grad():
        program = torch.export.export(model, (pixels,))
        assert_near([program.module()(pixels)], [model(pixels)], 1e-4)


def test_a_copy_and_a_pickle_of_a_model(device, tmp_path) -> None:
    model, pixels = made("pgn", device).eval(), images(device)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_on(device, *again.parameters())
    assert_near([again(pixels), copy.deepcopy(model)(pixels)], [model(pixels)] * 2, 1e-6)
