"""Trained tasks behind the API: their numbers, their names, and their coming and going."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import random
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import encode
from serving import as_json, connect, guarded, images, serving
from starlette.testclient import TestClient
from timm.data import create_transform

import pgn_fast
from pgn_fast import cli
from pgn_fast.adapters import from_pretrained, save_pretrained
from pgn_fast.backbone.load import load_backbone
from pgn_fast.client import Prediction, ServerError, TaskClient
from pgn_fast.errors import UserError
from pgn_fast.models.baselines import FineTuned, LinearProbe
from pgn_fast.serve import ApiError, ServerSettings, create_app, load_served_tasks
from pgn_fast.serve.admin import create_admin
from pgn_fast.serve.metrics import Metrics
from pgn_fast.serve.task_folder import TaskFolder

PIXELS = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}


def save_task(folder: Path, model, names: list[str] | None = None, **pixels) -> Path:
    save_pretrained(model, folder, class_names=names, preprocessing=PIXELS | pixels)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four methods, with classes and preprocessing of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    backbone = load_backbone("pgn_demo_vit")
    torch.manual_seed(0)
    generator = {"channels": 8, "groups": 4, "blocks_per_group": 1}
    models = {
        "deep": pgn_fast.VPT(backbone, 3, num_prompts=4),
        "shallow": pgn_fast.VPT(backbone, 4, num_prompts=2, deep=False),
        "pgn": pgn_fast.PGN(
            backbone, 5, num_prompts=3, library_size=7, resolution=32, generator_kwargs=generator
        ),
        "probe": LinearProbe(backbone, 6),
    }
    for model in models.values():
        torch.nn.init.normal_(model.head.weight)
    save_task(folder / "deep", models["deep"], ["ant", "bee", "cat"])
    save_task(folder / "shallow", models["shallow"], crop_pct=1.0, mean=(0.1, 0.2, 0.3))
    # a training run keeps its best adapter in a folder of its own
    save_task(folder / "pgn" / "best", models["pgn"], list("vwxyz"), interpolation="bilinear")
    save_task(folder / "probe", models["probe"], crop_mode="squash")
    (folder / ".hidden").mkdir()
    (folder / "notes").mkdir()
    (folder / "README.txt").write_text("not a task")
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    return load_served_tasks(folder, watch_s=0)


@pytest.fixture(scope="module")
def client(tasks):
    with TestClient(create_app(tasks)) as client:
        yield client


def expected_logits(adapter: Path, pictures) -> torch.Tensor:
    model = from_pretrained(adapter, "pgn_demo_vit")
    pixels = {k: model.preprocessing[k] for k in PIXELS}
    transform = create_transform(**pixels, is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(picture) for picture in pictures]))


def adapter_of(folder: Path, task: str) -> Path:
    return folder / task / "best" if task == "pgn" else folder / task


def values_of(answer) -> torch.Tensor:
    body = answer.json()
    if body["encoding"] == "json":
        return torch.tensor(body["values"])
    flat = np.frombuffer(base64.b64decode(body["values"]), "<f4").copy()
    return torch.from_numpy(flat).reshape(body["shape"])


# numbers


@pytest.mark.parametrize("task, classes", [("deep", 3), ("shallow", 4), ("pgn", 5), ("probe", 6)])
@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_a_task_answers_what_its_model_says(client, folder, task, classes, encoding):
    pictures = images(3, (50, 40))
    call = as_json([encode(picture) for picture in pictures], task=task, encoding=encoding)
    answer = client.post("/v1/predict", json=call)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = expected_logits(adapter_of(folder, task), pictures)
    assert (body["task"], body["output"], body["shape"]) == (task, "logits", [3, classes])
    assert (values_of(answer) - expected).abs().max() <= 1e-5 * expected.abs().max()

    names = {"deep": ["ant", "bee", "cat"], "pgn": list("vwxyz")}.get(task)
    for logits, ranked in zip(expected, body["predictions"], strict=True):
        assert len(ranked) == min(5, classes)
        order = logits.argsort(descending=True).tolist()[:5]
        assert [each["index"] for each in ranked] == order
        assert [each["label"] for each in ranked] == [
            str(i) if names is None else names[i] for i in order
        ]
        probabilities = [each["probability"] for each in ranked]
        assert probabilities == pytest.approx(logits.softmax(0)[order].tolist(), rel=1e-4)


def test_tasks_mixed_in_one_batch_keep_their_numbers(tasks, folder):
    """30 calls of 1 to 3 images for four tasks with three preprocessings, run as one batch."""
    rng = random.Random(0)
    calls, expected, targets = [], [], []
    for number in range(30):
        name = rng.choice(["deep", "shallow", "pgn", "probe"])
        pictures = images(rng.randint(1, 3), (40, 44), seed=number)
        target = tasks.target(name, "logits")
        targets.append(target)
        calls.append(([target.preprocessing.geometry(p) for p in pictures], target.key))
        expected.append(expected_logits(adapter_of(folder, name), pictures))
    for result, right in zip(tasks.run(calls), expected, strict=True):
        assert (result - right).abs().max() <= 1e-5 * right.abs().max()
    for target in targets:
        tasks.release(target)


def test_concurrent_calls_of_all_tasks_get_their_own_answers(client, folder):
    names = ["deep", "shallow", "pgn", "probe"]
    encoded = [encode(picture) for picture in images(4, (40, 40))]
    alone = {
        name: values_of(client.post("/v1/predict", json=as_json(encoded, task=name)))
        for name in names
    }

    def call(number: int) -> None:
        name, image = names[number % 4], number % 3
        answer = client.post("/v1/predict", json=as_json(encoded[image : image + 1], task=name))
        assert answer.json()["task"] == name
        torch.testing.assert_close(values_of(answer)[0], alone[name][image], rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(64)))


# asking


def test_a_missing_task_is_told_how_to_ask(client):
    answer = client.post("/v1/predict", json=as_json([b"x"]))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "task_missing")
    assert '"task":' in error["message"] and "-F task=NAME" in error["message"]
    assert "'deep', 'pgn', 'probe', 'shallow'" in error["message"]


@pytest.mark.parametrize(
    "fields, code, words",
    [
        ({"task": "dep"}, "no_such_task", "no task 'dep'; the nearest are 'deep'"),
        ({"task": "zzz"}, "no_such_task", "it has 'deep', 'pgn'"),
        ({"task": 7}, "bad_request", "task='7'"),
        ({"task": ["deep"]}, "bad_request", "give the name of one task"),
        ({"task": "deep", "output": "features"}, "no_such_output", "logits and no features"),
        ({"task": "deep", "topk": -1}, "bad_request", "topk='-1'"),
        ({"task": "deep", "topk": True}, "bad_request", "from 0 to 1000"),
        ({"task": "deep", "topk": "5x"}, "bad_request", "topk='5x'"),
    ],
)
def test_wrong_questions_are_told_what_is_right(client, fields, code, words):
    answer = client.post("/v1/predict", json=as_json([b"x"], **fields))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert words in answer.json()["error"]["message"]


def test_a_form_names_its_task_too(client):
    files = [("images", ("a.png", encode(images(1)[0])))]
    answer = client.post("/v1/predict", files=files, data={"task": "deep", "topk": "2"})
    assert answer.status_code == 200 and len(answer.json()["predictions"][0]) == 2


def test_a_single_task_needs_no_name(folder):
    for place, name in ((folder / "deep", "deep"), (folder / "pgn", "pgn")):
        tasks = load_served_tasks(place)
        with TestClient(create_app(tasks)) as client:
            call = as_json([encode(images(1)[0])])
            assert client.post("/v1/predict", json=call).json()["task"] == name
            assert client.get("/v1/model").json()["outputs"] == {
                "logits": 3 if name == "deep" else 5
            }
    assert list(load_served_tasks(folder / "pgn" / "best").tasks()) == ["pgn"]


def test_a_fine_tuned_model_is_served_beside_tasks(folder, tmp_path):
    torch.manual_seed(3)
    model = FineTuned(load_backbone("pgn_demo_vit"), 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    save_task(tmp_path / "full", model.eval())
    shutil.copytree(folder / "deep", tmp_path / "deep")
    picture = images(1, (40, 40))
    with TestClient(create_app(load_served_tasks(tmp_path, watch_s=0))) as client:
        for name in ("full", "deep"):
            answer = client.post("/v1/predict", json=as_json([encode(picture[0])], task=name))
            expected = expected_logits(tmp_path / name, picture)
            error = (values_of(answer) - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max(), name
    alone = load_served_tasks(tmp_path / "full")
    assert alone.tasks()["full"]["method"] == "full"


def test_tasks_beyond_the_bytes_come_back_from_disk_as_they_were(folder, tmp_path):
    for number in range(4):
        shutil.copytree(folder / "deep", tmp_path / f"t{number}")
    tasks = load_served_tasks(tmp_path, watch_s=0, max_bytes=1)
    # what lies on disk now is another task
    shutil.rmtree(tmp_path / "t0")
    shutil.copytree(folder / "shallow", tmp_path / "t0")
    with TestClient(create_app(tasks)) as client:
        call = as_json([encode(images(1)[0])])
        answers = [
            client.post("/v1/predict", json={**call, "task": f"t{n % 4}"}).json()["values"]
            for n in range(8)
        ]
    assert all(len(values[0]) == 3 and values == answers[0] for values in answers)


def test_tasks_are_listed_and_described(client):
    listed = client.get("/v1/tasks").json()["tasks"]
    assert [(t["name"], t["method"], t["num_classes"]) for t in listed] == [
        ("deep", "vpt-deep", 3),
        ("pgn", "pgn", 5),
        ("probe", "linear", 6),
        ("shallow", "vpt-shallow", 4),
    ]
    deep = client.get("/v1/tasks/deep").json()
    assert deep["class_names"] == ["ant", "bee", "cat"]
    assert deep["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert client.get("/v1/tasks/nothing").status_code == 404
    assert client.get("/v1/model").json()["tasks"] == 4


def test_metrics_count_tasks_under_bounded_labels(client):
    before = client.get("/metrics").text
    client.post("/v1/predict", json=as_json([encode(p) for p in images(2)], task="deep"))
    client.post("/v1/predict", json=as_json([b"x"], task="nothing-of-ours"))
    text = client.get("/metrics").text

    def value(text: str) -> float:
        lines = [x for x in text.splitlines() if x.startswith('pgn_fast_task_images_total{task="d')]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert value(text) == value(before) + 2
    assert "nothing-of-ours" not in text

    metrics = Metrics(lambda: 0, lambda: 0)
    for number in range(500):
        metrics.observe_task(f"task{number}", 1)
    lines = [x for x in metrics.text().decode().splitlines() if x.startswith("pgn_fast_task_calls")]
    totals = [line for line in lines if line.startswith("pgn_fast_task_calls_total")]
    assert len(totals) == 101 and 'pgn_fast_task_calls_total{task="other"} 400.0' in totals


# coming and going


def test_a_damaged_adapter_is_named_and_the_rest_serves(folder, tmp_path, caplog):
    shutil.copytree(folder / "deep", tmp_path / "good")
    shutil.copytree(folder / "shallow", tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tasks = load_served_tasks(tmp_path, watch_s=0)
    assert list(tasks.tasks()) == ["good"]
    assert "a task was not loaded" in caplog.text and str(tmp_path / "bad") in caplog.text
    shutil.rmtree(tmp_path / "good")
    with pytest.raises(UserError, match=r"bad"):
        load_served_tasks(tmp_path)


def test_what_holds_no_task_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="watch_s=nan: give the seconds"):
        load_served_tasks(folder, watch_s=float("nan"))
    with pytest.raises(UserError, match="there is no folder"):
        load_served_tasks(tmp_path / "none")
    with pytest.raises(UserError, match="holds no adapter, no training run and no folder of them"):
        load_served_tasks(tmp_path)
    # with a backbone named, tasks may come later
    assert load_served_tasks(tmp_path, model="pgn_demo_vit").tasks() == {}


def test_a_task_of_another_backbone_is_refused(folder, tmp_path, caplog):
    shutil.copytree(folder / "deep", tmp_path / "a")
    other = load_backbone("test_vit", pretrained=False)
    save_pretrained(pgn_fast.VPT(other, 2, num_prompts=2), tmp_path / "b")
    tasks = load_served_tasks(tmp_path, watch_s=0)
    assert list(tasks.tasks()) == ["a"]
    assert "trained on test_vit" in caplog.text and "its embed_dim is 128" in caplog.text


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "line\nbreak", "x" * 129, "\x00"])
def test_names_that_are_none_are_refused(tasks, folder, name):
    with pytest.raises(UserError, match="is no name for a task"):
        tasks.add(name, folder / "deep")


def test_a_preprocessing_that_is_none_is_refused(folder, tmp_path):
    tasks = load_served_tasks(tmp_path, model="pgn_demo_vit")
    model = from_pretrained(folder / "deep", "pgn_demo_vit")
    with pytest.raises(ValueError, match="preprocessing: std"):
        save_task(tmp_path / "std", model, std=(0.0, 1.0, 1.0))
    place = save_task(tmp_path / "size", model, input_size=(3, 4096, 4096))
    with pytest.raises(UserError, match=r"preprocessing|pixels"):
        tasks.add("task", place)
    assert tasks.tasks() == {}


def test_a_removed_task_answers_what_it_has_and_no_more(folder, tmp_path):
    tasks = load_served_tasks(folder, watch_s=0)
    held = tasks.target("deep", "logits")
    tasks.remove("deep")
    with pytest.raises(ApiError, match="no task 'deep'"):
        tasks.target("deep", "logits")
    # another one takes the name; the call on its way is still the first one's
    tasks.add("deep", folder / "shallow")
    levels = [held.preprocessing.zeros()]
    (before,) = tasks.run([(levels, held.key)])
    assert before.shape == (1, 3)
    tasks.release(held)
    with pytest.raises(KeyError):
        tasks.run([(levels, held.key)])
    later = tasks.target("deep", "logits")
    assert tasks.run([(levels, later.key)])[0].shape == (1, 4)


def constant_task(folder: Path, backbone, constant: float) -> Path:
    """A task whose logits are one number and its negative, whatever the image."""
    model = pgn_fast.VPT(backbone, 2, num_prompts=1)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([constant, -constant]))
    return save_task(folder, model, crop_pct=1.0)


def test_never_another_tasks_answer_while_tasks_come_and_go(tmp_path):
    """Each task's head carries its own constant; calls run beside adds, replacements, removals."""
    backbone = load_backbone("pgn_demo_vit")
    adapters = {n: constant_task(tmp_path / f"t{n}", backbone, float(n)) for n in range(1, 7)}
    tasks = load_served_tasks(tmp_path, watch_s=0)
    # two more adapters take turns under one name
    swapped = {1: adapters[1], 2: adapters[2]}
    tasks.add("swapped", swapped[1])
    image = encode(images(1, (32, 32))[0])
    stop = threading.Event()

    def change() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            tasks.add("swapped", swapped[turn % 2 + 1])
            tasks.add("t6", adapters[6])
            tasks.remove("t6")

    with TestClient(create_app(tasks)) as client, ThreadPoolExecutor(9) as pool:
        changing = pool.submit(change)

        def ask(number: int) -> str:
            name = random.Random(number).choice([f"t{n}" for n in range(1, 7)] + ["swapped"])
            answer = client.post("/v1/predict", json=as_json([image], task=name))
            if answer.status_code == 400:
                assert name == "t6" and answer.json()["error"]["code"] == "no_such_task"
                return "gone"
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                value = answer.json()["values"][0][0]
                assert value in ((1.0, 2.0) if name == "swapped" else (float(name[1:]),))
                assert answer.json()["task"] == name
            return "answered"

        outcomes = list(pool.map(ask, range(300)))
        stop.set()
        changing.result(20)
    assert outcomes.count("answered") > 200


