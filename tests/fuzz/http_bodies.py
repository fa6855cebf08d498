"""HTTP bodies: every call gets an answer, and one that is refused gets a 4xx in the usual form."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import odd_images
import torch
from starlette.testclient import TestClient

import pgn_fast
from pgn_fast.adapters import save_pretrained
from pgn_fast.serve import create_app, load_served_tasks
from pgn_fast.serve.admin import create_admin

from . import damage
from .run import Fault

_LONGEST = 1500  # letters of a message
_HEADER = "Inference-Header-Content-Length"
_ODD_HEADERS = ("", "-1", "0", "9" * 30, "é", "text/html", "multipart/form-data", "a" * 5000)


class HttpBodies:
    """See ``run.Target``."""

    def __init__(self, folder: Path) -> None:
        for name, classes in (("pets", 2), ("food", 3)):
            model = pgn_fast.VPT("pgn_demo_vit", classes, num_prompts=2)
            torch.nn.init.normal_(model.head.weight)
            save_pretrained(model, folder / name)
        self.folder = folder
        tasks = load_served_tasks(folder, watch_s=0)
        self.client = TestClient(create_app(tasks), raise_server_exceptions=False)
        self.client.__enter__()
        self.admin = TestClient(
            create_admin(tasks), base_url="http://127.0.0.1", raise_server_exceptions=False
        )
        self.admin.__enter__()
        rng = random.Random(0)
        self.images = [
            odd_images.encode(odd_images.noise(rng, size=(20, 30)), kind)
            for kind in ("PNG", "JPEG", "WEBP")
        ]
        for make in (self._json, self._form, self._protocol):
            if (answer := self._send(*make(rng))).status_code != 200:
                raise Fault(answer.text)

    def attempt(self, rng: random.Random) -> str:
        make = rng.choice((self._json, self._form, self._protocol, self._binary, self._add))
        path, headers, body = make(rng)
        if isinstance(body, dict):
            for _ in range(rng.choice((0, 1, 1, 2))):
                body = damage.json_value(body, rng)
            body = json.dumps(body).encode()
        for _ in range(rng.choice((0, 0, 1, 2))):
            body = damage.bytes_of(body, rng)
        if rng.random() < 0.2:
            headers = {**headers, rng.choice(list(headers)): rng.choice(_ODD_HEADERS)}
        answer = self._send(path, headers, body)
        if answer.status_code == 200 or answer.status_code == 201:
            return "answered"
        self._check(answer)
        return f"{answer.status_code // 100}xx"

    def _check(self, answer: httpx.Response) -> None:
        error = answer.json().get("error")
        message = error.get("message") if isinstance(error, dict) else error
        if not 400 <= answer.status_code < 500 or not isinstance(message, str):
            raise Fault(f"{answer.status_code}: {answer.text[:500]}")
        if len(message) > _LONGEST or "Traceback" in message:
            raise Fault(f"{answer.status_code}: {message[:500]}")

    def _send(self, path: str, headers: Mapping[str, str], body: Any) -> httpx.Response:
        client = self.admin if path == "/v1/tasks" else self.client
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        raw = {name: value.encode("utf-8") for name, value in headers.items()}
        return client.post(path, content=data, headers=raw)

    def _encoded(self, rng: random.Random) -> list[bytes]:
        return [rng.choice(self.images) for _ in range(rng.choice((1, 1, 2, 5)))]

    def _json(self, rng: random.Random) -> tuple[str, dict[str, str], Any]:
        texts = [base64.b64encode(data).decode() for data in self._encoded(rng)]
        call = {"images": texts, "task": "pets", "topk": 2, "encoding": "base64"}
        return "/v1/predict", {"content-type": "application/json"}, call

    def _form(self, rng: random.Random) -> tuple[str, dict[str, str], Any]:
        parts = [
            b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n'
            b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"
            for data in self._encoded(rng)
        ]
        task = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\nfood\r\n'
        body = b"".join([*parts, task, b"--b--\r\n"])
        return "/v1/predict", {"content-type": "multipart/form-data; boundary=b"}, body

    def _protocol(self, rng: random.Random) -> tuple[str, dict[str, str], Any]:
        texts = [base64.b64encode(data).decode() for data in self._encoded(rng)]
        tensor = {"name": "images", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
        outputs = [{"name": "labels"}, {"name": "logits", "parameters": {"binary_data": True}}]
        call = {"id": "1", "inputs": [tensor], "outputs": outputs}
        return "/v2/models/pets/infer", {"content-type": "application/json"}, call

    def _binary(self, rng: random.Random) -> tuple[str, dict[str, str], Any]:
        encoded = self._encoded(rng)
        data = b"".join(struct.pack("<I", len(image)) + image for image in encoded)
        size = {"binary_data_size": len(data)}
        tensor = {"name": "images", "datatype": "BYTES", "shape": [len(encoded)]}
        header = json.dumps({"inputs": [{**tensor, "parameters": size}]}).encode()
        return "/v2/models/food/infer", {_HEADER: str(len(header))}, header + data

    def _add(self, rng: random.Random) -> tuple[str, dict[str, str], Any]:
        call = {"name": "new", "source": str(self.folder / "pets"), "replace": True}
        return "/v1/tasks", {"content-type": "application/json"}, call
