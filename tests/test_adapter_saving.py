"""Whatever is built can be saved and gives the same outputs afterwards, or is refused before any
training; saves are equal to the byte and do not disturb each other."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small_world import tiny_vit
from torch import nn

import pgn_fast
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter, save_pretrained
from pgn_fast.errors import UserError
from pgn_fast.models import FineTuned, LinearProbe

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()
SMALL = {"num_prompts": 2, "library_size": 4, "resolution": 16}


def pgn(**changes):
    return pgn_fast.PGN(tiny_vit(num_classes=3), **{"num_classes": 3, **SMALL, **changes}).eval()


def vpt(**changes):
    options = {"num_classes": 3, "num_prompts": 2}
    return pgn_fast.VPT(tiny_vit(num_classes=3), **options | changes).eval()


def assert_comes_back(model, folder, exact=True, **modules):
    save_pretrained(model, folder)
    again = pgn_fast.from_pretrained(folder, tiny_vit(num_classes=3), **modules)
    with torch.no_grad():
        before, after = model(IMAGES), again(IMAGES)
    assert torch.equal(before, after) if exact else torch.allclose(before, after, atol=1e-5)
    return again


heads = st.sampled_from(["linear", "keep", "zero_shot", "none"])
shared = {
    "head": heads,
    "fast": st.sampled_from([True, False, "min", {"fold": False}]),
    "logit_scale": st.floats(0.5, 200),
}
pgns = st.fixed_dictionaries(
    {
        **shared,
        "num_prompts": st.integers(1, 4),
        "library_size": st.integers(1, 6),
        "generator": st.sampled_from(["resnet10", "test_resnet"]),
        "resolution": st.integers(16, 40),
        "activation": st.sampled_from(["softmax", "sigmoid"]),
    }
)
vpts = st.fixed_dictionaries(
    {
        **shared,
        "num_prompts": st.integers(1, 3),
        "layers": st.sampled_from([None, [0], [1], range(2), {0, 1}, np.array([1]), (0, 1)]),
        "shared": st.booleans(),
        "expand": st.booleans(),
        "project_dim": st.sampled_from([None, 1, 5]),
        "dropout": st.sampled_from([0.0, 0.3, np.float32(0.5)]),
        "pool": st.sampled_from(["original", "img_pool"]),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from([pgn, vpt]), data=st.data(), name=st.text(max_size=300))
def test_every_method_head_and_option_comes_back(kind, data, name):
    options = dict(data.draw(pgns if kind is pgn else vpts))
    head = options.pop("head")
    if head == "zero_shot":
        options |= {"head": head, "num_classes": None, "class_embeddings": torch.randn(3, 32)}
    elif head != "none":
        options["head"] = head
    else:
        options["num_classes"] = 0
    model = kind(**options)
    if head != "none":
        model.class_names = [name, "b", "c"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        again = assert_comes_back(model, folder, exact=False)
    if head != "none":
        assert again.class_names == [name, "b", "c"]


NUMBERS = {
    "logit_scale of a tensor": {
        "head": "zero_shot",
        "num_classes": None,
        "class_embeddings": torch.ones(3, 32),
        "logit_scale": nn.Parameter(torch.tensor(4.6)).exp(),
    },
    "layers of a tensor": {"layers": torch.tensor([1, 0])},
    "layers of NumPy's numbers": {"layers": [np.int64(1)]},
    "dropout of NumPy": {"dropout": np.float32(0.25)},
    "shared of NumPy": {"shared": np.bool_(True)},
    "num_prompts of NumPy": {"num_prompts": np.int32(3)},
    "fast of NumPy": {"fast": {"fold": np.bool_(False)}},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_libraries_become_plain(name, tmp_path):
    assert_comes_back(vpt(**NUMBERS[name]), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": torch.zeros(2)},
        {"dropout": 1j},
        {"deep": "false"},
        {"deep": 1},
        {"shared": "yes"},
        {"layers": "01"},
        {"layers": [0.5]},
        {"logit_scale": float("nan")},
        {"num_prompts": True},
        {"num_prompts": 2.0},
        {"project_dim": object()},
        {"fast": {"unheard": True}},
    ],
    ids=str,
)
def test_what_could_not_be_saved_is_refused_when_it_is_built(changes):
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        vpt(**changes)


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "dog", "fox"],
        {2: "fox", 0: "cat", 1: "dog"},
        {"1": "dog", "0": "cat", "2": "fox"},
        {"fox": 2, "cat": 0, "dog": 1},
        {np.int64(0): "cat", np.int64(1): "dog", np.int64(2): "fox"},
        np.array(["cat", "dog", "fox"]),
        iter(("cat", "dog", "fox")),
        {"cat": 0, "dog": 1, "fox": 2}.keys(),
    ],
    ids=lambda names: type(names).__name__,
)
def test_class_names_come_in_label_order(names, tmp_path):
    vpt().save_pretrained(tmp_path, class_names=names)
    assert read_adapter(tmp_path)[0]["class_names"] == ["cat", "dog", "fox"]


@pytest.mark.parametrize(
    "names",
    [
        *("cat", b"cat", {"cat", "dog", "fox"}, {0: "cat", 1: "dog"}, {0: "a", 1: "b", 3: "c"}),
        *(3, {"a": 0, "b": 0, "c": 1}, {0.5: "a"}),
        *(["a", "b", None], ["a", "b"], [["a"], ["b"], ["c"]]),
    ],
    ids=str,
)
def test_class_names_that_are_none(names, tmp_path):
    with pytest.raises(ValueError, match="class_names"):
        vpt().save_pretrained(tmp_path, class_names=names)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.out = nn.Linear(32, 3)

    def forward(self, x):
        return self.out(self.second(self.first(x).relu()))


def test_weights_that_layers_share_stay_shared(tmp_path):
    again = assert_comes_back(vpt(head=Tied()), tmp_path, head=Tied())
    assert again.head.first.weight is again.head.second.weight


@pytest.mark.parametrize("part", ["generator", "head", "prompter", "model"])
def test_compiled_parts_are_saved_by_their_own_names(part, tmp_path):
    model = pgn()
    compiled = lambda module: torch.compile(module, backend="eager")
    if part == "generator":
        model.prompter.generator = compiled(model.prompter.generator)
    elif part != "model":
        setattr(model, part, compiled(getattr(model, part)))
    save_pretrained(compiled(model) if part == "model" else model, tmp_path)
    assert not [name for name in read_adapter(tmp_path)[1] if "_orig_mod" in name]
    plain = pgn_fast.from_pretrained(tmp_path, tiny_vit(num_classes=3))
    with torch.no_grad():
        assert torch.allclose(plain(IMAGES), model(IMAGES), atol=1e-5)
    # and into a model whose parts are compiled
    model.load_adapter_state_dict(plain.adapter_state_dict())


def test_trained_parts_inside_the_backbone_are_not_lost_in_silence(tmp_path):
    """As LoRA puts them there: an adapter does not hold them."""
    for model in (vpt(), LinearProbe(tiny_vit(), 3)):
        block = model.backbone.blocks[0]
        block.mlp.fc1 = nn.Sequential(block.mlp.fc1, nn.Linear(128, 128))
        with pytest.raises(ValueError, match=r"2 parameters inside the backbone.*blocks\.0\.mlp"):
            save_pretrained(model, tmp_path)
        assert not list(tmp_path.iterdir())
    save_pretrained(FineTuned(tiny_vit(), 3), tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_model_is_not_saved(bad, tmp_path):
    model = vpt()
    with torch.no_grad():
        model.head.weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"head\.weight' has 1 values that are not finite"):
        model.save_pretrained(tmp_path)


def test_masks_in_a_head_of_one_s_own_may_be_infinite(tmp_path):
    def head():
        layer = nn.Linear(32, 3)
        layer.register_buffer("mask", torch.full((3,), -torch.inf))
        return nn.Sequential(layer)

    assert_comes_back(vpt(head=head()), tmp_path, head=head())


def test_equal_models_give_equal_bytes(tmp_path):
    model = pgn()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    code = (
        "import safetensors.torch as s, sys, hashlib; t = {'a': __import__('torch').zeros(2)};"
        "from pgn_fast.adapters import files; c = files.sealed({'x': 1}, t);"
        "print(hashlib.sha256(s.save(t, {files.CARRIED: str(c)})).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout


def test_many_may_save_into_one_folder(tmp_path):
    """Threads, as ranks do on one machine; each file is one writer's, nothing is left over."""
    model, failed = vpt(), []

    def rank():
        for _ in range(10):
            try:
                model.save_pretrained(tmp_path)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    pgn_fast.from_pretrained(tmp_path, tiny_vit(num_classes=3))


def test_a_folder_that_cannot_be_written_is_named_itself(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        vpt().save_pretrained(tmp_path / "file" / "adapter")
    assert ".tmp" not in str(caught.value)


def test_a_module_of_one_s_own_is_copied_to_compare_shapes_not_touched(tmp_path):
    vpt(head=Tied()).save_pretrained(tmp_path)
    head = Tied()
    pgn_fast.from_pretrained(tmp_path, tiny_vit(num_classes=3), head=head)
    assert not any(p.is_meta for p in head.parameters())
    with pytest.raises(UserError, match="do not fit"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit(num_classes=3), head=nn.Linear(32, 3))
