"""Whole models on a GPU: this library against timm's own blocks, eager, as graphs and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_common import Bench, Truth, backends, gradients, without_gradients
from torch import Tensor

# method, backbone, images, prompts
CASES = [
    ("VPT", "vit_base_patch16_224", 64, 50),
    ("VPT", "vit_base_patch16_224", 8, 50),
    ("PGN", "vit_base_patch32_224", 128, 16),
    ("PGN", "vit_base_patch16_224", 64, 16),
]
CHECKED = 4  # images of the batch whose results are held against float64


class Case:
    """One method on one backbone, and what its results should be.

    Args:
        index: in ``CASES``; a rehearsal has one of its own.
    """

    def __init__(self, bench: Bench, index: int) -> None:
        import timm

        given = ("VPT", "test_vit", 2, 3) if bench.tiny else CASES[index]
        self.bench, (self.method, name, B, self.P) = bench, given
        torch.manual_seed(index)
        self.backbone = timm.create_model(name, pretrained=False)
        self.backbone.to(bench.device, bench.dtype)
        size = self.backbone.pretrained_cfg["input_size"][1]
        self.images = bench.draw(B, 3, size, size)
        self.labels = torch.arange(B, device=bench.device) % 100
        self.group = f"{self.method} {name}, B={B}, P={self.P}"
        self.model = self.build(None)
        self.truths = self._truths()

    def build(self, backend: str | None, **options: Any) -> Any:
        import pgn_fast

        torch.manual_seed(0)
        make = getattr(pgn_fast, self.method)
        sizes = {"num_classes": 100, "num_prompts": self.P}
        model = make(self.backbone, **sizes, backend=backend, **options)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        return model.to(self.bench.device, self.bench.dtype).train()

    def loss(self, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        labels = self.labels[: len(images)]
        return torch.nn.functional.cross_entropy(call(images).float(), labels)

    def step(self, model: Any, call: Callable[[Tensor], Tensor], images: Tensor) -> Any:
        """Forward and backward."""
        loss = lambda *_: self.loss(call, images)
        return gradients(loss, list(model.trainable_parameters()))

    def _truths(self) -> tuple[Truth, Truth]:
        import copy

        wide = copy.deepcopy(self.model).double()
        images = self.images[:CHECKED].double()
        call = wide.forward_reference

        def step() -> Any:
            loss = torch.nn.functional.cross_entropy(call(images), self.labels[:CHECKED])
            return torch.autograd.grad(loss, list(wide.trainable_parameters()))

        logits = self.bench.truth(self.group, without_gradients(call, [images]))
        return logits, self.bench.truth(self.group, step)

    def record(
        self, which: str, model: Any, call: Callable[[Tensor], Tensor], checked: bool = True
    ) -> None:
        """Time a training step and an inference, and note the memory at their peak."""
        bench, few = self.bench, self.images[:CHECKED]
        step = self.step(model, call, self.images)
        held = {"truth": self.truths[1], "check": self.step(model, call, few)} if checked else {}
        bench.record(f"{self.group}, training step", which, step, **held)
        self.record_inference(which, call, checked)
        if not bench.tiny and not bench.waits:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = bench.report.get("peak_bytes", {})
            # what else is held, such as the graphs of those before, is not this step's
            peak[f"{self.group} by {which}"] = torch.cuda.max_memory_allocated() - before
            bench.save(peak_bytes=peak)

    def record_inference(
        self, which: str, call: Callable[[Tensor], Tensor], checked: bool = True
    ) -> None:
        few = self.images[:CHECKED]
        forward, check = (without_gradients(call, [x]) for x in (self.images, few))
        held = {"truth": self.truths[0], "check": check} if checked else {}
        self.bench.record(f"{self.group}, inference", which, forward, **held)


def models(bench: Bench) -> None:
    """Every case: timm's blocks and ours; what graphs make of steps as users write them; then ours
    by each backend, and with float8 weights."""
    cases = [Case(bench, index) for index in range(1 if bench.tiny else len(CASES))]
    for case in cases:
        case.record("timm", case.model, case.model.forward_reference)
        case.record("pgn_fast", case.model, case.model.forward)
    for case in cases:
        try:
            _as_users_train(bench, case)
        except Exception as error:
            bench.fail(f"{case.group}, as users train", error)
    for case in cases:
        for backend in ("reference", *backends(bench, "prompt_attention", case.images)):
            named = case.build(backend)
            case.record(f"pgn_fast, {backend}", named, named.forward)
        if not bench.tiny:
            narrow = case.build(None, fast={"weights": "fp8"})
            case.record_inference("pgn_fast, fp8 weights", narrow.forward)


def _as_users_train(bench: Bench, case: Case) -> None:
    """Steps with their optimizer: eager with the launches, captured, and as training runs them."""
    import pgn_fast
    from pgn_fast.cuda_graphs import CALLS_TO_PROVE, graphed

    model = case.build(None)
    fused = {} if bench.tiny else {"capturable": True}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3, **fused)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    group, inputs = f"{case.group}, step with its optimizer", (case.images, case.labels)
    captured = step if bench.tiny else pgn_fast.capture(step)
    for which, call in (("eager", step), ("pgn_fast.capture", captured)):
        try:
            for _ in range(5):
                call(*inputs)
            times = bench.eager_milliseconds(lambda call=call: call(*inputs))
        except Exception as error:
            bench.fail(f"{group}, {which}", error)
            continue
        bench.keep(group, which, times, flops=0.0, bytes=0.0)

    told: list[str] = []

    def passed(images: Tensor, labels: Tensor) -> dict[str, Any]:
        loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [p for _, p in named])
        return {"loss": loss.detach(), "gradient of": dict(zip(dict(named), grads, strict=True))}

    half = bench.dtype != torch.float32
    state = lambda: dict(model.named_buffers())
    proved = graphed(passed, model, what="training step", tell=told.append, state=state, half=half)
    for _ in range(CALLS_TO_PROVE + 3):
        proved(*inputs)
    graphs = bench.report.get("graphs", {})
    bench.save(graphs=graphs | {case.group: told})


def compiled_models(bench: Bench, index: int) -> None:
    """One case compiled, timm's blocks or ours. What is timed is its CUDA graph, as of all others,
    so that ``mode="reduce-overhead"`` has nothing to add."""
    case = Case(bench, index // 2)
    which = ("timm", "pgn_fast")[index % 2]
    call = case.model.forward_reference if index % 2 == 0 else case.model.forward
    # on a GPU the few images that are checked would be compiled once more
    case.record(f"{which}, torch.compile", case.model, bench.compile(call), checked=bench.tiny)