def test_a_watched_folder_brings_and_takes_tasks(folder, tmp_path, caplog):
    shutil.copytree(folder / "deep", tmp_path / "one")
    tasks = load_served_tasks(tmp_path, watch_s=0.05)
    watched = TaskFolder(tasks, tmp_path, seconds=0)
    watched.load()

    shutil.copytree(folder / "shallow", tmp_path / "two")
    watched.look()
    # its files must stay the same for one more look
    assert list(tasks.tasks()) == ["one"]
    watched.look()
    assert list(tasks.tasks()) == ["one", "two"]

    # a changed adapter takes the place of the old one, a damaged one does not
    time.sleep(0.02)
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(folder / "probe", tmp_path / "two")
    watched.look()
    watched.look()
    assert tasks.tasks()["two"]["num_classes"] == 6
    weights = tmp_path / "two" / "adapter_model.safetensors"
    weights.write_bytes(b"damaged")
    watched.look()
    watched.look()
    assert tasks.tasks()["two"]["num_classes"] == 6 and "'two' was not loaded" in caplog.text
    # it is tried once
    caplog.clear()
    watched.look()
    assert caplog.text == ""

    shutil.rmtree(tmp_path / "one")
    watched.look()
    assert list(tasks.tasks()) == ["two"]


def test_the_folder_is_watched_while_the_server_runs(folder, tmp_path):
    tasks = load_served_tasks(tmp_path, model="pgn_demo_vit", watch_s=0.05)
    with TestClient(create_app(tasks)) as client:
        assert client.get("/v1/tasks").json() == {"tasks": []}
        shutil.copytree(folder / "deep", tmp_path / "late")
        end = time.monotonic() + 20
        while not client.get("/v1/tasks").json()["tasks"] and time.monotonic() < end:
            time.sleep(0.02)
        assert client.get("/v1/tasks").json()["tasks"][0]["name"] == "late"


