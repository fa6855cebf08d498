"""The model behind the API: a frozen timm model and its preprocessing, no task of ours inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.engine import FastBackbone
from ..backbone.readout import Readout, rows_read
from ..backbone.schedule import NO_PROMPTS
from ..cuda_graphs import CALLS_TO_PROVE, GraphedStep, graphed
from .answerer import Target
from .batching import Call
from .errors import ApiError
from .preprocess import Preprocessing
from .settings import OUTPUTS

_logger = logging.getLogger(__name__)
# multiplications an image in the blocks, from which the engine is faster on a CPU than timm's
# operations (bench/bench_server.py); below, its own Python is more than what it saves
ENGINE_FROM = 3e8


class ServedModel:
    """Levels in, features or logits out.

    Args:
        name: how the API calls it.
        model: a timm model in eval mode; it is not changed.
        preprocessing: of the images; its input size must be one that the model takes.

    One pass over zeros finds the output sizes, so that a model and a preprocessing that do not go
    together fail here and not at the first call.
    """

    def __init__(self, name: str, model: nn.Module, preprocessing: Preprocessing) -> None:
        self.name = name
        self.model = model
        self.preprocessing = preprocessing
        engine = _engine(model, preprocessing)
        self.outputs = OUTPUTS if getattr(model, "num_classes", 0) else ("features",)
        self.passes: dict[str, Any] = {
            output: _Pass(model, engine, preprocessing, output) for output in self.outputs
        }
        size = preprocessing.data_config["input_size"]
        zeros = torch.zeros(2, *size, dtype=torch.uint8)
        try:
            with torch.inference_mode():
                self.output_sizes = {o: step(zeros).shape[1] for o, step in self.passes.items()}
        except (AssertionError, RuntimeError, ValueError) as error:  # timm's, or the engine's
            raise ValueError(
                f"{name} takes no images of {' × '.join(map(str, size))} ({error}). Create it for "
                "that size: img_size=(height, width) or dynamic_img_size=True."
            ) from error

    def start(self) -> None:
        """Nothing goes on beside the calls."""

    def stop(self) -> None:
        """Nothing goes on beside the calls."""

    def check_output(self, output: str) -> None:
        """Raises ValueError where the model has no such output."""
        if output not in self.output_sizes:
            raise ValueError(
                f"{self.name} has no {output} (no classifier); it has "
                f"{', '.join(self.output_sizes)}."
            )

    def target(self, task: str | None, output: str) -> Target:
        if task not in (None, self.name):
            raise ApiError(
                400,
                "no_such_task",
                f"this server has no tasks; it serves {self.name}. Leave task out.",
            )
        try:
            self.check_output(output)
        except ValueError as error:
            raise ApiError(400, "no_such_output", str(error)) from None
        return Target(output, output, self.preprocessing)

    def release(self, target: Target) -> None:
        """A model stays."""

    def warm_up(self, max_batch: int) -> None:
        """Run every output on zeros, one image and a whole batch, so that no call is the first.

        Where CUDA graphs are used, the sizes between them too, until their graphs are proved.
        """
        zeros = self.preprocessing.zeros()
        for output in self.output_sizes:
            counts = self.passes[output].use_graphs(max_batch)
            for count in (1, max_batch, *counts):
                self.run([([zeros] * count, output)])

    @torch.inference_mode()
    def run(self, calls: Sequence[Call]) -> list[Tensor]:
        """The calls in one batch for each output that is asked for.

        Args:
            calls: images that went through the preprocessing's geometry, and "features" or
                "logits", for each call.

        Returns:
            (images, size) for each call, float32 on the CPU.
        """
        results: dict[int, Tensor] = {}
        for output in {output for _, output in calls}:
            chosen = [i for i, (_, wanted) in enumerate(calls) if wanted == output]
            levels = [image for i in chosen for image in calls[i][0]]
            values = self.passes[output](self.preprocessing.stack(levels))
            parts = values.split([len(calls[i][0]) for i in chosen])
            results.update(zip(chosen, parts, strict=True))
        return [results[i] for i in range(len(calls))]

    def tasks(self) -> dict[str, dict[str, Any]]:
        return {}

    def models(self) -> dict[str, dict[str, int]]:
        return {self.name: self.output_sizes}

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "outputs": self.output_sizes,
            "preprocessing": self.preprocessing.describe(),
        }


class _Pass(nn.Module):
    """Levels (B, C, H, W), uint8 → one output (B, size), float32 on the CPU.

    A batch that has no CUDA graph of its size runs in the next larger one's, beside black images.
    """

    def __init__(
        self,
        model: Any,
        engine: FastBackbone | None,
        preprocessing: Preprocessing,
        output: str,
    ) -> None:
        super().__init__()
        self.model = model
        self._normalize = preprocessing.normalize
        self._pre_logits = output == "features"
        self._engine = engine
        self._readout = Readout(rows=rows_read(model), prompts=False)
        like = next(model.parameters())
        self._device = like.device
        half = like.dtype not in (torch.float32, torch.float64)
        self._graphed = graphed(
            self._encode, model, what=f"serving {output}", tell=_logger.info, half=half
        )

    def use_graphs(self, max_batch: int) -> list[int]:
        """Use CUDA graphs from now on; the batch sizes to run on, in this order, until they are
        proved."""
        if not isinstance(self._graphed, GraphedStep) or self._graphed.off is not None:
            return []
        sizes = [2**i for i in range((max_batch - 1).bit_length())] + [max_batch]
        self._graphed.sizes = sizes
        return [size for size in sizes for _ in range(CALLS_TO_PROVE)]

    def forward(self, levels: Tensor) -> Tensor:
        count, step = len(levels), self._graphed
        if isinstance(step, GraphedStep) and step.off is None and step.sizes is not None:
            size = min((size for size in step.sizes if size >= count), default=count)
            black = levels.new_zeros(size - count, *levels.shape[1:])
            levels = torch.cat([levels, black])
        values = step(self._normalize(levels).to(self._device))
        return values[:count].float().cpu()

    def _encode(self, images: Tensor) -> Tensor:
        if self._engine is None:
            tokens = self.model.forward_features(images)
        else:
            tokens = self._engine.encode(images, NO_PROMPTS, self._readout)
        found: Tensor = self.model.forward_head(tokens, pre_logits=self._pre_logits)
        return found


def _engine(model: Any, preprocessing: Preprocessing) -> FastBackbone | None:
    """What runs a model on a CPU faster than it runs itself; None where nothing does."""
    if next(model.parameters()).device.type != "cpu":
        return None
    patches = model.patch_embed.dynamic_feat_size((preprocessing.height, preprocessing.width))
    tokens = patches[0] * patches[1] + model.num_prefix_tokens
    if tokens * sum(p.numel() for p in model.blocks.parameters()) < ENGINE_FROM:
        return None
    engine = FastBackbone(model)
    return engine if engine.cache.unsupported_reason is None else None
