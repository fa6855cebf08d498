"""The Open Inference Protocol, version 2, over HTTP: what KServe and Triton's clients speak.

A task is a model of it, with one input, ``images``: BYTES of shape [B], each an encoded image (in
JSON, where there are no bytes, base64 of one). The outputs of a task are ``logits``,
``probabilities`` and ``labels``; those of a model without tasks ``features`` and ``logits``. The
binary tensor extension is understood both ways.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor extension.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from torch import Tensor

from .. import __version__
from .answerer import Answerer, Target
from .body import PredictCall, check_count, read_json
from .errors import ApiError, error_response
from .service import Service
from .settings import OUTPUTS, ServerSettings

_HEADER_LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {"features": "FP32", "logits": "FP32", "probabilities": "FP32", "labels": "BYTES"}
_OF_A_TASK = ("logits", "probabilities", "labels")


def add_routes(app: FastAPI, service: Service, served: Answerer) -> None:
    """Put the protocol's routes under ``/v2``."""

    @app.get("/v2")
    async def server() -> Response:
        return _json(
            {
                "name": "pgn_fast",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
            }
        )

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response(status_code=200 if service.batcher.alive else 503)

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return Response(status_code=200 if service.readiness() == "ready" else 503)

    # a name may have slashes (hf-hub:timm/...): the longest ends of a path are looked at first,
    # which of two decorators are those of the lower one
    @app.get("/v2/models/{model:path}/ready")
    @app.get("/v2/models/{model:path}/versions/1/ready", include_in_schema=False)
    async def model_ready(model: str) -> Response:
        if model not in served.models():
            return error_response(_unknown(model, served), "/v2/")
        return Response(status_code=200 if service.readiness() == "ready" else 503)

    @app.post("/v2/models/{model:path}/infer")
    @app.post("/v2/models/{model:path}/versions/1/infer", include_in_schema=False)
    async def infer(model: str, request: Request) -> Response:
        return await service.predict(request, InferForm(model, served))

    @app.get("/v2/models/{model:path}")
    @app.get("/v2/models/{model:path}/versions/1", include_in_schema=False)
    async def metadata(model: str) -> Response:
        sizes = served.models().get(model)
        return (
            _json(_metadata(model, sizes))
            if sizes is not None
            else error_response(_unknown(model, served), "/v2/")
        )


@dataclass
class InferForm:
    """One call of ``/infer``; remembers between body and answer what was asked for."""

    model: str
    served: Answerer
    _wanted: list[tuple[str, bool]] = field(default_factory=list)
    _id: str | None = None

    def parse(self, request: Request, body: bytes, settings: ServerSettings) -> PredictCall:
        sizes = self.served.models().get(self.model)
        if sizes is None:
            raise _unknown(self.model, self.served)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "unsupported_media_type", "send the body uncompressed.")
        call, binary = _split(request, body, settings.max_call_images)
        images = _images(call, binary, settings.max_call_images)
        self._read_wanted(call, list(_sizes(sizes)))
        output = next((o for o, _ in self._wanted if o in OUTPUTS), "logits")
        return PredictCall(images, output, "base64", self.model)

    def _read_wanted(self, call: dict[str, Any], known: list[str]) -> None:
        given = call.get("id")
        self._id = given if isinstance(given, str) else None
        all_binary = _parameters(call).get("binary_data_output") is True
        outputs = call.get("outputs") or [{"name": name} for name in _by_default(known)]
        if not isinstance(outputs, list):
            raise _bad("outputs must be a list.")
        for output in outputs:
            name = output.get("name") if isinstance(output, dict) else None
            if name not in known:
                raise _bad(f"output {str(name)[:40]!r}: {self.model} has {', '.join(known)}.")
            # who asks for classes or shared memory would take something else for them
            asked = _parameters(output)
            if unknown := sorted(asked.keys() - {"binary_data", "binary_data_size"}):
                raise _bad(f"output {name}: the parameter {unknown[0][:40]!r} is not known here.")
            binary = asked.get("binary_data", all_binary)
            if not isinstance(binary, bool):
                raise _bad(f"output {name}: binary_data is {str(binary)[:20]!r}; true or false.")
            self._wanted.append((name, binary))
        if {"features", "logits"} <= {name for name, _ in self._wanted}:
            raise _bad("features and logits are outputs of two passes; ask for one of them.")

    def answer(self, model: str, call: PredictCall, target: Target, values: Tensor) -> Response:
        outputs, binary = [], []
        for name, as_bytes in self._wanted:
            tensor = _output(name, target, values)
            about: dict[str, Any] = {
                "name": name,
                "datatype": _DATATYPES[name],
                "shape": list(tensor.shape),
            }
            if as_bytes:
                binary.append(_to_bytes(tensor))
                about["parameters"] = {"binary_data_size": len(binary[-1])}
            else:
                about["data"] = tensor.ravel().tolist()
            outputs.append(about)
        answer = {"model_name": self.model, "model_version": "1", "outputs": outputs}
        if self._id is not None:
            answer["id"] = self._id
        header = json.dumps(answer).encode()
        if not binary:
            return Response(header, media_type="application/json")
        return Response(
            header + b"".join(binary),
            media_type="application/octet-stream",
            headers={_HEADER_LENGTH: str(len(header))},
        )

    def refusal(self, error: ApiError) -> Response:
        return error_response(error, "/v2/")


