"""How calls and answers look: ours here, the Open Inference Protocol's in ``v2.py``."""

from __future__ import annotations

import base64
import json
from typing import Any, Protocol

import torch
from fastapi import Request, Response
from torch import Tensor

from .answerer import Target
from .body import FIELDS, PredictCall, parse_call
from .errors import ApiError, error_response
from .settings import ServerSettings


class Form(Protocol):
    """The form of a call's body and of what it is answered."""

    def parse(self, request: Request, body: bytes, settings: ServerSettings) -> PredictCall:
        """Raises ApiError for a body that is not of this form."""

    def answer(self, model: str, call: PredictCall, target: Target, values: Tensor) -> Response:
        """The answer with the numbers (images, size), float32."""

    def refusal(self, error: ApiError) -> Response: ...


class PredictForm:
    """``POST /v1/predict``."""

    def parse(self, request: Request, body: bytes, settings: ServerSettings) -> PredictCall:
        for name in FIELDS:
            if name in request.query_params:
                raise ApiError(
                    400,
                    "bad_request",
                    f"{name} stands behind the address, where it is not read; put it beside the "
                    "images in the body.",
                )
        return parse_call(
            request.headers.get("content-type", ""),
            body,
            default_output=settings.default_output,
            max_images=settings.max_call_images,
        )

    def answer(self, model: str, call: PredictCall, target: Target, values: Tensor) -> Response:
        answer: dict[str, Any] = {"model": model}
        if target.task is not None:
            answer["task"] = target.task
        answer |= {
            "output": call.output,
            "dtype": "float32",
            "shape": values.shape,
            "encoding": call.encoding,
        }
        if target.task is not None:
            answer["predictions"] = predictions(values, target, call.topk)
        numbers = values.numpy()
        if call.encoding == "base64":
            encoded = b'"%s"' % base64.b64encode(numbers.astype("<f4", copy=False).tobytes())
        else:
            encoded = json.dumps(numbers.tolist()).encode()
        body = b'%s, "values": %s}' % (json.dumps(answer).encode()[:-1], encoded)
        return Response(body, media_type="application/json")

    def refusal(self, error: ApiError) -> Response:
        return error_response(error)


def predictions(logits: Tensor, target: Target, topk: int) -> list[list[dict[str, Any]]]:
    """For each image its most probable classes: label, index and probability (softmax)."""
    probabilities = logits.double().softmax(dim=1)
    values, indices = torch.topk(probabilities, min(topk, logits.shape[1]))
    names = target.class_names
    return [
        [
            {"label": str(i) if names is None else names[i], "index": i, "probability": p}
            for p, i in zip(*row, strict=True)
        ]
        for row in zip(values.tolist(), indices.tolist(), strict=True)
    ]
