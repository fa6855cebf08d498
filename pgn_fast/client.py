"""Clients of ``pgn-fast serve`` (docs/serving.md).

``TaskClient`` asks for trained tasks by name. ``RgbClient`` asks a model that nothing was trained
on, and adapts it by changing the images. Both use the standard library's HTTP client, so that a
device that only sends images needs no package beyond pgn_fast's own.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import brief

if TYPE_CHECKING:
    from typing_extensions import Self

    from .inversion import ServerSpec

_RETRIED = (429, 503)


class Prompter(Protocol):
    """What turns images into encoded canvases: an ``RgbPrompter`` of ``pgn_fast.invert``."""

    def encode(self, images: Any) -> Sequence[bytes]: ...


class ServerError(RuntimeError):
    """The server refused a call, or did not answer.

    Attributes:
        status: its HTTP status; None where there was no answer.
        code: the word of its JSON answer, such as "too_many_pixels".
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Client:
    """One connection to a server, which serves one thread, and its repetitions."""

    def __init__(
        self, url: str, *, token: str | None, timeout: float, retries: int, backoff: float
    ) -> None:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"url={url!r}: should be like http://127.0.0.1:8000")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self.url = url.rstrip("/")
        self._connection = kinds[address.scheme](address.hostname, address.port, timeout=timeout)
        self._path = address.path.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {_checked(token)}"}
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._images_per_call: int | None = None

    def model(self) -> dict[str, Any]:
        """What the server says of itself: name, output sizes, preprocessing, limits."""
        return self._call("GET", "/v1/model")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, encoded: Sequence[bytes], **fields: Any) -> tuple[Tensor, list[Any]]:
        """Values (B, size) and predictions of encoded images, in as many calls as it takes."""
        if not encoded:
            raise ValueError("there are no images to send: the batch is empty")
        if self._images_per_call is None:
            with self._understood():
                self._images_per_call = int(self.model()["limits"]["images_per_call"])
        step = self._images_per_call
        values: list[Tensor] = []
        predictions: list[Any] = []
        for at in range(0, len(encoded), step):
            images = [base64.b64encode(data).decode() for data in encoded[at : at + step]]
            call = {"images": images, "encoding": "base64", **fields}
            answer = self._call("POST", "/v1/predict", json.dumps(call).encode())
            with self._understood():
                numbers = np.frombuffer(base64.b64decode(answer["values"]), dtype="<f4")
                values.append(torch.from_numpy(numbers.astype(np.float32)).reshape(answer["shape"]))
                predictions += answer.get("predictions", [])
        return torch.cat(values), predictions

    def _call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        attempts = 0
        while True:
            pause = self._backoff * 2**attempts * random.uniform(1.0, 1.5)
            attempts += 1
            last = attempts > self._retries
            try:
                status, retry_after, text = self._send(method, path, body)
            except TimeoutError as error:
                self.close()
                raise ServerError(
                    f"{self.url} did not answer within {self._timeout:g} seconds; raise timeout=, "
                    "or send fewer images at a time."
                ) from error
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if last:
                    raise ServerError(
                        f"no connection to {self.url} after {attempts} attempts "
                        f"({type(error).__name__}: {error}). Is the server running?"
                    ) from error
            else:
                if status == 200:
                    with self._understood():
                        return _object(text)
                if retry_after > self._timeout:
                    last = True  # nobody who gave a timeout waits for that
                if status not in _RETRIED or last:
                    raise _refusal(self.url, status, text, attempts)
                pause = max(pause, retry_after)
            time.sleep(pause)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Reads an answer, which may be that of another server."""
        try:
            yield
        except ServerError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ServerError(
                f"{self.url} answers, but not as pgn-fast serve does ({type(error).__name__}: "
                f"{brief(error, 100)}). Is the url right?",
                200,
            ) from error

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, float, bytes]:
        """Status, seconds of Retry-After and body of one answer."""
        kind = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(method, self._path + path, body, self._headers | kind)
        answer = self._connection.getresponse()
        text = answer.read()
        wait = answer.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        return answer.status, seconds, text


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its name, its index in label order, its probability."""

    label: str
    index: int
    probability: float


class TaskClient(_Client):
    """Trained tasks of a server, by name.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        task: the name of the task that is asked for; None: the only one that the server has.
        token: the bearer token that the server asks for (``--token-file``).
        timeout: seconds to wait for one answer.
        retries: how often a call is sent again that got 503 or 429, or lost its connection.
        backoff: seconds before the first repetition, doubled for each next one (and at least what
            ``Retry-After`` asks for; where that is more than ``timeout``, nothing is sent again).

    Images are encoded ones (bytes), or a uint8 tensor (B, 3, H, W); the server prepares them as the
    task was trained.

    One client keeps one connection and serves one thread.
    """

    def __init__(
        self,
        url: str,
        task: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 0.1,
    ) -> None:
        super().__init__(url, token=token, timeout=timeout, retries=retries, backoff=backoff)
        self.task = task

    def tasks(self) -> list[str]:
        """Names of the tasks that the server has."""
        answer = self._call("GET", "/v1/tasks")
        with self._understood():
            return [task["name"] for task in answer["tasks"]]

    def describe(self) -> dict[str, Any]:
        """Method, classes and preprocessing of the task.

        Raises:
            ServerError: the server has several tasks and ``task`` is None, or it has not this one.
        """
        name = self.task
        if name is None:
            names = self.tasks()
            if len(names) != 1:
                raise ServerError(f"{self.url} has {len(names)} tasks; name one by task=.")
            (name,) = names
        return self._call("GET", f"/v1/tasks/{quote(name, safe='')}")

    def logits(self, images: Tensor | Sequence[bytes]) -> Tensor:
        """Logits (B, C), float32."""
        return self._of_task(images, 0)[0]

    def predict(self, images: Tensor | Sequence[bytes], topk: int = 1) -> list[list[Prediction]]:
        """The ``topk`` most probable classes of each image, the most probable first."""
        found = self._of_task(images, topk)[1]
        with self._understood():
            return [[Prediction(**each) for each in image] for image in found]

    def _of_task(self, images: Tensor | Sequence[bytes], topk: int) -> tuple[Tensor, list[Any]]:
        fields = {"topk": topk} if self.task is None else {"topk": topk, "task": self.task}
        return self._ask(encode_plain(images), **fields)


