"""Adapters that a stranger wrote, or a disk damaged: one ``UserError`` that names the folder, and
nothing is built, fetched or run before."""

from __future__ import annotations

import json
import os
import random
import struct
import warnings

import pytest
import safetensors.torch
import timm
import torch
from small_world import tiny_vit

import pgn_fast
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE, files, identity, load, read_adapter
from pgn_fast.adapters.header import read_header
from pgn_fast.errors import UserError
from pgn_fast.models import LinearProbe

DEEP = "[" * 100_000 + "]" * 100_000


def write(folder, config, tensors, *, carried=True, beside=True):
    """An adapter as a stranger writes it, whose digests are right."""
    config = files.sealed(config, tensors)
    text = json.dumps(config)
    folder.mkdir(exist_ok=True)
    weights = safetensors.torch.save(tensors, {"adapter_config": text} if carried else None)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    if beside:
        (folder / CONFIG_FILE).write_text(text)


@pytest.fixture
def saved(tmp_path):
    """Folder, configuration and tensors of a PGN on the packaged backbone."""
    folder = tmp_path / "adapter"
    model = pgn_fast.PGN("pgn_demo_vit", 4, num_prompts=2, library_size=4, resolution=32)
    model.save_pretrained(folder, class_names=list("abcd"))
    return folder, *read_adapter(folder)


