"""Tasks of a folder as they answer without HTTP, and what keeps one out without harm to others."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from odd_images import encode
from serving import images
from starlette.testclient import TestClient
from test_serve_tasks import adapter_of, expected_logits, folder, save_task

import pgn_fast
from pgn_fast.backbone.load import load_backbone
from pgn_fast.errors import UserError
from pgn_fast.images import UnreadableImage
from pgn_fast.serve import ApiError, load_served_tasks
from pgn_fast.serve.admin import create_admin
from pgn_fast.serve.tasks import ServedTasks

__all__ = ["folder"]  # a fixture


def test_the_tasks_need_no_package_of_the_extra():
    code = (
        "import sys\n"
        "web = 'fastapi starlette uvicorn python_multipart prometheus_client'\n"
        "sys.modules.update(dict.fromkeys(web.split()))\n"
        "import pgn_fast.serve.triton\n"
        "from pgn_fast.serve import ApiError, ServedModel, ServedTasks, load_served_tasks\n"
        "try:\n"
        "    from pgn_fast.serve import create_app\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'pgn_fast[serve]'\" in str(error), error\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_answers_and_every(folder):
    tasks = load_served_tasks(folder, watch_s=0)
    pictures = images(4, (50, 40))
    names = ["deep", "pgn", "shallow", "probe"]
    right = {n: expected_logits(adapter_of(folder, n), pictures) for n in names}
    mixed = tasks.answer([encode(p) for p in pictures], names)
    for number, (name, found) in enumerate(zip(names, mixed, strict=True)):
        expected = right[name][number]
        assert (found - expected).abs().max() <= 1e-5 * right[name].abs().max()
    every = tasks.every(pictures)
    assert every.keys() == right.keys()
    for name, expected in right.items():
        assert (every[name] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tasks.every([])["pgn"].shape == (0, 5)
    assert tasks.labels("deep") == ["ant", "bee", "cat"]
    assert tasks.labels("shallow") == ["0", "1", "2", "3"]
    # nothing is held after an answer, whether it came or not
    for wrong in (["deep", "dep"], ["deep"]):
        with pytest.raises(
            (ApiError, ValueError), match=r"nearest are 'deep'|2 images and 1 tasks"
        ):
            tasks.answer(pictures[:2], wrong)
    with pytest.raises(UnreadableImage, match="image 1: "):
        tasks.answer([pictures[0], b"torn"], ["deep", "deep"])
    assert all(task.calls == 0 for task in tasks._tasks.values())


def test_a_folder_with_one_task_needs_no_name(folder):
    tasks = load_served_tasks(folder / "deep")
    (found,) = tasks.answer(images(1), [None])
    assert found.shape == (3,) and tasks.labels() == ["ant", "bee", "cat"]


def test_other_frozen_weights_are_refused_by_both_digests(folder, tmp_path, caplog):
    shutil.copytree(folder / "deep", tmp_path / "a")
    other = load_backbone("pgn_demo_vit")
    with torch.no_grad():
        other.blocks[2].attn.qkv.weight[0, 0] += 1
    save_task(tmp_path / "b", pgn_fast.VPT(other, 2, num_prompts=2))
    tasks = load_served_tasks(tmp_path, watch_s=0)
    assert list(tasks.tasks()) == ["a"]
    (reason,) = tasks.failed
    assert str(tmp_path / "b") in reason and reason.count("digest ") == 2
    assert reason in caplog.text
    with pytest.raises(UserError, match="digest"):
        tasks.add("b", tmp_path / "b")
    with pytest.warns(UserWarning, match="Results will differ"):
        lax = load_served_tasks(tmp_path, watch_s=0, strict_backbone=False)
    assert list(lax.tasks()) == ["a", "b"]


def test_the_settings_of_the_training_are_used(tmp_path):
    """The backbone of an adapter for 48 pixels, by its name and what it has recorded."""
    vit = load_backbone("test_vit", pretrained=False, img_size=48)
    model = pgn_fast.VPT(vit, 2, num_prompts=2)
    save_task(tmp_path / "task", model, input_size=(3, 48, 48))
    from pgn_fast.adapters.files import OpenAdapter
    from pgn_fast.serve import load

    with OpenAdapter(tmp_path / "task") as adapter:
        assert adapter.config["base_model_kwargs"]["img_size"] == [48, 48]
    found, name = load.recorded_backbone([tmp_path / "task"], pretrained=False)
    assert found.patch_embed.img_size == (48, 48) and name.startswith("test_vit")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("no memory"), MemoryError()])
def test_whatever_a_task_brings_about_the_others_are_served(
    folder, tmp_path, monkeypatch, caplog, error
):
    shutil.copytree(folder / "deep", tmp_path / "good")
    shutil.copytree(folder / "shallow", tmp_path / "bad")
    real = ServedTasks._load

    def load(self, name, place):
        if name == "bad":
            raise error
        return real(self, name, place)

    monkeypatch.setattr(ServedTasks, "_load", load)
    tasks = load_served_tasks(tmp_path, watch_s=0)
    assert list(tasks.tasks()) == ["good"]
    (reason,) = tasks.failed
    assert f"{tmp_path / 'bad'} fails with {type(error).__name__}" in reason
    with TestClient(create_admin(tasks), base_url="http://127.0.0.1") as admin:
        call = {"name": "bad", "source": str(tmp_path / "bad")}
        answer = admin.post("/v1/tasks", json=call)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_adapter")
        assert "fails with" in answer.json()["error"]["message"]
