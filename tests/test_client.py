"""RgbClient against a real server on a loopback port, and the server's life on a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch
from odd_images import encode
from PIL import Image
from serving import Gated, as_json, images, serving, tiny_vit
from timm.data import create_transform, resolve_data_config
from timm.models import VisionTransformer

from pgn_fast import cli
from pgn_fast.client import RgbClient, ServerError, encode_plain
from pgn_fast.serve import ServedModel, ServerSettings, create_app, load_served_model
from pgn_fast.serve.access import Tokens


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model(tiny_vit(), data_args={"crop_pct": 1.0})


@pytest.fixture(scope="module")
def url(served):
    with serving(create_app(served)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    return torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8)


def normalized(levels: torch.Tensor, model) -> torch.Tensor:
    transform = create_transform(
        **resolve_data_config({"crop_pct": 1.0}, model=model), is_training=False
    )
    return torch.stack([transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in levels])


class Inverting:
    """A prompter as simple as can be: the negative image."""

    def encode(self, images):
        return encode_plain(255 - images)


def test_features_and_logits_are_the_models(url, served, levels):
    """70 images go in calls of 32; the model sees the same batches here."""
    with RgbClient(url) as client, torch.inference_mode():
        batches = normalized(levels, served.model).split(32)
        tokens = [served.model.forward_features(batch) for batch in batches]
        features = torch.cat([served.model.forward_head(t, pre_logits=True) for t in tokens])
        logits = torch.cat([served.model(batch) for batch in batches])
        assert torch.equal(client.features(levels), features)
        assert torch.equal(client.logits(levels), logits)
        assert torch.equal(client.predict(levels), logits.argmax(dim=1))
        assert client.features(levels).dtype == torch.float32


def test_a_prompter_changes_what_is_sent_and_a_head_what_comes_back(url, served, levels):
    head = torch.nn.Linear(48, 3)
    with RgbClient(url) as plain, RgbClient(url + "/", Inverting(), head=head) as prompted:
        assert torch.equal(prompted.features(levels[:8]), plain.features(255 - levels[:8]))
        with torch.inference_mode():
            expected = head(plain.features(255 - levels[:8]))
        assert torch.equal(prompted.logits(levels[:8]), expected)
        assert not prompted.logits(levels[:2]).requires_grad


@pytest.mark.parametrize("crop_pct, resize", [(1.0, 32), (0.9, 35), (0.875, 36)])
def test_a_padded_canvas_reaches_the_model_as_it_is(crop_pct, resize, levels):
    """What the server says of its preprocessing is enough to send images that survive it."""
    served = load_served_model(tiny_vit(), data_args={"crop_pct": crop_pct})
    with serving(create_app(served)) as (url, _), RgbClient(url) as client:
        spec = client.server_spec()
        assert (spec.resize, spec.crop) == (resize, 32)
        with torch.inference_mode():
            expected = served.model(spec.normalize(levels[:4]))
        torch.testing.assert_close(client.logits(spec.pad(levels[:4])), expected)


def test_a_preprocessing_that_no_canvas_survives_is_refused(levels):
    served = load_served_model(tiny_vit(), data_args={"crop_pct": 0.9, "crop_mode": "squash"})
    with (
        serving(create_app(served)) as (url, _),
        RgbClient(url) as client,
        pytest.raises(ValueError, match=r"crops by 'squash' to 32 × 32 pixels"),
    ):
        client.server_spec()


@pytest.mark.parametrize("size", [(32, 32), (32, 40)], ids=str)
def test_a_canvas_of_the_servers_own_size_needs_no_padding(size, levels):
    """A squashing server, and one of another shape, as enlarged canvases need."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0
    )
    model.pretrained_cfg = {"architecture": "tiny"}
    data_args = {"input_size": (3, *size), "crop_pct": 1.0, "crop_mode": "squash"}
    served = load_served_model(model, data_args=data_args)
    canvases = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    with serving(create_app(served)) as (url, _), RgbClient(url) as client:
        spec = client.server_spec()
        with torch.inference_mode():
            expected = served.model(spec.normalize(canvases))
        torch.testing.assert_close(client.features(spec.pad(canvases)), expected)


def test_images_that_are_encoded_already_are_sent_as_they_are(url, levels):
    with RgbClient(url) as client:
        assert torch.equal(client.features(encode_plain(levels[:3])), client.features(levels[:3]))
        jpeg = encode(images(1)[0], "JPEG")
        assert client.features([jpeg]).shape == (1, 48)


