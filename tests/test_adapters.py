"""Adapters on disk: what is in them, that a save is all or nothing, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import warnings

import pytest
import safetensors.torch
import timm
import torch
from small_world import MODEL, tiny_vit
from torch import nn

import pgn_fast
from pgn_fast import _files
from pgn_fast.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    identity,
    load,
    read_adapter,
    save_pretrained,
)
from pgn_fast.errors import UserError
from pgn_fast.models.baselines import FineTuned, LinearProbe

IMAGES = torch.linspace(-2, 2, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16).sin()


def pgn(backbone, **changes):
    options = {"num_prompts": 3, "library_size": 8, "resolution": 16}
    options["generator_kwargs"] = {"channels": 4, "groups": 2}
    return pgn_fast.PGN(backbone, 5, **options | changes)


def vpt(backbone, **changes):
    return pgn_fast.VPT(backbone, 5, **{"num_prompts": 3} | changes)


MODELS = {
    "pgn": pgn,
    "pgn-sigmoid": lambda b: pgn(b, activation="sigmoid", num_prompts=2),
    "pgn-ready-generator": lambda b: pgn_fast.PGN(
        b,
        5,
        generator=pgn_fast.PromptGenerator(
            32, num_prompts=2, library_size=8, generator_kwargs={"channels": 4, "max_pool": False}
        ),
    ),
    "pgn-zero-shot": lambda b: pgn_fast.PGN(
        b,
        num_prompts=2,
        library_size=8,
        resolution=16,
        head="zero_shot",
        class_embeddings=torch.randn(5, 32),
        logit_scale=20.0,
    ),
    "pgn-kept-head": lambda b: pgn_fast.PGN(
        b, num_prompts=2, library_size=8, resolution=16, head="keep"
    ),
    "vpt-deep": vpt,
    "vpt-shallow": lambda b: vpt(b, deep=False),
    "vpt-projected": lambda b: vpt(b, project_dim=6, dropout=0.3, shared=True),
    "vpt-last-block": lambda b: vpt(b, layers=range(1, 2), expand=False, pool="img_pool"),
    "vpt-add": lambda b: vpt(b, location="add"),
    "vpt-below": lambda b: vpt(b, location="below", num_prompts=1),
    "linear": lambda b: LinearProbe(b, 5),
    "full": lambda b: FineTuned(b, 5),
}


def step_once(model):
    """One step, so that nothing that is trained, BatchNorm's statistics included, is as built."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).zero_grad()
    model(IMAGES).square().mean().backward()
    with torch.no_grad():
        for p in trained:
            p -= 0.1 * p.grad
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_every_bit(name, tmp_path):
    classes = 5 if name == "pgn-kept-head" else 0
    model = step_once(MODELS[name](tiny_vit(num_classes=classes)))
    # with gradients the fast path may add up in another order
    with torch.no_grad():
        before = model(IMAGES)
    pgn_fast.adapters.save_pretrained(model, tmp_path, class_names=list("abcde"))
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pgn_fast.from_pretrained(tmp_path, tiny_vit(num_classes=classes))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IMAGES), before)
    assert loaded.class_names == list("abcde")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    usual = {"pgn": "pgn", "vpt": "vpt-deep"}.get(name[:3], name)
    assert config["method"] == ("vpt-shallow" if name == "vpt-shallow" else usual)
    assert config["preprocessing"]["input_size"] == [3, 16, 16]


def test_only_what_was_trained_is_saved(tmp_path):
    pgn(tiny_vit()).save_pretrained(tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / WEIGHTS_FILE))
    assert not [n for n in names if n.startswith("backbone.")]
    assert {"prompter.token_library", "head.weight", "head.bias"} <= names
    assert "prompter.generator.stem.1.running_var" in names


def test_trainable_goes_on_training(tmp_path):
    pgn(tiny_vit()).save_pretrained(tmp_path)
    model = pgn_fast.from_pretrained(tmp_path, tiny_vit(), trainable=True)
    assert model.training and not model.backbone.training
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith("backbone.")}


def test_vpt_shallow_on_vit_small_is_under_100_kb(tmp_path):
    backbone = timm.create_model("vit_small_patch16_224", pretrained=False)
    pgn_fast.VPT(backbone, 10, num_prompts=5, deep=False).save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"].startswith("vit_small_patch16_224.")
    assert (config["embed_dim"], config["depth"], config["patch_size"]) == (384, 12, [16, 16])


