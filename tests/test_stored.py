"""Archives of ``torch.save`` from elsewhere: every damage is seen, nothing is run, no file decides
how much memory is taken."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pgn_fast import PromptGenerator
from pgn_fast._stored import check_numbers, read_archive, seal_archive
from pgn_fast.errors import UserError
from pgn_fast.train import checkpoints

STATE = {"a": torch.arange(3000.0), "b": torch.ones(2, 3, dtype=torch.float16)}


def archive(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Code:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_what_torch_saves_is_read(tmp_path):
    path = tmp_path / "file.pt"
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    content = {
        "ordered": OrderedDict(STATE),
        "kinds": [torch.ones(2).to(dtype) for dtype in dtypes],
        "parameter": nn.Parameter(torch.zeros(2)),
        "shape": torch.Size([1, 2]),
        "rest": [1, 2.5, "x", None, True, {"y": (1, 2)}],
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 3),
    }
    path.write_bytes(archive(content))
    found = read_archive(path)
    assert torch.equal(found["ordered"]["a"], STATE["a"])
    assert [t.dtype for t in found["kinds"]] == list(dtypes)
    assert torch.equal(found["transposed"], content["transposed"])
    assert found["rest"] == content["rest"]


def test_every_flipped_bit_of_a_record_is_seen(tmp_path):
    path, raw, rng = tmp_path / "file.pt", archive(STATE), random.Random(0)
    record = next(r for r in zipfile.ZipFile(io.BytesIO(raw)).infolist() if r.file_size == 12_000)
    for _ in range(50):
        damaged = bytearray(raw)
        damaged[record.header_offset + 200 + rng.randrange(11_000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"file\.pt.*checksum differs"):
            read_archive(path)


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    checkpoints.save(tmp_path, {"model": STATE})
    assert torch.equal(checkpoints.load(tmp_path)["model"]["a"], STATE["a"])
    path, rng = tmp_path / checkpoints.FILE, random.Random(0)
    raw = path.read_bytes()
    for at in [*range(60), *rng.sample(range(len(raw)), 100), *range(len(raw) - 90, len(raw))]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"resume.*{checkpoints.FILE}"):
            checkpoints.load(tmp_path)
    for length in (0, 3, 70, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(UserError, match="resume"):
            checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "content, names",
    [
        ({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        (nn.Linear(2, 2), "Linear"),
        ({"x": bytearray(8)}, "bytearray"),
        ({"x": {1, 2}}, "set"),
    ],
    ids=["namespace", "module", "bytearray", "set"],
)
def test_other_objects_are_named_and_not_made(content, names, tmp_path):
    path = tmp_path / "file.ckpt"
    path.write_bytes(archive(content))
    with pytest.raises(UserError) as caught:
        read_archive(path)
    text = str(caught.value)
    assert str(path) in text and names in text and "weights_only" not in text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_no_code_is_run(zipped, tmp_path):
    path = tmp_path / "file.pt"
    content = {"tl_vectors": Code(tmp_path / "sprung")}
    path.write_bytes(archive(content, _use_new_zipfile_serialization=zipped))
    for read in (read_archive, PromptGenerator.from_official):
        with pytest.raises(UserError, match=r"file\.pt"):
            read(path)
    assert not (tmp_path / "sprung").exists()


def pickled(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        out.writestr("archive/data.pkl", data)
        out.writestr("archive/version", b"3\n")
    return buffer.getvalue()


# each would take gigabytes or minutes
BOMBS = {
    "expanded": archive({"x": torch.zeros(()).expand(10**6, 10**6)}),
    "one storage, many tensors": archive(dict.fromkeys(range(200), STATE["a"])),
    "marks": pickled(b"\x80\x02" + b"(" * 2_000_000 + b"."),
    "compressed marks": pickled(b"\x80\x02" + b"(" * 50_000_000 + b".", zipfile.ZIP_DEFLATED),
    "compressed": pickled(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED),
    "endless bytearray": pickled(b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R."),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_do_not_take_much_memory(name, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(BOMBS[name])
    with pytest.raises(UserError, match=r"file\.pt"):
        read_archive(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"<!doctype html><html></html>", b"PK\x03\x04", os.urandom(3000), pickle.dumps(STATE)],
    ids=["empty", "html", "begin", "noise", "pickle"],
)
def test_files_that_are_none(data, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    for read in (read_archive, PromptGenerator.from_official):
        with pytest.raises(UserError, match=r"file\.pt") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)


@pytest.mark.timeout(20)
def test_entries_that_are_no_files(tmp_path):
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, folder, loop, tmp_path / "missing", "/dev/zero"):
        with pytest.raises(UserError, match=str(path)):
            PromptGenerator.from_official(path)


def test_sparse_file(tmp_path):
    path = tmp_path / "file.pt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="sparse"):
        read_archive(path)


def test_a_seal_is_a_comment_that_torch_reads_past():
    sealed = seal_archive(archive(STATE))
    found = torch.load(io.BytesIO(sealed), weights_only=True)
    assert torch.equal(found["a"], STATE["a"])
    assert zipfile.ZipFile(io.BytesIO(sealed)).testzip() is None


def test_numbers():
    check_numbers({"a": torch.ones(2), "mask": torch.tensor([-torch.inf])}, frozenset({"mask"}))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="'a' has 1 values that are not finite"):
            check_numbers({"a": torch.tensor([1.0, bad])})
    with pytest.raises(ValueError, match="variance"):
        check_numbers({"norm.running_var": torch.tensor([1.0, -1e-9])})