def test_a_folder_takes_only_its_own_tasks_away(folder, tmp_path):
    """Somebody else's task, which has the name by now, stays."""
    shutil.copytree(folder / "deep", tmp_path / "one")
    shutil.copytree(folder / "deep", tmp_path / "two")
    tasks = load_served_tasks(tmp_path, watch_s=0)
    watched = tasks.beside
    tasks.add("one", folder / "shallow")
    tasks.remove("two")
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(tmp_path / "two")
    watched.look()
    watched.look()
    assert list(tasks.tasks()) == ["one"] and tasks.tasks()["one"]["num_classes"] == 4
    tasks.remove("one")
    with pytest.raises(ApiError, match="this server has no task at the moment"):
        tasks.target(None, "logits")
    assert tasks.every([images(1)[0]]) == {}
    tasks.warm_up(4)


def test_a_task_may_be_put_into_place_in_one_step_or_in_many(folder, tmp_path, caplog):
    """A link that is set again, a folder that is renamed: no look finds the task gone. Half a copy
    is no task, and keeps the one that is served."""
    stock, served = tmp_path / "stock", tmp_path / "served"
    served.mkdir()
    (served / "linked").symlink_to(folder / "deep", target_is_directory=True)
    shutil.copytree(folder / "deep", served / "whole")
    (served / "line\nbreak").symlink_to(folder / "deep", target_is_directory=True)
    tasks = load_served_tasks(served, watch_s=0)
    watched = tasks.beside
    (reason,) = tasks.failed
    assert "is no name for a task" in reason and "\n" not in reason
    classes = lambda: {name: about["num_classes"] for name, about in tasks.tasks().items()}
    assert classes() == {"linked": 3, "whole": 3}

    (served / ".next").symlink_to(folder / "shallow", target_is_directory=True)
    (served / ".next").replace(served / "linked")
    shutil.copytree(folder / "probe", stock)
    (served / "whole").rename(tmp_path / "old")
    stock.rename(served / "whole")
    for _ in range(2):
        watched.look()
        assert set(classes()) == {"linked", "whole"}
    assert classes() == {"linked": 4, "whole": 6}

    weights = served / "whole" / "adapter_model.safetensors"
    data = (folder / "deep" / weights.name).read_bytes()
    shutil.copy(folder / "deep" / "adapter_config.json", served / "whole")
    for part in (data[:100], data[:-1]):  # a slow copy, which pauses
        weights.write_bytes(part)
        for _ in range(3):
            watched.look()
            assert classes() == {"linked": 4, "whole": 6}
    weights.write_bytes(data)
    for _ in range(2):
        watched.look()
    assert classes() == {"linked": 4, "whole": 3}


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_what_cannot_be_looked_into_keeps_its_task_and_is_told_once(folder, tmp_path, caplog):
    """Another owner's folder, a share that does not answer; here a link that leads to itself."""
    served = tmp_path / "served"
    for name in ("one", "two"):
        shutil.copytree(folder / "deep", served / name)
    (served / "odd").symlink_to("odd")
    tasks = load_served_tasks(served, watch_s=0.02)
    assert [reason for reason in tasks.failed if "odd cannot be read: Too many" in reason]
    watched = tasks.beside

    (served / "one").rename(tmp_path / "away")
    (served / "one").symlink_to("one")
    caplog.clear()
    for _ in range(3):
        watched.look()
    assert list(tasks.tasks()) == ["one", "two"]
    assert [r.getMessage()[:29] for r in caplog.records] == ["task 'one' is left as it is: "]
    # it is there again, as it was: nothing is loaded again
    (served / "one").unlink()
    (tmp_path / "away").rename(served / "one")
    for _ in range(3):
        watched.look()
    shutil.rmtree(served / "two")
    watched.look()
    assert list(tasks.tasks()) == ["one"]

    caplog.clear()
    served.rename(tmp_path / "gone")
    watched.start()
    end = time.monotonic() + 20
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.01)
    watched.stop()
    assert list(tasks.tasks()) == ["one"]
    assert "cannot be watched, its tasks stay" in caplog.text and "Traceback" not in caplog.text


