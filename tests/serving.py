"""What the tests of server and client share: a tiny model, images, a server that listens."""

from __future__ import annotations

import base64
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import torch
import uvicorn
from odd_images import noise
from PIL import Image
from timm.models import VisionTransformer

from pgn_fast.serve import ServedModel, ServerSettings
from pgn_fast.serve.lifetime import Server

CONFIG = {
    "architecture": "tiny",
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def tiny_vit(num_classes: int = 10) -> VisionTransformer:
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=num_classes
    )
    model.pretrained_cfg = dict(CONFIG)
    return model.eval()


def images(count: int, size: tuple[int, int] | None = None, seed: int = 0) -> list[Image.Image]:
    rng = random.Random(seed)
    return [noise(rng, size=size) for _ in range(count)]


def as_json(encoded: list[bytes], **fields: str) -> dict:
    return {"images": [base64.b64encode(data).decode() for data in encoded], **fields}


class Gated:
    """A model that answers only while its gate is open."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self.gate = threading.Event()

    def __getattr__(self, name: str):
        return getattr(self._served, name)

    def run(self, calls):
        assert self.gate.wait(20)
        return self._served.run(calls)


def connect(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10)


def serving(app, **config: object):
    """(address, server) of an ASGI application that listens; shut down gracefully at the end."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **config))
    return _running(server, server.run)


def guarded(app, settings: ServerSettings | None = None, admin=None):
    """(address, server) of an application as ``pgn-fast serve`` runs it."""
    server = Server(app, settings or ServerSettings(), admin)
    return _running(server, lambda: server.listen("127.0.0.1", 0))


@contextmanager
def _running(
    server: uvicorn.Server, run: Callable[[], object]
) -> Iterator[tuple[str, uvicorn.Server]]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
