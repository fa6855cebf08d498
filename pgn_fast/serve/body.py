"""The body of a call: multipart files or base64 JSON → encoded images and what is asked of them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from .._json import NamedTwice, named_once
from .errors import ApiError
from .settings import OUTPUTS

ENCODINGS = ("json", "base64")
# what a call says beside its images
FIELDS = ("task", "output", "encoding", "topk")
# form fields or JSON values beside the images, known or not
_MAX_OTHERS = 16
# "filename*" and "filename*0" of RFC 5987 and RFC 2231, which python-multipart leaves out
_QUOTED = re.compile(rb'"(?:\\.|[^"\\])*"')
_EXTENDED_NAME = re.compile(rb";\s*filename\*", re.IGNORECASE)


@dataclass(frozen=True)
class PredictCall:
    """One call of ``POST /v1/predict``.

    Attributes:
        images: encoded images, in the order of the answer.
        output: "features" or "logits".
        encoding: the answer's numbers as nested "json" lists or as "base64" of float32.
        task: the name of the task that is asked for; None: not said.
        topk: how many classes of each image a task's answer names.
    """

    images: list[bytes]
    output: str
    encoding: str
    task: str | None = None
    topk: int = 5


def parse_call(
    content_type: str, body: bytes, *, default_output: str, max_images: int
) -> PredictCall:
    """Read one call.

    Two content types are taken:

    - ``multipart/form-data``: every part that has a file name is an image; the fields ``task``,
      ``output``, ``encoding`` and ``topk`` may stand beside them.
    - ``application/json``: ``{"images": ["<base64>", ...], "task": ..., "output": ...}``.

    Raises:
        ApiError: 400 malformed, 413 too many images, 415 another content type.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        images, fields = _read_multipart(options.get(b"boundary", b""), body, max_images)
    elif kind == b"application/json":
        images, fields = _read_json(body, max_images)
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type is {content_type[:80]!r}; send multipart/form-data with files, or "
            "application/json with base64 images.",
        )
    if not images:
        raise _bad("the call has no image.")
    output = fields.get("output", default_output)
    encoding = fields.get("encoding", "json")
    if output not in OUTPUTS:
        raise _bad(f"output={str(output)[:40]!r}: known are {', '.join(OUTPUTS)}.")
    if encoding not in ENCODINGS:
        raise _bad(f"encoding={str(encoding)[:40]!r}: known are {', '.join(ENCODINGS)}.")
    task = fields.get("task")
    if task is not None and not isinstance(task, str):
        raise _bad(f"task={str(task)[:40]!r}: give the name of one task.")
    return PredictCall(images, output, encoding, task, _topk(fields.get("topk", 5)))


def _topk(value: Any) -> int:
    """A number of classes, out of JSON or a form field."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 5:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
        raise _bad(f"topk={str(value)[:40]!r}: give a number from 0 to 1000.")
    return value


def _read_json(body: bytes, max_images: int) -> tuple[list[bytes], dict[str, Any]]:
    # each further JSON value takes a comma: counted first, because millions of empty lists fit a
    # body and would be fifty times its size as Python objects
    check_count(body.count(b",") - _MAX_OTHERS, max_images)
    call = read_json(body)
    if not isinstance(call, dict) or not isinstance(call.get("images"), list):
        raise _bad('the body must be a JSON object like {"images": ["<base64>", ...]}.')
    encoded = call["images"]
    check_count(len(encoded), max_images)
    images = []
    for index, text in enumerate(encoded):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (TypeError, binascii.Error, ValueError) as error:
            raise _bad(f"image {index} is not base64 ({error}).") from None
    return images, call


def read_json(text: bytes) -> Any:
    """Raises ApiError 400 for what is no JSON, or names something twice."""
    try:
        return json.loads(text, object_pairs_hook=named_once)
    except NamedTwice as error:
        raise _twice(error.name) from None
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is not JSON ({error}).") from None


def _twice(name: str) -> ApiError:
    return _bad(f"{name[:40]!r} is there twice; which one is meant cannot be told.")


def _read_multipart(
    boundary: bytes, body: bytes, max_images: int
) -> tuple[list[bytes], dict[str, Any]]:
    parts = _Parts(max_images)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise _bad(f"the body is not well-formed multipart/form-data ({error}).") from None
    if not parts.complete:
        raise _bad("the multipart body ends before its last boundary.")
    return parts.images, parts.fields


class _Parts:
    """Collects the parts that python-multipart finds: files are images, the others are fields."""

    def __init__(self, max_images: int) -> None:
        self.images: list[bytes] = []
        self.fields: dict[str, Any] = {}
        self.complete = False
        self._max_images = max_images
        self._name = self._value = self._disposition = b""
        self._data: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._data = []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        data = b"".join(self._data)
        if b"filename" in options or _EXTENDED_NAME.search(_QUOTED.sub(b"", self._disposition)):
            check_count(len(self.images) + 1, self._max_images)
            self.images.append(data)
        else:
            if len(self.fields) >= _MAX_OTHERS:
                raise _bad(f"the call has more than {_MAX_OTHERS} fields beside its images.")
            name = options.get(b"name", b"").decode("utf-8", "replace")
            if name in self.fields:
                raise _twice(name)
            self.fields[name] = data.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.complete = True


def check_count(count: int, max_images: int) -> None:
    """Raises ApiError 413 where a call has more images than one may."""
    if count > max_images:
        raise ApiError(
            413,
            "too_many_images",
            f"the call has {count} images or more; this server takes {max_images} a call.",
        )


def _bad(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)