def test_many_new_tasks_keep_no_change_waiting(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.task_folder._LOADING_S", 0.0)
    shutil.copytree(folder / "deep", tmp_path / "old")
    tasks = load_served_tasks(tmp_path, watch_s=0)
    watched = tasks.beside
    for number in range(4):
        shutil.copytree(folder / "deep", tmp_path / f"new{number}")
    counts = []
    for look in range(8):
        if look == 3:
            shutil.rmtree(tmp_path / "old")
        watched.look()
        counts.append(("old" in tasks.tasks(), len(tasks.tasks().keys() - {"old"})))
    assert counts[2] == (True, 2) and counts[3] == (False, 3)
    assert counts[-1] == (False, 4)


def test_admin_adds_and_removes(folder, tmp_path):
    tasks = load_served_tasks(tmp_path, model="pgn_demo_vit", watch_s=0)
    with TestClient(create_admin(tasks), base_url="http://127.0.0.1") as admin:

        def add(**call) -> tuple[int, str]:
            answer = admin.post("/v1/tasks", json=call)
            return answer.status_code, answer.json().get("error", {}).get("code", "")

        assert add(name="pets", source=str(folder / "deep")) == (201, "")
        assert admin.get("/v1/tasks").json() == {"tasks": ["pets"]}
        assert add(name="pets", source=str(folder / "pgn")) == (409, "task_exists")
        assert add(name="pets", source=str(folder / "pgn"), replace=True) == (201, "")
        assert tasks.tasks()["pets"]["num_classes"] == 5
        with ThreadPoolExecutor(4) as pool:  # the same once more, at the same time
            again = [pool.submit(add, name="twice", source=str(folder / "deep")) for _ in range(4)]
            found = sorted(one.result() for one in again)
        assert found == [(201, ""), *[(409, "task_exists")] * 3]
        assert admin.delete("/v1/tasks/twice").status_code == 200
        assert add(name="x", source=str(tmp_path)) == (400, "bad_adapter")
        assert add(name="a/b", source=str(folder / "deep")) == (400, "bad_adapter")
        assert add(name="x") == add(name=1, source="y") == (400, "bad_request")
        assert admin.post("/v1/tasks", content=b"[").status_code == 415
        kind = {"content-type": "application/json"}
        assert admin.post("/v1/tasks", content=b"[" * 9, headers=kind).status_code == 400
        assert admin.post("/v1/tasks", content=bytes(70_000), headers=kind).status_code == 413
        assert admin.delete("/v1/tasks/pets").json() == {"removed": "pets"}
        assert admin.delete("/v1/tasks/pets").status_code == 404
        strange = admin.get("/v1/tasks", headers={"Origin": "https://evil.example"})
        assert strange.status_code == 403
        assert admin.get("/v1/tasks", headers={"Host": "evil.example"}).status_code == 421


def test_admin_has_a_port_of_its_own_on_this_machine(folder, tmp_path):
    tasks = load_served_tasks(folder / "deep")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with guarded(create_app(tasks), admin=(create_admin(tasks), port)) as (url, _):
        admin = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=20)
        call = json.dumps({"name": "more", "source": str(folder / "probe")})
        admin.request("POST", "/v1/tasks", call, {"Content-Type": "application/json"})
        assert admin.getresponse().status == 201
        admin.close()
        with TaskClient(url) as client:
            assert client.tasks() == ["deep", "more"]
        outside = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        outside.request("POST", "/v1/tasks", call, {"Content-Type": "application/json"})
        assert outside.getresponse().status == 405
        outside.close()