class RgbClient(_Client):
    """Features and logits of images, through an API that takes images only.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        prompter: turns images into canvases; None sends the images as they are.
        head: applied here to the server's features, such as ``model.head`` of the adapter whose
            prompts are sent: the server's model has no trained head. None: logits are the server's.
        token, timeout, retries, backoff: as in ``TaskClient``.

    Images are, with a prompter, what its ``encode`` takes. Without one: a uint8 tensor
    (B, 3, H, W), or a list of encoded images (bytes).

    One client keeps one connection and serves one thread.
    """

    def __init__(
        self,
        url: str,
        prompter: Prompter | None = None,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 0.1,
    ) -> None:
        super().__init__(url, token=token, timeout=timeout, retries=retries, backoff=backoff)
        self.prompter = prompter
        self.head = head

    def features(self, images: Tensor | Sequence[bytes]) -> Tensor:
        """Pooled features (B, D), float32."""
        return self._predict(images, "features")

    def logits(self, images: Tensor | Sequence[bytes]) -> Tensor:
        """Logits (B, C), float32: ``head(features)``, or the server's where there is no head."""
        if self.head is None:
            return self._predict(images, "logits")
        with torch.inference_mode():
            return self.head(self.features(images))

    def predict(self, images: Tensor | Sequence[bytes]) -> Tensor:
        """Class indices (B,)."""
        return self.logits(images).argmax(dim=-1)

    def server_spec(self) -> ServerSpec:
        """The server's preprocessing as ``pgn_fast.invert(model, server=...)`` takes it.

        Raises:
            ValueError: it neither resizes and crops to a square nor leaves canvases of its own
                size as they are, so that no canvas survives it.
        """
        from .inversion import ServerSpec

        stated = self.model()["preprocessing"]
        _, height, width = stated["input_size"]
        given = {name: stated[name] for name in ("interpolation", "mean", "std")}
        if stated["crop_mode"] == "center" and height == width:
            return ServerSpec(resize=math.floor(height / stated["crop_pct"]), crop=height, **given)
        if stated["canvas_is_unchanged"] and height == width:
            return ServerSpec(resize=height, crop=height, **given)
        if stated["canvas_is_unchanged"]:
            return ServerSpec(resize=None, crop=None, dynamic_size=True, **given)
        raise ValueError(
            f"{self.url} crops by {stated['crop_mode']!r} to {height} × {width} pixels, which "
            "changes every canvas; serve the model with --crop-mode center or --crop-pct 1."
        )

    def _predict(self, images: Tensor | Sequence[bytes], output: str) -> Tensor:
        encoded = encode_plain(images) if self.prompter is None else self.prompter.encode(images)
        return self._ask(encoded, output=output)[0]


def encode_plain(images: Tensor | Sequence[bytes]) -> list[bytes]:
    """PNGs of images as they are.

    Args:
        images: uint8 levels (B, 3, H, W), or images that are encoded already, which pass.

    Raises:
        ValueError: a tensor of another shape or dtype, or what is no list of bytes.
    """
    if not isinstance(images, Tensor):
        bytes_like = bytes | bytearray | memoryview
        if isinstance(images, bytes_like) or not all(isinstance(x, bytes_like) for x in images):
            raise ValueError("images must be a list of encoded images (bytes), or a uint8 tensor")
        return list(images)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 levels (B, 3, H, W), got {images.dtype} {tuple(images.shape)}. "
            "Undo a normalization first, and round to 0 ... 255."
        )
    return [_png(levels) for levels in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def _png(levels: np.ndarray) -> bytes:
    file = io.BytesIO()
    # canvases are nearly noise: a higher level takes longer and saves nothing
    Image.fromarray(levels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _checked(token: str) -> str:
    """A token as a header takes it; the end of the line of the file that it was read from is cut.

    Raises:
        ValueError: it has letters that no header can carry; they are not shown.
    """
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError("token must be one line of ASCII letters, digits and signs")
    return token


def _object(text: bytes) -> dict[str, Any]:
    answer = json.loads(text)
    if not isinstance(answer, dict):
        raise TypeError("no JSON object")
    return answer


def _refusal(url: str, status: int, text: bytes, attempts: int) -> ServerError:
    try:
        error = json.loads(text)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = None, text[:200].decode("utf-8", "replace")
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    return ServerError(f"{url} answered {status}{tried}: {message}", status, code)
