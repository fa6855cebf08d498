"""The two files of an adapter: what stands in which, and how they prove that they belong together.

The weights file carries a copy of its configuration, so that replacing that one file is what makes
a new adapter valid. ``adapter_config.json``, for people and tools, says the same. One digest covers
the tensors, a second one the configuration: what was damaged or edited is told, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import open_file
from ..errors import UserError, shown
from .header import Header, checked_config, read_config, read_header, read_tensors
from .schema import ABOUT, check_config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# the only entry of the weights file's metadata: several would be written in any order
CARRIED = "adapter_config"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="replace"))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 over all entries but this one, in whatever order they stand."""
    rest = {name: value for name, value in config.items() if name != "config_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A configuration with the digests that ``OpenAdapter`` will look for."""
    config = {**config, "weights_digest": tensors_digest(tensors)}
    config.pop("config_digest", None)
    return {**config, "config_digest": config_digest(config)}


class OpenAdapter:
    """An adapter's configuration and its tensors' names and shapes; the numbers on demand.

    Use as a context manager: the weights file stays open in between, so that what is read later is
    what was described before.

    Attributes:
        folder: where it is.
        config: the configuration, its types and sizes checked.
        header: what the weights file has inside.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.folder = Path(directory)
        if not self.folder.is_dir():
            raise UserError(f"no adapter: there is no folder {self.folder}.")
        path = self.folder / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(f"no adapter in {self.folder}: it has no {WEIGHTS_FILE}.")
        with ExitStack() as stack:
            self._file = stack.enter_context(open_file(path))
            self.header: Header = read_header(self._file, path)
            self.config = self._agreed()
            stack.pop_all()

    def __enter__(self) -> OpenAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, whose digest is the configuration's.

        Raises:
            UserError: they are damaged, or of another adapter.
        """
        try:
            tensors = read_tensors(self._file, self.header)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / WEIGHTS_FILE}: {error}.") from error
        digest = tensors_digest(tensors)
        if self.config.get("weights_digest", digest) != digest:
            raise UserError(
                f"{self.folder}: {WEIGHTS_FILE} does not belong to {CONFIG_FILE}, or its tensors "
                "are damaged: their digests differ. Save the adapter again, or copy both files "
                "together."
            )
        return tensors

    def _agreed(self) -> dict[str, Any]:
        """The configuration on which both files agree."""
        where, carried = self.folder / CONFIG_FILE, self.header.metadata.get(CARRIED)
        beside = read_config(where)
        if beside is not None:
            check_config(beside, where)
        if carried is None:
            if beside is None:
                raise UserError(f"no adapter in {self.folder}: it has no {CONFIG_FILE}.")
            if not _whole(beside):
                raise UserError(f"{where} was changed after it was saved: its digest differs.")
            return beside
        copy = f"the copy of the configuration inside {self.folder / WEIGHTS_FILE}"
        try:
            inside = checked_config(carried.encode(errors="surrogatepass"), copy)
            if not _whole(inside):
                raise UserError(f"{copy} is damaged: its digest differs.")
            check_config(inside, copy)
        except UserError as error:
            if beside is None or "config_digest" not in beside or not _whole(beside):
                raise
            # whole, and its digest of the tensors will tell whether it is theirs
            warnings.warn(f"{error} {CONFIG_FILE} is whole and is used.", stacklevel=6)
            return beside
        if beside is None or beside == inside:
            return inside
        if _whole(beside) and beside.get("weights_digest") != inside.get("weights_digest"):
            # a save was interrupted between its two files; the weights are complete
            warnings.warn(
                f"{where} does not belong to {WEIGHTS_FILE}, as after an interrupted save: the "
                "configuration inside the weights file is used.",
                stacklevel=6,
            )
            return inside
        return self._reconciled(beside, inside)

    def _reconciled(self, beside: dict[str, Any], inside: dict[str, Any]) -> dict[str, Any]:
        """Entries that somebody added are the caller's to judge; those that differ are refused."""
        differing = sorted(
            name
            for name in inside.keys() | (beside.keys() & ABOUT.keys())
            if beside.get(name, self) != inside.get(name, self)
            # it may be right for entries that somebody else knows
            and not (name == "config_digest" and beside.keys() > inside.keys())
        )
        if differing:
            name = differing[0]
            what = [shown(c[name]) if name in c else "missing" for c in (beside, inside)]
            raise UserError(
                f"{self.folder / CONFIG_FILE} was edited or damaged: {shown(name)} is {what[0]}, "
                f"and {what[1]} in the copy inside {WEIGHTS_FILE}"
                + (f"; {len(differing) - 1} more differ" if len(differing) > 1 else "")
                + f". Remove {CONFIG_FILE} to use that copy; to change an entry, load the adapter "
                "and save it again."
            )
        return beside


def _whole(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is as it was saved; one of an older version cannot tell."""
    return "config_digest" not in config or config["config_digest"] == config_digest(config)


def read_adapter(directory: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter, which belong together.

    Raises:
        UserError: no adapter there, or a damaged one.
    """
    with OpenAdapter(directory) as adapter:
        return adapter.config, adapter.tensors()