def save_and_die(model, folder, at):
    """Save in a child process that dies, cleaning nothing up, at its ``at``-th system call.

    Returns:
        False when the save was over before that.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == at:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        _files.os.fsync, _files.os.replace = counted(os.fsync), counted(os.replace)
        pgn_fast.adapters.save_pretrained(model, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# a fork of a process with threads is safe here: the child only writes files
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_killed_save_leaves_the_old_or_the_new_adapter_whole(tmp_path):
    old, new = vpt(tiny_vit()), vpt(tiny_vit(), num_prompts=4)
    with torch.no_grad():
        logits = {3: old.eval()(IMAGES), 4: new.eval()(IMAGES)}
    seen = []
    for at in range(1, 20):
        folder = tmp_path / str(at)
        old.save_pretrained(folder)
        died = save_and_die(new, folder, at)
        found = pgn_fast.from_pretrained(folder, tiny_vit())
        assert torch.equal(found(IMAGES), logits[found.num_prompts])
        seen.append(found.num_prompts)
        # and the next save is not disturbed by what the dead one left
        old.save_pretrained(folder)
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
        if not died:
            break
    assert not died and seen[0] == 3 and seen == sorted(seen) and seen[-2:] == [4, 4]


@pytest.mark.parametrize("at", [1, 2])
def test_full_disk_leaves_the_old_adapter_whole(tmp_path, monkeypatch, at):
    vpt(tiny_vit()).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = iter(range(1, 9))

    def full(descriptor):
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        vpt(tiny_vit(), num_prompts=4).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "changes, entry, found, wanted",
    [
        ({"embed_dim": 48, "num_heads": 3}, "embed_dim", "48", "32"),
        ({"depth": 3}, "depth", "3", "2"),
        ({"patch_size": 4}, "patch_size", "[4, 4]", "[8, 8]"),
    ],
    ids=["width", "depth", "patch"],
)
def test_wrong_backbone_is_refused_with_both_values(tmp_path, changes, entry, found, wanted):
    vpt(tiny_vit()).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        pgn_fast.from_pretrained(tmp_path, tiny_vit(**changes))
    assert f"{entry} is {found}" in str(caught.value) and f"{entry} {wanted}" in str(caught.value)


CHANGES = {
    "weights": (
        lambda: tiny_vit(seed=1),
        r"its weights \(.*digest [0-9a-f]{12}\).*digest [0-9a-f]",
    ),
    "pooling": (lambda: tiny_vit(global_pool="avg"), "global_pool is 'avg', not 'token'"),
    "image size": (lambda: tiny_vit(img_size=32), r"img_size is \[32, 32\], not \[16, 16\]"),
    "registers": (lambda: tiny_vit(reg_tokens=2), "num_prefix_tokens is 3, not 1"),
    "class token": (
        lambda: tiny_vit(class_token=False, global_pool="avg"),
        "class_token is False, not True",
    ),
    "precision": (lambda: tiny_vit().bfloat16(), "its weights are bfloat16, not 'float32'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_backbone_of_the_same_shape_is_told(name, tmp_path):
    """One of other weights or settings, whatever its name: a warning that names both, or refused
    where the user wants it so."""
    vpt(tiny_vit()).save_pretrained(tmp_path)
    make, text = CHANGES[name]
    with pytest.warns(UserWarning, match=text):
        pgn_fast.from_pretrained(tmp_path, make())
    with pytest.raises(UserError, match=text) as caught:
        pgn_fast.from_pretrained(tmp_path, make(), strict_backbone=True)
    assert str(tmp_path) in str(caught.value)


def test_the_same_backbone_is_not_told_of(tmp_path):
    """Its own classifier does not matter where the adapter has a head, nor gradients and mode."""
    vpt(tiny_vit()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backbone in (tiny_vit(), tiny_vit().train(), tiny_vit().requires_grad_(False)):
            pgn_fast.from_pretrained(tmp_path, backbone, strict_backbone=True)
        other = tiny_vit()
        other.reset_classifier(0)
        pgn_fast.from_pretrained(tmp_path, other, strict_backbone=True)


def test_truncated_and_damaged_weights_are_refused(tmp_path):
    vpt(tiny_vit()).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            pgn_fast.from_pretrained(tmp_path, tiny_vit())
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="digests differ"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare-pickle"])
def test_pickle_in_disguise_is_refused_unread(tmp_path, zipped):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    vpt(tiny_vit()).save_pretrained(tmp_path)
    torch.save(Trap(), tmp_path / WEIGHTS_FILE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is a pickle"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit())
    assert not (tmp_path / "sprung").exists()


def test_every_length_of_header_loads(tmp_path):
    """The first byte of a safetensors file is the low byte of its header's length, a multiple of 8:
    in one file of 32 it is 0x80, with which pickles begin as well."""
    model, backbone = vpt(tiny_vit()), tiny_vit()
    seen = set()
    for length in range(1, 257):
        names = ["a" * length, *"bcde"]
        model.save_pretrained(tmp_path, class_names=names)
        seen.add((tmp_path / WEIGHTS_FILE).read_bytes()[0])
        assert read_adapter(tmp_path)[0]["class_names"] == names
        if seen == set(range(0, 256, 8)):
            break
    assert seen == set(range(0, 256, 8))
    assert pgn_fast.from_pretrained(tmp_path, backbone).class_names == names


def test_config_of_another_adapter_does_not_count(tmp_path):
    vpt(tiny_vit()).save_pretrained(tmp_path / "a")
    vpt(tiny_vit(), num_prompts=4).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / CONFIG_FILE).write_bytes((tmp_path / "a" / CONFIG_FILE).read_bytes())
    with pytest.warns(UserWarning, match="configuration inside the weights file is used"):
        assert pgn_fast.from_pretrained(tmp_path / "b", tiny_vit()).num_prompts == 4


def test_unknown_entries_warn(tmp_path):
    vpt(tiny_vit()).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 2}))
    with pytest.warns(UserWarning, match="unknown entries are ignored: temperature"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit())


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        pgn_fast.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"has no {WEIGHTS_FILE}"):
        pgn_fast.from_pretrained(tmp_path)
    vpt(tiny_vit()).save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit())


def test_modules_of_ones_own_are_brought_again(tmp_path):
    head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    model = vpt(tiny_vit(num_classes=0), head=head).eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    bare = tiny_vit(num_classes=0)
    with pytest.raises(UserError, match=r"head was a torch\.nn.*Sequential.*head=\.\.\."):
        pgn_fast.from_pretrained(tmp_path, bare)
    fresh = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    loaded = pgn_fast.from_pretrained(tmp_path, bare, head=fresh)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    with pytest.raises(UserError, match="generator cannot be given"):
        pgn_fast.from_pretrained(tmp_path, bare, generator=fresh)


def test_backbone_is_found_by_its_name(tmp_path, monkeypatch):
    vpt(tiny_vit()).save_pretrained(tmp_path)
    asked = []

    def load_recorded(name, *, pretrained=True, **kwargs):
        asked.append((name, pretrained, kwargs))
        return tiny_vit().requires_grad_(False)

    for module in (identity, load):
        monkeypatch.setattr(module, "load_recorded", load_recorded)
    pgn_fast.from_pretrained(tmp_path)
    # first its shapes, without memory or network, then its weights
    named = f"{MODEL}.augreg_in21k_ft_in1k"
    assert asked == [(named, False, {"img_size": [16, 16]}), (named, True, {"img_size": [16, 16]})]


@pytest.mark.parametrize("name", ["linear", "full", "vpt-deep", "pgn"])
def test_a_head_that_was_exchanged_is_the_one_that_is_saved(name, tmp_path):
    model = MODELS[name](tiny_vit()).eval()
    model.head = nn.Linear(32, 7)
    # without gradients, as a loaded adapter is: the faster kernels round in another order
    model.requires_grad_(False)
    save_pretrained(model, tmp_path)
    loaded = pgn_fast.from_pretrained(tmp_path, tiny_vit())
    assert loaded.num_classes == 7
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_heads_that_no_configuration_describes(tmp_path):
    probe = LinearProbe(tiny_vit(), 5)
    probe.head = nn.Sequential(nn.Linear(32, 5))
    with pytest.raises(ValueError, match=r"LinearProbe is a Sequential.*nn\.Linear\(32, C\)"):
        save_pretrained(probe, tmp_path)
    model = vpt(tiny_vit()).eval()
    model.head = nn.Sequential(nn.Linear(32, 6))
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"head was a torch\.nn"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit())
    brought = pgn_fast.from_pretrained(tmp_path, tiny_vit(), head=nn.Sequential(nn.Linear(32, 6)))
    assert brought.num_classes == 6
    assert torch.equal(brought(IMAGES), model(IMAGES))
    # taken off altogether: pooled features
    model = vpt(tiny_vit())
    model.head = nn.Identity()
    model.save_pretrained(tmp_path)
    assert pgn_fast.from_pretrained(tmp_path, tiny_vit())(IMAGES).shape == (3, 32)


def test_names_and_pixels_are_kept_and_must_fit(tmp_path):
    model, names = vpt(tiny_vit()), [f"class {c}" for c in range(5)]
    pixels = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3)}
    model.save_pretrained(tmp_path, class_names=names, preprocessing=pixels)
    loaded = pgn_fast.from_pretrained(tmp_path, tiny_vit())
    assert loaded.class_names == names
    assert loaded.preprocessing == {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3]}
    with pytest.raises(ValueError, match="class_names has 4 names, the head gives 5 classes"):
        model.save_pretrained(tmp_path, class_names=names[1:])
    loaded.head = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"5 names, the head gives 7 classes.*class_names = None"):
        loaded.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [LinearProbe, FineTuned])
def test_baselines_take_half_precision_backbones(kind):
    """The head is float32 there, as everything that is trained in front of a frozen backbone."""
    model = kind(tiny_vit().to(torch.bfloat16), 5).eval()
    logits = model(IMAGES.to(torch.bfloat16))
    exact = kind(tiny_vit(), 5).eval()
    exact.head = model.head
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, exact(IMAGES), atol=0.05)
