"""Keyword arguments of a generator: settings of an architecture pass, resources and code do not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from small_world import tiny_vit

import pgn_fast
from pgn_fast.adapters import CONFIG_FILE
from pgn_fast.errors import UserError

SMALL = {"num_prompts": 2, "library_size": 4, "resolution": 32}
# what timm 1.0.20 to 1.0.31 would open, fetch, write, run, or build something else from
RESOURCES = {
    "pretrained": True,
    "checkpoint_path": "x.bin",
    "cache_dir": "drop",
    "pretrained_cfg": {"file": "x.bin"},
    "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.py", "source": "url"},
    "features_only": True,
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "num_classes": 7,
    "block_fn": "os.system",
    "img_size": "../../x",
    "act_layer": "http://x",
    "norm_layer": {"type": "x"},
    "layers": [1] * 1000,
    "in_chans": True,
    "drop_rate": 1.5,
    "drop_path_rate": "0.1",
    "base_width": 10**12,
}


@pytest.fixture
def nothing_is_asked(monkeypatch):
    """Fail where timm is asked to build anything."""

    def create_model(*args, **kwargs):
        raise AssertionError(f"timm was asked for {args} {kwargs}")

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize("name", RESOURCES)
def test_a_stored_generator_names_settings_only(name, tmp_path, nothing_is_asked):
    pgn_fast.PGN("pgn_demo_vit", 3, **SMALL).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    config |= {"generator": "resnet10t", "generator_kwargs": {name: RESOURCES[name]}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"generator_kwargs: '?{name}") as caught:
        pgn_fast.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [{"generator": 3}, {"generator_kwargs": [1]}, {"generator": ["resnet10"]}],
    ids=["number", "list of arguments", "list"],
)
def test_a_stored_generator_of_another_type(changes, tmp_path):
    pgn_fast.PGN("pgn_demo_vit", 3, **SMALL).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="generator"):
        pgn_fast.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", sorted(set(RESOURCES) - {"pretrained", "checkpoint_path", "cache_dir"})
)
def test_what_cannot_be_recorded_is_refused_when_it_is_built(name):
    with pytest.raises((TypeError, ValueError), match=r"generator_kwargs.*timm\.create_model"):
        pgn_fast.PromptGenerator(
            8, **SMALL, generator="resnet10t", generator_kwargs={name: RESOURCES[name]}
        )


def test_first_weights_come_from_where_the_user_says(tmp_path):
    """Where weights come from is for one's own code; the saved model holds what became of them."""
    weights = tmp_path / "weights.pt"
    torch.manual_seed(3)
    source = timm.create_model("resnet10t", num_classes=8)
    torch.save(source.state_dict(), weights)
    kwargs = {"checkpoint_path": weights, "stem_width": np.int64(32)}
    model = pgn_fast.PGN(
        tiny_vit(), 3, **SMALL, generator="resnet10t", generator_kwargs=kwargs
    ).eval()
    assert torch.equal(model.prompter.generator.fc.weight, source.fc.weight)
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert stored["generator_kwargs"] == {"stem_width": 32}
    weights.unlink()
    loaded = pgn_fast.from_pretrained(tmp_path / "adapter", tiny_vit())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "kwargs",
    [{"channels": True}, {"groups": 9}, {"blocks_per_group": 10**7}, {"max_pool": 1}, {"x": 1}],
)
def test_resnet10_takes_its_own_sizes(kwargs):
    with pytest.raises(ValueError, match=f"generator_kwargs: '?{next(iter(kwargs))}"):
        pgn_fast.PromptGenerator(8, **SMALL, generator_kwargs=kwargs)


def test_generator_is_a_name_or_a_module():
    with pytest.raises(TypeError, match="a name or a module"):
        pgn_fast.PromptGenerator(8, **SMALL, generator=lambda images: images)
