"""The model behind the API: a frozen timm model and its preprocessing, nothing of ours inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batching import Call
from .preprocess import Preprocessing


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
        self._device = next(model.parameters()).device
        size = preprocessing.data_config["input_size"]
        try:
            with torch.inference_mode():
                zeros = torch.zeros(1, *size, device=self._device)
                features, logits = self._forward(zeros, {"features", "logits"})
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{name} takes no images of {' × '.join(map(str, size))} ({error}). Create it for "
                "that size: img_size=(height, width) or dynamic_img_size=True."
            ) from error
        self.output_sizes = {"features": features.shape[1]}
        if getattr(model, "num_classes", 0):
            self.output_sizes["logits"] = logits.shape[1]

    def check_output(self, output: str) -> None:
        """Raises ValueError where the model has no such output."""
        if output not in self.output_sizes:
            raise ValueError(
                f"{self.name} has no {output} (no classifier); it has "
                f"{', '.join(self.output_sizes)}."
            )

    @torch.inference_mode()
    def run(self, calls: Sequence[Call]) -> list[Tensor]:
        """All calls in one batch: (images, size) for each, float32 on the CPU.

        Args:
            calls: images that went through the preprocessing's geometry, and "features" or
                "logits", for each call.
        """
        levels = [image for images, _ in calls for image in images]
        images = self.preprocessing.normalise(levels).to(self._device)
        features, logits = self._forward(images, {output for _, output in calls})
        rows = {"features": features.float().cpu(), "logits": logits.float().cpu()}
        results = []
        at = 0
        for images_of_call, output in calls:
            results.append(rows[output][at : at + len(images_of_call)])
            at += len(images_of_call)
        return results

    def _forward(self, images: Tensor, outputs: set[str]) -> tuple[Tensor, Tensor]:
        """Features and logits; what nobody asked for is empty."""
        model: Any = self.model
        tokens = model.forward_features(images)
        nothing = images.new_empty(0)
        features = model.forward_head(tokens, pre_logits=True) if "features" in outputs else nothing
        logits = model.forward_head(tokens) if "logits" in outputs else nothing
        return features, logits

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "outputs": self.output_sizes,
            "preprocessing": self.preprocessing.describe(),
        }
