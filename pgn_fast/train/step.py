"""One optimizer step: forward, loss and backward over the batches that it is made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..cuda_graphs import graphed
from ..errors import UserError
from .average import Average
from .config import TrainConfig
from .distributed import Processes
from .evaluation import Autocast
from .stats import StepTimes
from .sync_batchnorm import synchronize


class Stepper:
    """Takes optimizer steps on a model, on the mean loss of all images of a step.

    With several processes that mean is over the images of all of them, however unevenly they are
    spread, so that the step is the one that a single process would take.

    On a CUDA device forward, loss and backward are one CUDA graph where that is proved to be the
    same; the optimizer is never part of it.

    Attributes:
        optimizer: set by the owner; its rates are the schedule's business.
        scaler: float16's loss scaling.
        times: of the phases of its steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        objective: Any,
        processes: Processes,
        prepare: Callable[[Tensor], Tensor],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            objective: an ``Objective``, or what has its methods.
            prepare: makes the model's input of a batch's images on the device.
            tell: called with a line on what became of the CUDA graph.
        """
        self.config, self.model, self.processes = config, model, processes
        self.device, self.prepare, self.objective = processes.device, prepare, objective
        self.times = StepTimes(self.device, config.stats)
        self.autocast = Autocast(self.device, config.amp, config.amp_dtype)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.amp and config.amp_dtype == "float16"
        )
        self.optimizer: Any = None
        self.average = Average(model, config)
        set_batchnorm(model, config)
        self.needs_two = config.batch_size > 0 and _needs_two_images(model, self._blank())
        self._shared = synchronize(model) if processes.world > 1 and config.sync_bn else []
        self._forward = self._wrap()
        self._graphed = self._graph(tell)

    def _blank(self) -> Tensor:
        size = self.model.preprocessing["input_size"]
        return torch.zeros(1, *size, device=self.device)

    def _wrap(self) -> nn.Module:
        """The model as it is called in training: compiled, and with gradients that are averaged."""
        model = self.model
        if self.config.torchcompile:
            backend, mode = self.config.torchcompile, self.config.torchcompile_mode
            model = torch.compile(model, backend=backend, mode=mode)
        if self.processes.world > 1:
            index = [self.device.index] if self.device.type == "cuda" else None
            # statistics are the same everywhere (synchronized), or each process's own business;
            # newer torch has another name for it, which older ones do not know
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model = DistributedDataParallel(model, device_ids=index, broadcast_buffers=False)
        return model

    def _graph(self, tell: Callable[[str], None]) -> Callable[..., dict[str, Any]] | None:
        """``_gradients`` as a CUDA graph; None where each pass runs eagerly."""
        refused = None
        if self.processes.world > 1:
            refused = "the processes average gradients while they are made"
        elif self.config.torchcompile:
            refused = "`torchcompile` is given (`torchcompile_mode` reduce-overhead has its own)"
        own = lambda: (
            x for x in self.model.named_parameters() if x[0].partition(".")[0] != "backbone"
        )
        changed = lambda: {**dict(own()), **dict(self.model.named_buffers())}
        half = self.config.amp or any(p.dtype.itemsize < 4 for p in self.model.parameters())
        step = graphed(
            self._gradients,
            self.model,
            what="training step",
            tell=tell,
            state=changed,
            half=half,
            copies=False,
            refused=refused,
        )
        return None if step == self._gradients else step

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _gradients(self, images: Tensor, targets: Tensor, total: Tensor) -> dict[str, Any]:
        """Loss, logits and gradients of a batch of a step of ``total`` images, (1,) on the device;
        what stands in Python here is the same in every step."""
        with self.autocast():
            logits = self._call(images)
        loss = self.objective(logits.float(), targets)
        trained = self._trained()
        scaled = self.scaler.scale(loss / total[0])
        grads = torch.autograd.grad(scaled, list(trained.values()), allow_unused=True)
        found = dict(zip(trained, grads, strict=True))
        return {"loss": loss.detach(), "logits": logits.detach(), "gradient of": found}

    def _pass_graphed(
        self, images: Tensor, targets: Tensor, total: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, whose gradients are added to the parameters'."""
        assert self._graphed is not None
        count = torch.full((1,), float(total), device=self.device)
        found = self._graphed(images, targets, count)
        for name, parameter in self._trained().items():
            grad = found["gradient of"][name]
            if grad is None:
                continue
            if parameter.grad is not None:
                parameter.grad.add_(grad)
            else:  # the next batch of this step would overwrite it
                parameter.grad = grad if last else grad.clone()
        return found["loss"], found["logits"]

    def step(
        self, group: list[tuple[Tensor, Tensor]], epoch: int, update: int
    ) -> tuple[Tensor, Tensor, int]:
        """Step number ``update`` (from 1), on batches as (images, labels) on any device.

        Returns:
            The sum of losses and the number of right answers of this process's images, on the
            device, and how many images these are.
        """
        seen = sum(len(labels) for _, labels in group)
        total = self._over_processes(seen)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, (images, labels) in enumerate(group):
            self.objective.check(labels)
            present = len(labels) > 0
            for layer in self._shared:
                layer.absent = not present
            with self.times.phase("to device"):
                images = images.to(self.device, non_blocking=True) if present else self._blank()
                labels = targets = labels.to(self.device, non_blocking=True)
                images = self.prepare(images)
            if present:
                images, targets = self.objective.mix(images, labels, epoch)
            last = i == len(group) - 1
            pixels = isinstance(images, Tensor)  # tokens from files have no graph
            if self._graphed is not None and isinstance(total, int) and pixels:
                with self.times.phase("forward"):  # and the backward, which is in the same graph
                    loss, logits = self._pass_graphed(images, targets, total, last)
            else:
                with self._sync(last):
                    with self.times.phase("forward"), self.autocast():
                        logits = self._call(images)
                    # without an image this process only takes part in what all do together
                    loss = self.objective(logits.float(), targets) if present else logits.sum() * 0
                    with self.times.phase("backward"):
                        self.scaler.scale(loss * self.processes.world / total).backward()
            if present:
                loss_sum += loss.detach()
                correct += self.objective.right(logits, labels)
        with self.times.phase("optimizer"):
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update(update)
        if self.config.synchronize_step and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss_sum, correct, seen

    def _call(self, images: Tensor) -> Tensor:
        try:
            return self._forward(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(too_few_for_batchnorm(self.config)) from error

    def _over_processes(self, seen: int) -> Tensor | int:
        """The images of the step over all processes, without waiting for the device."""
        if self.processes.world == 1:
            return seen
        total = torch.tensor(float(seen), device=self.device)
        dist.all_reduce(total)
        return total.clamp(min=1)

    def _sync(self, last: bool) -> Any:
        """Average gradients over processes at the last part of an accumulated batch only."""
        waits = isinstance(self._forward, DistributedDataParallel) and not last
        return self._forward.no_sync() if waits else nullcontext()  # type: ignore[operator]

    def _clip(self) -> None:
        if self.config.clip_grad is None:
            return
        from timm.utils import dispatch_clip_grad

        self.scaler.unscale_(self.optimizer)
        kept: set[Tensor] = set()
        if self.config.clip_mode == "agc":  # timm's train.py never does so to the classifier
            kept = set(self.model.head.parameters())
        trained = [p for p in self.model.parameters() if p.requires_grad and p not in kept]
        dispatch_clip_grad(trained, self.config.clip_grad, mode=self.config.clip_mode)


def set_batchnorm(model: nn.Module, config: TrainConfig) -> None:
    """Give the trained BatchNorm layers, which are the generator's, another momentum or epsilon."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            layer.momentum = layer.momentum if config.bn_momentum is None else config.bn_momentum
            layer.eps = layer.eps if config.bn_eps is None else config.bn_eps


def _needs_two_images(model: Any, blank: Tensor) -> bool:
    """Whether a training step on one image fails: a BatchNorm that sees maps of one pixel."""
    generator = getattr(getattr(model, "prompter", None), "generator", None)
    if generator is None or not any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in generator.modules()
    ):
        return False
    prompter = copy.deepcopy(model.prompter).train()
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            prompter(blank)
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    finally:
        torch.set_rng_state(state)
    return False


def too_few_for_batchnorm(config: TrainConfig) -> str:
    """Why a step on one image cannot be, and the ways out."""
    return (
        f"`batch_size` {config.batch_size} left one image for a step, but the BatchNorm of "
        f"`generator` {config.generator} sees maps of one pixel at this `resolution` and needs two "
        "images. Give `batch_size` 2 or more, or a larger `resolution`."
    )