def test_wrong_images_are_refused_before_anything_is_sent():
    client = RgbClient("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"uint8 levels \(B, 3, H, W\), got torch.float32"):
        client.features(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got torch.uint8 \(3, 8, 8\)"):
        client.features(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="the batch is empty"):
        client.features(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="should be like http:"):
        RgbClient("localhost:8000")


def test_a_token_is_sent_with_every_call(served, levels, tmp_path):
    (tmp_path / "tokens").write_text("sesame\n")
    with serving(create_app(served, tokens=Tokens(tmp_path / "tokens"))) as (url, _):
        with RgbClient(url, token="sesame") as client:
            assert client.features(levels[:1]).shape == (1, 48)
        with RgbClient(url) as client, pytest.raises(ServerError, match="Bearer TOKEN") as e:
            client.model()
        assert (e.value.status, e.value.code) == (401, "unauthorized")


def test_a_refusal_carries_status_code_and_reason(url):
    with RgbClient(url) as client, pytest.raises(ServerError, match="image 0 is not PNG") as e:
        client.features([b"nothing"])
    assert (e.value.status, e.value.code) == (415, "unsupported_image")


class Scripted:
    """An ASGI application that answers one line of a script a call: (status, headers, body)."""

    def __init__(self, *script: tuple[int, dict[str, str], object]) -> None:
        self.script = list(script)
        self.calls = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"].endswith("shutdown"):
                    return
        while (await receive()).get("more_body"):
            pass
        status, headers, body = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await send({"type": "http.response.body", "body": data})


BUSY = {"error": {"code": "overloaded", "message": "try again."}}


def test_503_is_retried_with_growing_pauses():
    app = Scripted((503, {}, BUSY), (503, {}, BUSY), (200, {}, {"model": "x"}))
    with serving(app) as (url, _), RgbClient(url, backoff=0.05) as client:
        began = time.monotonic()
        assert client.model() == {"model": "x"}
        assert time.monotonic() - began >= 0.15
    assert app.calls == 3


def test_retry_after_is_respected():
    app = Scripted((503, {"Retry-After": "1"}, BUSY), (200, {}, {}))
    with serving(app) as (url, _), RgbClient(url, backoff=0.001) as client:
        began = time.monotonic()
        client.model()
        assert time.monotonic() - began >= 1.0


def test_retries_end():
    app = Scripted((503, {}, BUSY))
    with (
        serving(app) as (url, _),
        RgbClient(url, retries=2, backoff=0.001) as client,
        pytest.raises(ServerError, match="503 after 3 attempts: try again") as refusal,
    ):
        client.model()
    assert (refusal.value.status, refusal.value.code, app.calls) == (503, "overloaded", 3)


def test_other_refusals_are_not_retried():
    app = Scripted((500, {}, b"<html>oops</html>"))
    with (
        serving(app) as (url, _),
        RgbClient(url) as client,
        pytest.raises(ServerError, match="answered 500: <html>oops") as refusal,
    ):
        client.model()
    assert (refusal.value.status, refusal.value.code, app.calls) == (500, None, 1)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = RgbClient(f"http://127.0.0.1:{port}", retries=1, backoff=0.001)
    with pytest.raises(ServerError, match=r"no connection .* after 2 attempts .* running\?"):
        client.model()


def test_a_silent_server_times_out():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = RgbClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 seconds"):
            client.model()


def test_a_connection_that_the_server_closed_is_opened_again(served, levels):
    app = create_app(served)
    with serving(app, timeout_keep_alive=0) as (url, _), RgbClient(url, backoff=0.01) as client:
        first = client.features(levels[:1])
        time.sleep(0.2)
        assert torch.equal(client.features(levels[:1]), first)


# the server on a real socket


def test_a_large_body_gets_its_413_and_the_next_call_its_answer(served, levels):
    with serving(create_app(served, ServerSettings(max_call_bytes=10_000))) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        for _ in range(2):
            connection.request("POST", "/v1/predict", bytes(5_000_000))
            answer = connection.getresponse()
            assert answer.status == 413
            assert json.loads(answer.read())["error"]["code"] == "too_many_bytes"
        with RgbClient(url) as client:
            assert client.features(levels[:1]).shape == (1, 48)


def test_a_slow_body_gets_408(served):
    with (
        serving(create_app(served, ServerSettings(timeout_s=0.3))) as (url, _),
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as slow,
    ):
        slow.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        slow.settimeout(10)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_shutting_down_answers_what_was_accepted(served, levels):
    gated = Gated(served)
    with (
        serving(create_app(gated), timeout_graceful_shutdown=20) as (url, server),
        ThreadPoolExecutor(4) as pool,
    ):

        def features(i: int) -> torch.Tensor:
            with RgbClient(url, retries=0) as client:
                client._images_per_call = 1
                return client.features(levels[i : i + 1])

        calls = [pool.submit(features, i) for i in range(4)]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        while True:
            connection.request("GET", "/metrics")
            if "pgn_fast_calls_in_progress 4.0" in connection.getresponse().read().decode():
                break
            time.sleep(0.01)
        connection.close()
        server.should_exit = True
        time.sleep(0.3)
        with pytest.raises(ConnectionError):
            socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=1)
        gated.gate.set()
        answers = [call.result(20) for call in calls]
    assert [tuple(answer.shape) for answer in answers] == [(1, 48)] * 4


def test_overload_on_real_sockets_answers_every_call(served, levels):
    """Ten times what is let in, each call on its own connection: 200 or 503, nothing else."""
    settings = ServerSettings(max_calls=4, queue_images=4, max_call_images=4)
    gated = Gated(served)
    body = json.dumps(as_json(encode_plain(levels[:1]))).encode()
    with serving(create_app(gated, settings)) as (url, _):

        async def call() -> int:
            reader, writer = await asyncio.open_connection(
                urlsplit(url).hostname, urlsplit(url).port
            )
            writer.write(
                b"POST /v1/predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            answer = await reader.read()
            writer.close()
            return int(answer.split()[1])

        async def storm() -> list[int]:
            threading.Timer(1.0, gated.gate.set).start()
            return await asyncio.gather(*(call() for _ in range(40)))

        statuses = asyncio.run(storm())
    assert statuses.count(200) >= 4
    assert statuses.count(200) + statuses.count(503) == 40
    assert statuses.count(503) >= 20


# the command line


def test_serve_without_the_extra_says_what_to_install(monkeypatch, capsys):
    import pgn_fast.serve

    there = pgn_fast.serve._is_there
    monkeypatch.setattr(pgn_fast.serve, "_is_there", lambda name: name != "fastapi" and there(name))
    assert cli.main(["serve", "--model", "pgn_demo_vit"]) == 2
    line = capsys.readouterr().err
    assert "the server needs fastapi" in line and "pip install 'pgn_fast[serve]'" in line


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--model", "resnet_nonsense"], "resnet_nonsense"),
        (
            ["--model", "test_vit", "--model-kwargs", "pretrained=False", "--max-batch", "0"],
            "max_batch",
        ),
        (
            [
                "--model",
                "test_vit",
                "--model-kwargs",
                "pretrained=False",
                "num_classes=0",
                "--output",
                "logits",
            ],
            "test_vit has no logits",
        ),
        (
            [
                "--model",
                "vit_tiny_patch16_224",
                "--model-kwargs",
                "pretrained=False",
                "--input-size",
                "3",
                "96",
                "96",
            ],
            "takes no images of 3 × 96 × 96",
        ),
    ],
)
def test_serve_refuses_in_one_line(flags, reason, capsys, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.server.run_server", lambda *args, **where: None)
    assert cli.main(["serve", "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_serve_runs_what_was_asked_for(monkeypatch, capsys):
    seen = {}

    def run_server(served, settings, **where):
        seen.update(served=served, settings=settings, **where)

    monkeypatch.setattr("pgn_fast.serve.server.run_server", run_server)
    flags = ["--model", "test_vit", "--model-kwargs", "pretrained=False", "--device", "cpu"]
    flags += ["--output", "logits", "--crop-pct", "1.0", "--max-batch", "7", "--port", "8123"]
    assert cli.main(["serve", *flags]) == 0
    assert seen["served"].name == "test_vit"
    assert seen["served"].preprocessing.describe()["crop_pct"] == 1.0
    assert (seen["settings"].max_batch, seen["settings"].default_output) == (7, "logits")
    assert (seen["host"], seen["port"]) == ("127.0.0.1", 8123)
    assert capsys.readouterr().out == "test_vit at /v1/predict\n"