# the client


def test_task_client_asks_by_name(tasks, folder):
    pictures = images(3, (32, 32))
    levels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    with serving(create_app(tasks, ServerSettings(default_output="logits", max_call_images=2))) as (
        url,
        _,
    ):
        with TaskClient(url, "deep") as client:
            assert client.tasks() == ["deep", "pgn", "probe", "shallow"]
            assert client.describe()["class_names"] == ["ant", "bee", "cat"]
            expected = expected_logits(folder / "deep", pictures)
            error = (client.logits(levels) - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max()
            best = client.predict([encode(p) for p in pictures])
            assert [len(each) for each in best] == [1, 1, 1]
            assert all(isinstance(each[0], Prediction) for each in best)
            assert [each[0].index for each in best] == expected.argmax(1).tolist()
            ranked = client.predict(levels, topk=3)[0]
            assert sum(each.probability for each in ranked) == pytest.approx(1)
        with TaskClient(url) as client:
            with pytest.raises(ServerError, match="has 4 tasks; say which one"):
                client.predict(levels)
            with pytest.raises(ServerError, match="4 tasks; name one by task="):
                client.describe()


@pytest.mark.parametrize("forced", [False, True], ids=["waits", "cuts-off"])
def test_the_end_waits_for_what_is_being_loaded_or_cuts_it_off(folder, monkeypatch, caplog, forced):
    tasks = load_served_tasks(folder / "deep")
    gate, begun, answers = threading.Event(), threading.Event(), []
    load = tasks.add

    def slowly(name, adapter):
        begun.set()
        assert gate.wait(20)
        return load(name, adapter)

    monkeypatch.setattr(tasks, "add", slowly)
    call = json.dumps({"name": "more", "source": str(folder / "probe")})

    def ask(port: int) -> None:
        admin = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=20)
        admin.request("POST", "/v1/tasks", call, {"Content-Type": "application/json"})
        answer = admin.getresponse()
        answers.append((answer.status, json.loads(answer.read()).get("error", {}).get("code")))

    with guarded(create_app(tasks), admin=(create_admin(tasks), 0)) as (_, server):
        port = server._admin_server.sockets[0].getsockname()[1]
        asking = threading.Thread(target=ask, args=(port,))
        asking.start()
        assert begun.wait(20)
        server.should_exit = True
        server.force_exit = forced
        if not forced:
            gate.set()
    gate.set()
    asking.join(20)
    assert answers == [(503, "closing") if forced else (201, None)]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_a_body_for_admin_that_does_not_come_ends(folder, monkeypatch, caplog):
    monkeypatch.setattr("pgn_fast.serve.admin._BODY_S", 0.3)
    tasks = load_served_tasks(folder / "deep")
    opening = (
        b"POST /v1/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{"
    )
    with guarded(create_app(tasks), admin=(create_admin(tasks), 0)) as (_, server):
        url = f"http://127.0.0.1:{server._admin_server.sockets[0].getsockname()[1]}"
        with connect(url) as slow:
            slow.sendall(opening)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with connect(url) as leaving:
            leaving.sendall(opening)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


