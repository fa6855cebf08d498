"""Checkpoints of the official PGN code: each loads, or is refused by a ``ValueError`` that names
the file and never advises to load it in another way."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

import pgn_fast

from . import damage
from .run import Fault


class Official:
    """See ``run.Target``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"
        generator = pgn_fast.PromptGenerator(
            8, num_prompts=2, library_size=4, generator_kwargs={"channels": 4, "groups": 2}
        )
        self.state = {_official(n): t for n, t in generator.state_dict().items()}
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        self.good = buffer.getvalue()
        self.path.write_bytes(self.good)
        pgn_fast.PromptGenerator.from_official(self.path, num_prompts=2)

    def attempt(self, rng: random.Random) -> str:
        kind = rng.choice((self._bytes, self._state, self._state, self._record, self._other))
        self.path.write_bytes(kind(rng))
        if rng.random() < 0.03:
            damage.entry(self.path, rng)
        try:
            pgn_fast.PromptGenerator.from_official(self.path)
            return "loaded"
        except ValueError as error:
            text = str(error)
            if str(self.path) not in text or "weights_only" in text:
                raise Fault(f"does not name the file, or advises: {text[:500]}") from error
            if len(text) > 1500 or not text.isprintable():
                raise Fault(f"long or with control characters: {text[:1500]!r}") from error
            return "refused"
        finally:
            if self.path.is_dir():
                self.path.rmdir()
            self.path.unlink(missing_ok=True)

    def _bytes(self, rng: random.Random) -> bytes:
        return damage.bytes_of(self.good, rng)

    def _state(self, rng: random.Random) -> bytes:
        """A state dict in which tensors are gone, renamed, of other shapes, or no tensors."""
        state: dict[Any, Any] = dict(self.state)
        for _ in range(rng.choice((1, 2, 3))):
            name = rng.choice(list(state) or [""])
            state.setdefault(name, {})
            tensor = state[name]
            kind = rng.choice(("drop", "odd", "rename", "cut", "expand", "nest", "dtype"))
            if kind == "drop" or not isinstance(tensor, torch.Tensor):
                del state[name]
            elif kind == "odd":
                state[name] = rng.choice(damage.ODD_VALUES)
            elif kind == "rename":
                state[rng.choice((7, "", "x" * 10_000, f"{name}.x", None))] = state.pop(name)
            elif kind == "cut":
                state[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
            elif kind == "expand":
                # of any size, and a few bytes on disk
                shape = (rng.choice((4096, 10**6)), *tensor.shape[1:])
                state[name] = torch.zeros(()).expand(shape)
            elif kind == "nest":
                state = {rng.choice(("state_dict", "pgn_module")): state}
            else:
                state[name] = tensor.to(rng.choice((torch.int64, torch.complex64, torch.float16)))
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
        return buffer.getvalue()

    def _record(self, rng: random.Random) -> bytes:
        """The archive with one record damaged, and its checksum right."""
        old, buffer = zipfile.ZipFile(io.BytesIO(self.good)), io.BytesIO()
        chosen = rng.choice(old.namelist())
        with zipfile.ZipFile(buffer, "w", rng.choice((0, zipfile.ZIP_DEFLATED))) as new:
            for name in old.namelist():
                data = old.read(name)
                if name == chosen:
                    data = damage.bytes_of(data, rng)
                if name != chosen or rng.random() < 0.8:
                    new.writestr(name, data)
        return buffer.getvalue()

    def _other(self, rng: random.Random) -> bytes:
        """No checkpoint at all, or one with more than tensors inside."""
        buffer = io.BytesIO()
        kind = rng.randrange(5)
        if kind == 0:
            return rng.choice((b"", b"<!doctype html><html>", rng.randbytes(2000), b"PK\x03\x04"))
        if kind == 1:
            return pickle.dumps(rng.choice(([[]] * 1000, {"state_dict": 3}, argparse.Namespace())))
        if kind == 2:
            content: Any = {"state_dict": self.state, "hyper_parameters": argparse.Namespace(lr=1)}
        elif kind == 3:
            content = rng.choice((3, "x", [], {}, [self.state], torch.zeros(3)))
        else:
            # a small record of a pickle that asks for a great many objects
            marks = rng.choice((b"]", b"}", b"(")) * 10**6
            pickled = b"\x80\x02" + marks + b"."
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", pickled)
                archive.writestr("archive/version", b"3\n")
            return buffer.getvalue()
        torch.save(content, buffer)
        return buffer.getvalue()


def _official(name: str) -> str:
    """The official code's name of a tensor of ours."""
    for ours, theirs in (
        ("token_library", "tl_vectors"),
        ("generator.stem.", "model.input_net."),
        ("generator.blocks.", "model.blocks."),
        ("generator.head.", "model.output_net.2."),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in {
        ".conv1.": ".net.0.",
        ".norm1.": ".net.1.",
        ".conv2.": ".net.3.",
        ".norm2.": ".net.4.",
        ".shortcut.": ".downsample.",
    }.items():
        name = name.replace(ours, theirs)
    return name
