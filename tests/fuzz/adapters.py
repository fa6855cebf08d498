"""Adapter folders: each loads, or is refused by one ``UserError`` that names the folder."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import pgn_fast
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE, files, read_adapter, save_pretrained
from pgn_fast.backbone.load import load_backbone
from pgn_fast.errors import UserError
from pgn_fast.models import LinearProbe

from . import damage
from .run import Fault

BACKBONE = "pgn_demo_vit"
LONGEST = 1500  # letters of a message
# a number that is no seed of ours must not matter
_GOOD: Mapping[str, Callable[[], Any]] = {
    "pgn": lambda: pgn_fast.PGN(BACKBONE, 4, num_prompts=2, library_size=4, resolution=32),
    "pgn-timm": lambda: pgn_fast.PGN(
        BACKBONE, 4, num_prompts=1, library_size=4, resolution=32, generator="test_resnet"
    ),
    "vpt-deep": lambda: pgn_fast.VPT(BACKBONE, 4, num_prompts=2, dropout=0.1, layers=(1, 3)),
    "vpt-shallow": lambda: pgn_fast.VPT(BACKBONE, 4, num_prompts=2, deep=False, project_dim=8),
    "zero-shot": lambda: pgn_fast.VPT(
        BACKBONE, num_prompts=2, head="zero_shot", class_embeddings=torch.randn(4, 128)
    ),
    "linear": lambda: LinearProbe(load_backbone(BACKBONE), 4),
}


class Adapters:
    """See ``run.Target``."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.good: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        for make in _GOOD.values():
            save_pretrained(make(), self.work, class_names=["a", "b", "c", "d"])
            self.good.append(read_adapter(self.work))
            pgn_fast.from_pretrained(self.work)
            shutil.rmtree(self.work)

    def attempt(self, rng: random.Random) -> str:
        config, tensors = rng.choice(self.good)
        for _ in range(rng.choice((1, 1, 2))):
            change = rng.choice((self._config, self._config, self._tensors))
            config, tensors = change(config, dict(tensors), rng)
        self._write(config, tensors, rng)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            path = self.work / name
            if rng.random() < 0.15 and path.exists():
                damage.entry(path, rng)
            elif rng.random() < 0.25 and path.exists():
                path.write_bytes(damage.bytes_of(path.read_bytes(), rng))
        try:
            pgn_fast.from_pretrained(self.work)
            return "loaded"
        except UserError as error:
            text = str(error)
            if str(self.work) not in text:
                raise Fault(f"does not name the folder: {text[:500]}") from error
            if len(text) > LONGEST or not text.isprintable():
                raise Fault(f"long or with control characters: {text[:LONGEST]!r}") from error
            return "refused"
        finally:
            shutil.rmtree(self.work)

    @staticmethod
    def _config(config: Any, tensors: dict[str, Tensor], rng: random.Random) -> tuple[Any, Any]:
        return damage.json_value(config, rng), tensors

    @staticmethod
    def _tensors(config: Any, tensors: dict[str, Tensor], rng: random.Random) -> tuple[Any, Any]:
        if not tensors:
            return config, tensors
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        kind = rng.choice(("drop", "add", "rename", "shape", "cut", "value", "dtype"))
        if kind == "drop":
            del tensors[name]
        elif kind == "add":
            tensors[rng.choice(("x", f"{name}.x", "backbone.norm.weight"))] = torch.zeros(3)
        elif kind == "rename":
            tensors[name[:-1]] = tensors.pop(name)
        elif kind == "shape":
            tensors[name] = tensor.reshape(rng.choice(((-1,), (1, -1), (-1, 1))))
        elif kind == "cut":
            tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
        elif kind == "value" and tensor.is_floating_point():
            tensors[name] = tensor.clone()
            worst = rng.choice((float("nan"), float("inf"), -1.0, 1e38))
            tensors[name].view(-1)[rng.randrange(tensor.numel())] = worst
        else:
            dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
            tensors[name] = tensor.to(rng.choice(dtypes))
        return config, tensors

    def _write(self, config: Any, tensors: dict[str, Tensor], rng: random.Random) -> None:
        """The folder as a stranger writes it: with digests that are right, or as they were."""
        self.work.mkdir()
        if isinstance(config, dict) and rng.random() < 0.8:
            config = files.sealed(config, tensors)
        text = json.dumps(config)
        carried = {"adapter_config": text} if rng.random() < 0.7 else None
        weights = safetensors.torch.save(tensors, carried)
        if rng.random() < 0.1:
            weights = _bad_header(weights, rng)
        (self.work / WEIGHTS_FILE).write_bytes(weights)
        if carried is None or rng.random() < 0.8:
            (self.work / CONFIG_FILE).write_text(text)


def _bad_header(weights: bytes, rng: random.Random) -> bytes:
    """The same file with a header that says something else."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = damage.json_value(json.loads(weights[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = rng.choice((b"[" * 100_000, b"{" + b'"a":{},' * 100_000 + b'"b":{}}', b"", b"{}"))
    length = rng.choice((len(text), len(text), len(text), 0, 1, 2**31, 2**63))
    return struct.pack("<Q", length) + text + weights[8 + length :]