def _metadata(model: str, sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "name": model,
        "versions": ["1"],
        "platform": "pgn_fast",
        "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {
                "name": name,
                "datatype": _DATATYPES[name],
                "shape": [-1] if size is None else [-1, size],
            }
            for name, size in _sizes(sizes).items()
        ],
    }


def _by_default(known: list[str]) -> list[str]:
    """What a call gets that names no output: all, of a model without tasks those of one pass."""
    return known if "features" not in known else known[:1]


def _sizes(sizes: dict[str, int]) -> dict[str, int | None]:
    """The protocol's outputs of a model with these: those of a task are three."""
    if "features" in sizes:
        return dict(sizes)
    return {name: None if name == "labels" else sizes["logits"] for name in _OF_A_TASK}


def _split(request: Request, body: bytes, max_images: int) -> tuple[dict[str, Any], bytes]:
    """The JSON of a call and the bytes of its binary tensors."""
    stated = request.headers.get(_HEADER_LENGTH)
    length = len(body)
    if stated is not None:
        digits = stated.isascii() and stated.isdigit() and len(stated) <= 20
        if not (digits and int(stated) <= len(body)):
            raise _bad(f"{_HEADER_LENGTH} is {stated[:20]!r}, the body has {len(body)} bytes.")
        length = int(stated)
    text = body[:length]
    # as in /v1/predict: many small JSON values are far larger as objects
    check_count(text.count(b",") - 64, max_images)
    call = read_json(text)
    if not isinstance(call, dict):
        raise _bad("the body must be a JSON object.")
    return call, body[length:]


def _images(call: dict[str, Any], binary: bytes, max_images: int) -> list[bytes]:
    inputs = call.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad("the call needs one input: images.")
    tensor = inputs[0]
    if tensor.get("name") != "images" or tensor.get("datatype") != "BYTES":
        raise _bad(
            f"the input is {str(tensor.get('name'))[:40]!r} of {str(tensor.get('datatype'))[:40]!r}"
            "; it must be 'images' of 'BYTES', encoded images."
        )
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if binary:
            raise _bad(f"{len(binary)} bytes follow the JSON, and no input has binary_data_size.")
        images = _from_json(tensor.get("data"), max_images)
    else:
        if size != len(binary):
            raise _bad(f"binary_data_size is {str(size)[:20]}, {len(binary)} bytes follow.")
        images = _from_binary(binary, max_images)
    shape = tensor.get("shape")
    if shape not in ([len(images)], [len(images), 1]):
        raise _bad(f"shape is {str(shape)[:40]}, the tensor has {len(images)} images.")
    if not images:
        raise _bad("the call has no image.")
    return images


def _from_json(data: Any, max_images: int) -> list[bytes]:
    if not isinstance(data, list):
        raise _bad("the input has neither data nor binary_data_size.")
    check_count(len(data), max_images)
    images = []
    for index, text in enumerate(data):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (TypeError, binascii.Error, ValueError) as error:
            raise _bad(f"image {index} is not base64 ({error}).") from None
    return images


def _from_binary(data: bytes, max_images: int) -> list[bytes]:
    """Elements that each follow their length, four bytes, little-endian."""
    images: list[bytes] = []
    at = 0
    while at < len(data):
        check_count(len(images) + 1, max_images)
        if at + 4 > len(data):
            raise _bad("the binary tensor ends in the middle of a length.")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise _bad(f"image {len(images)} states {length} bytes, {len(data) - at} follow.")
        images.append(data[at : at + length])
        at += length
    return images


def _output(name: str, target: Target, values: Tensor) -> np.ndarray:
    if name == "probabilities":
        return values.double().softmax(dim=1).float().numpy()
    if name == "labels":
        names, best = target.class_names, values.argmax(dim=1).tolist()
        return np.array([str(i) if names is None else names[i] for i in best], dtype=object)
    return values.numpy()


def _to_bytes(tensor: np.ndarray) -> bytes:
    if tensor.dtype != object:
        return tensor.astype("<f4", copy=False).tobytes()
    texts = [text.encode() for text in tensor.tolist()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _parameters(of: dict[str, Any]) -> dict[str, Any]:
    found = of.get("parameters")
    return found if isinstance(found, dict) else {}


def _unknown(model: str, served: Answerer) -> ApiError:
    names = list(served.models())
    where = f"this server has {names[0]!r}" if len(names) == 1 else "see GET /v1/tasks"
    return ApiError(404, "no_such_task", f"there is no model {model[:128]!r}; {where}.")


def _bad(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json")