# the command line


def test_serve_takes_adapters_runs_and_folders_of_them(folder, monkeypatch, capsys):
    seen = {}

    def run_server(served, settings, **where):
        seen.update(served=served, settings=settings, **where)

    monkeypatch.setattr("pgn_fast.serve.server.run_server", run_server)
    assert cli.main(["serve", str(folder), "--device", "cpu", "--admin", "8124"]) == 0
    assert len(seen["served"].tasks()) == 4 and seen["admin_port"] == 8124
    assert seen["settings"].default_output == "logits"
    assert "4 tasks on pgn_demo_vit at /v1/predict" in capsys.readouterr().out
    assert cli.main(["serve", str(folder / "pgn"), "--device", "cpu"]) == 0
    assert list(seen["served"].tasks()) == ["pgn"]


@pytest.mark.parametrize(
    "flags, reason",
    [
        ([], "name what is to be served"),
        (["no/such/folder"], "there is no folder no/such/folder"),
        (["TASKS", "--crop-pct", "1.0"], "--crop-pct: adapters have a preprocessing of their own"),
        (["TASKS", "--output", "features"], "tasks answer logits and no features"),
    ],
)
def test_serve_refuses_in_one_line(folder, flags, reason, capsys):
    words = [str(folder) if word == "TASKS" else word for word in flags]
    assert cli.main(["serve", "--device", "cpu", *words]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_a_name_that_is_not_known_keeps_nobody_waiting(tasks, monkeypatch):
    """The nearest names are looked for while others are answered, and not at all for a text that
    is longer than any name."""
    from pgn_fast.serve import tasks as module

    def compared(name, names, **options):
        found = ThreadPoolExecutor(1).submit(tasks.labels, "deep").result(timeout=10)
        assert len(name) < 1000 and len(found) == 3
        return ["deep"]

    monkeypatch.setattr(module.difflib, "get_close_matches", compared)
    for name, hint in (("dep", "the nearest are 'deep'"), ("x" * 1_000_000, "it has 'deep'")):
        with pytest.raises(ApiError) as refusal:
            tasks.target(name, "logits")
        assert hint in refusal.value.message and len(refusal.value.message) < 500


def test_a_task_called_best_hides_no_other(folder, tmp_path):
    shutil.copytree(folder / "deep", tmp_path / "best")
    alone = load_served_tasks(tmp_path, watch_s=0)  # as a training run leaves its adapter
    assert list(alone.tasks()) == [tmp_path.name]
    shutil.copytree(folder / "deep", tmp_path / "last")
    assert list(load_served_tasks(tmp_path, watch_s=0).tasks()) == [tmp_path.name]
    shutil.copytree(folder / "shallow", tmp_path / "cats")
    both = load_served_tasks(tmp_path, watch_s=0)
    assert list(both.tasks()) == ["best", "cats", "last"]
    assert len(both.labels("best")) == 3 and len(both.labels("cats")) == 4
    (tmp_path / "summary.json").touch()  # a run, in which somebody put more
    assert list(load_served_tasks(tmp_path, watch_s=0).tasks()) == [tmp_path.name]


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b"[]", b'{"limits": 3}', b'{"limits": {"images_per_call": 4}}'],
    ids=["html", "list", "other", "no-values"],
)
def test_an_answer_that_is_not_the_servers_is_told(answer):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    told = pytest.raises(ServerError, match="answers, but not as pgn-fast serve does")
    with serving(app, lifespan="off") as (url, _), TaskClient(url, "pets") as client, told:
        client.logits([b"image"])


def test_a_client_does_not_wait_longer_than_it_was_told():
    async def app(scope, receive, send):
        headers = [(b"retry-after", b"86400")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    told = pytest.raises(ServerError, match="answered 503")
    with serving(app, lifespan="off") as (url, _), TaskClient(url) as client, told:
        client.tasks()


def test_what_a_client_cannot_send_is_refused_before():
    for token in ("", "\n", "two\nlines", "t\u00f6ken"):
        with pytest.raises(ValueError, match="token must be one line of ASCII"):
            TaskClient("http://127.0.0.1:9", token=token)
    with TaskClient("http://127.0.0.1:9", token="from-a-file\n") as client:
        for images_ in (b"one image", ["text"], [1]):
            with pytest.raises(ValueError, match="list of encoded images"):
                client.logits(images_)