def refused(folder, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        pgn_fast.from_pretrained(folder, **options)
    text = str(caught.value)
    assert str(folder) in text and len(text) < 1000 and text.isprintable()


WRONG = {
    "method": (["pgn"], "pgn-2", None, 7),
    "generator": (3, ["resnet10"], "no_such_network", "x" * 100_000, "hf-hub:x/y"),
    "generator_kwargs": ([1], {"channels": "16"}, {"blocks_per_group": 10**7}, {"x": 1}),
    "token_library": ("x", {}, {"server": 1}, [1]),
    "activation": (1, "relu", None),
    "resolution": (10**9, 0, -1, True, 32.5, "32"),
    "num_prompts": (0, -1, True, 10**12, "2", 2.0, None),
    "library_size": (0, 10**30, [4]),
    "num_classes": (-1, True, 10**12, 5),
    "head": (1, "x", ["linear"]),
    "logit_scale": (float("nan"), float("inf"), "100", 1e300),
    "fast": ([1], "x", {"x": True}, {"fold": 1}, 1),
    "backend": ("x", 1, ["cpu"]),
    "class_names": (7, "abcd", ["a"], [1, 2, 3, 4], {"0": "a"}),
    "preprocessing": ("x", {"input_size": 32}, {"input_size": [3, 10**9, 32]}, {"std": [0, 0, 0]}),
    "base_model_name_or_path": (
        *(
            "../../x",
            "/etc/passwd",
            "local-dir:x",
            "http://127.0.0.1:9/x",
            "a\x1b[31m",
            "x" * 10**5,
        ),
        *(3, "no_such_model", "resnet50", "swin_tiny_patch4_window7_224"),
    ),
    "base_model_kwargs": (
        *([1], {"pretrained_cfg": {}}, {"checkpoint_path": "x"}, {"cache_dir": "x"}),
        {"img_size": "x"},
    ),
    "embed_dim": ("128", 129, True),
    "depth": (7, None),
    "backbone_digest": ("x", 3),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_entries_of_other_types_and_sizes(name, value, saved, monkeypatch):
    """Edited by hand, where the two copies differ; and by someone who makes all digests right."""
    folder, config, tensors = saved
    monkeypatch.setattr(load, "_build", lambda *_: pytest.fail("the model was built"))
    (folder / CONFIG_FILE).write_text(json.dumps(config | {name: value}))
    refused(folder, "adapter")
    try:
        write(folder, config | {name: value}, tensors)
    except ValueError:
        pytest.skip("JSON has no such number")
    refused(folder, "adapter")


@pytest.mark.parametrize("text", ["[1]", "3", "null", DEEP, '{"a": ' + DEEP + "}", "{", "", "\xff"])
@pytest.mark.parametrize("carried", [True, False], ids=["inside", "beside"])
def test_configurations_that_are_none(text, carried, saved):
    folder, _, tensors = saved
    safetensors.torch.save_file(
        tensors, folder / WEIGHTS_FILE, {"adapter_config": text} if carried else None
    )
    if carried:
        (folder / CONFIG_FILE).unlink()
    else:
        (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    refused(folder, "adapter")


def test_an_entry_that_stands_twice(saved):
    folder, _, _ = saved
    path = folder / CONFIG_FILE
    path.write_text('{"num_prompts": 3,' + path.read_text()[1:])
    refused(folder, "num_prompts' stands there twice")


def test_a_configuration_of_gigabytes_is_not_read(saved):
    folder, _, _ = saved
    with open(folder / CONFIG_FILE, "wb") as file:
        file.truncate(60 << 20)
    refused(folder, "more than 4194304 bytes")


SIZES = {
    "num_prompts": {"num_prompts": 1_000_000},
    "library_size": {"library_size": 8_000_000},
    "num_classes": {"num_classes": 8_000_000, "class_names": None},
    "channels": {"generator_kwargs": {"channels": 8192, "groups": 8}},
    "a large generator": {"generator": "vit_giant_patch14_224", "generator_kwargs": {}},
    "a large backbone": {"base_model_name_or_path": "vit_giant_patch14_clip_224"},
    "a backbone of convolutions": {"base_model_name_or_path": "resnet50"},
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_held_against_the_tensors_before_memory_is_taken(name, saved, monkeypatch):
    folder, config, tensors = saved
    write(folder, config | SIZES[name], tensors)
    built = []

    def empty(*size, create=torch.empty, **options):
        if options.get("device") is None and torch.get_default_device().type != "meta":
            built.append(size)
        return create(*size, **options)

    def create_model(name, *, create=timm.create_model, pretrained=False, **options):
        assert not pretrained and torch.get_default_device().type == "meta"
        return create(name, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(files, "read_tensors", lambda *_: pytest.fail("the numbers were read"))
    refused(folder, "do not fit|does not fit|not a vision transformer")
    assert not built


def header(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return {"a": entry}


BAD_HEADERS = {
    "no object": [1],
    "no description": {"a": 3},
    "unknown dtype": header(dtype="C64"),
    "negative size": header(shape=[-2]),
    "truth value": header(shape=[True, 2]),
    "wrong size": header(shape=[3]),
    "product that overflows": header(shape=[2**40, 2**40]),
    "too many dimensions": header(shape=[1] * 9 + [2]),
    "offsets that end first": header(data_offsets=[8, 0]),
    "gap": header(data_offsets=[4, 12]),
    "beyond the file": header(shape=[4], data_offsets=[0, 16]),
    "data that belong to nobody": header(shape=[1], data_offsets=[0, 4]),
    "overlap": {**header(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "twice the same": {**header(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "further entry": header(code="x"),
    "long name": {"a" * 600: header()["a"]},
    "metadata of numbers": {**header(), "__metadata__": {"x": 1}},
    "metadata that are none": {**header(), "__metadata__": "x"},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers_that_cannot_be(name, saved):
    folder, _, _ = saved
    text = json.dumps(BAD_HEADERS[name]).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(folder, "not a safetensors file")


@pytest.mark.parametrize("length", [0, 1, 9, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(length, saved):
    folder, _, _ = saved
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + b'{"a":1}' + bytes(100))
    refused(folder, "not a safetensors file")


def test_many_tensors(saved):
    folder, _, _ = saved
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(i): empty for i in range(60_000)}).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, "lists 60000 tensors")


def test_what_is_read_is_what_the_library_reads(tmp_path):
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
    tensors = {str(i): torch.arange(5).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "x": torch.randn(2, 3, 4)}
    path = tmp_path / "file.safetensors"
    for metadata in (None, {"a": "b"}, {"a": "bcd"}):
        safetensors.torch.save_file(tensors, path, metadata)
        with open(path, "rb") as file:
            found = files.read_tensors(file, read_header(file, path))
        for name, expected in safetensors.torch.load_file(path).items():
            assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling", "device", "unreadable"])
def test_entries_that_are_no_files(name, kind, saved):
    folder, _, _ = saved
    path = folder / name
    if kind == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    if name == WEIGHTS_FILE:
        refused(folder, WEIGHTS_FILE)
    else:
        # the weights carry a copy
        assert pgn_fast.from_pretrained(folder).class_names == list("abcd")


def test_sparse_weights(saved):
    folder, _, _ = saved
    with open(folder / WEIGHTS_FILE, "r+b") as file:
        file.truncate(2 << 30)
    refused(folder, "sparse")


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("head.weight", lambda t: t * torch.nan, "head.weight' has .* not finite"),
        ("head.bias", lambda t: t / 0, "head.bias' has .* not finite"),
        ("prompter.generator.stem.1.running_var", lambda t: -t, "variance"),
        ("head.weight", lambda t: t.long(), "head.weight is torch.int64, not torch.float32"),
        ("head.weight", lambda t: t.bool(), "head.weight is torch.bool"),
        ("prompter.generator.stem.1.num_batches_tracked", lambda t: t.float(), "num_batches"),
        ("head.weight", lambda t: t[:2], r"head.weight is \[2, 128\], not \[4, 128\]"),
    ],
)
def test_tensors_that_no_training_leaves(name, change, match, saved):
    folder, config, tensors = saved
    tensors[name] = change(tensors[name]).contiguous()
    write(folder, config, tensors)
    refused(folder, match)


def test_tensors_that_lack_or_are_too_many_are_counted_not_listed(saved):
    folder, config, _ = saved
    write(folder, config, {f"x{i}" * 50: torch.zeros(1) for i in range(100)})
    refused(folder, r"missing: .*; and \d+ more")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_every_flipped_bit_is_noticed(name, saved):
    """Refused, or the whole copy is used and a warning says so."""
    folder, config, _ = saved
    path, rng = folder / name, random.Random(0)
    raw = path.read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little") if name == WEIGHTS_FILE else len(raw)
    places = [*rng.sample(range(header_end), 120), *rng.sample(range(len(raw)), 20)]
    for at in places:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found, _ = read_adapter(folder)
            except UserError as error:
                assert str(folder) in str(error)
                continue
        # whitespace of JSON may change into other whitespace
        assert found == config and (told or json.loads(damaged) == config)


def test_an_edited_entry_is_named_with_both_values(saved):
    folder, config, _ = saved
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"class_names": list("abcx")}))
    refused(folder, r"class_names' is \['a', 'b', 'c', 'x'\], and \['a', 'b', 'c', 'd'\] in")
    (folder / CONFIG_FILE).unlink()
    assert pgn_fast.from_pretrained(folder).class_names == list("abcd")


def test_a_damaged_copy_inside_is_told(saved):
    folder, config, tensors = saved
    text = json.dumps(config).replace('"softmax"', '"sigmoid"')
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, {"adapter_config": text})
    with pytest.warns(UserWarning, match="is damaged: its digest differs"):
        assert pgn_fast.from_pretrained(folder).prompter.activation == "softmax"


def test_unknown_entries_of_another_version_warn(saved):
    folder, config, tensors = saved
    changed = config | {"temperature": 2, "preprocessing": {**config["preprocessing"], "x": 1}}
    write(folder, changed, tensors)
    with pytest.warns(UserWarning, match="unknown entries are ignored: preprocessing: x, temper"):
        loaded = pgn_fast.from_pretrained(folder)
    assert "x" not in loaded.preprocessing


def test_one_file_alone_is_an_adapter(saved):
    folder, config, tensors = saved
    write(folder, config, tensors, carried=False)
    assert pgn_fast.from_pretrained(folder).num_prompts == 2
    write(folder, config, tensors)
    (folder / CONFIG_FILE).unlink()
    assert pgn_fast.from_pretrained(folder).num_prompts == 2


def test_a_backbone_of_one_s_own_weights_is_asked_for(tmp_path):
    """The file is named, not opened: a stranger's adapter may name any."""
    weights = tmp_path / "company.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), weights)
    vit = pgn_fast.backbone.load.load_backbone(
        "test_vit", pretrained=False, checkpoint_path=str(weights)
    )
    LinearProbe(vit, 3)
    pgn_fast.VPT(vit, 3, num_prompts=1).save_pretrained(tmp_path / "adapter")
    config, _ = read_adapter(tmp_path / "adapter")
    assert config["base_model_name_or_path"] == "test_vit"
    assert config["base_model_weights"] == "company.safetensors"
    assert str(tmp_path) not in (tmp_path / "adapter" / CONFIG_FILE).read_text()
    refused(tmp_path / "adapter", r"weights of its owner \('company\.safetensors'\).*backbone")
    pgn_fast.from_pretrained(tmp_path / "adapter", vit, strict_backbone=True)


def test_settings_that_built_the_backbone_are_recorded(tmp_path):
    for kwargs in ({"global_pool": "avg"}, {"img_size": 64, "dynamic_img_size": True}, {}):
        vit = timm.create_model("test_vit", **kwargs)
        pgn_fast.VPT(vit, 3, num_prompts=1).save_pretrained(tmp_path)
        recorded = read_adapter(tmp_path)[0]["base_model_kwargs"]
        rebuilt = identity.on_meta_by_name("test_vit", **(recorded or {}))
        assert identity.facts(rebuilt) == identity.facts(vit)
        assert (recorded is None) == (not kwargs)


def test_build_takes_what_read_adapter_gave(saved):
    folder, config, tensors = saved
    backbone = pgn_fast.from_pretrained(folder).backbone
    model = pgn_fast.adapters.build(config, tensors, backbone)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), pgn_fast.from_pretrained(folder)(images))
    with pytest.raises(UserError, match="do not fit"):
        pgn_fast.adapters.build(config | {"num_prompts": 3}, tensors, backbone)
    with pytest.raises(UserError, match="does not fit"):
        pgn_fast.adapters.build(config, tensors, tiny_vit())
