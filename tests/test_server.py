"""The image API: exact numbers, clear refusals, and limits that hold under abuse."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from odd_images import encode, fuzz_cases, noise, png_of
from PIL import Image
from serving import CONFIG, Gated, as_json, images, tiny_vit
from starlette.testclient import TestClient
from timm.data import create_transform

import pgn_fast.serve.model
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.serve import (
    ApiError,
    Preprocessing,
    ServedModel,
    ServerSettings,
    create_app,
    load_served_model,
)
from pgn_fast.serve.batching import Batcher
from pgn_fast.serve.decode import decode_call


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model(tiny_vit())


@pytest.fixture(scope="module")
def client(served):
    with TestClient(create_app(served)) as client:
        yield client


def as_files(encoded: list[bytes]) -> list:
    return [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(encoded)]


def error_of(answer) -> tuple[int, str]:
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    assert body["error"]["message"].endswith(".")
    return answer.status_code, body["error"]["code"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# preprocessing: timm's own, bit by bit


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_mode": "border", "crop_pct": 1.0},
        {"input_size": (3, 24, 40), "mean": (0.5, 0.5, 0.5), "std": (0.1, 0.2, 0.3)},
    ],
    ids=str,
)
def test_preprocessing_is_timms_bit_by_bit(changed):
    config = {k: v for k, v in CONFIG.items() if k != "architecture"} | changed
    ours, timms = Preprocessing(config), create_transform(**config, is_training=False)
    for size in [(32, 32), (35, 35), (40, 24), (7, 90), (1, 1), (200, 130)]:
        pictures = images(2, size)
        batch = ours.normalize(ours.stack([ours.geometry(picture) for picture in pictures]))
        assert torch.equal(batch, torch.stack([timms(picture) for picture in pictures])), size


def test_images_of_the_models_size_skip_only_a_geometry_that_does_nothing():
    config = {k: v for k, v in CONFIG.items() if k != "architecture"}
    assert not Preprocessing(config).describe()["canvas_is_unchanged"]
    assert Preprocessing(config | {"crop_pct": 1.0}).describe()["canvas_is_unchanged"]


@pytest.mark.parametrize(
    "changed", [{"std": (0.5, 0.0, 0.5)}, {"input_size": (1, 32, 32)}, {"mean": (0.5,)}], ids=str
)
def test_normalizations_that_are_none_are_refused(changed):
    with pytest.raises(ValueError, match="three channels, means and positive stds are needed"):
        Preprocessing({k: v for k, v in CONFIG.items() if k != "architecture"} | changed)


# exactness of the whole way


@pytest.mark.parametrize("output", ["features", "logits"])
@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("body", ["json", "files"])
def test_answers_equal_the_model_called_directly(client, served, output, encoding, body):
    pictures = images(5)
    encoded = [encode(picture) for picture in pictures]
    fields = {"output": output, "encoding": encoding}
    if body == "json":
        answer = client.post("/v1/predict", json=as_json(encoded, **fields))
    else:
        answer = client.post("/v1/predict", files=as_files(encoded), data=fields)
    assert answer.status_code == 200, answer.text
    answer = answer.json()

    config = {k: v for k, v in CONFIG.items() if k != "architecture"}
    transform = create_transform(**config, is_training=False)
    batch = torch.stack([transform(picture) for picture in pictures])
    with torch.inference_mode():
        tokens = served.model.forward_features(batch)
        expected = served.model.forward_head(tokens, pre_logits=output == "features")
        if output == "logits":
            assert torch.equal(expected, served.model(batch))
    if encoding == "json":
        values = torch.tensor(answer["values"])
    else:
        flat = np.frombuffer(base64.b64decode(answer["values"]), "<f4").copy()
        values = torch.from_numpy(flat).reshape(answer["shape"])
    assert answer["shape"] == list(expected.shape)
    assert torch.equal(values, expected)


def test_jpeg_and_webp_are_decoded_as_pillow_does(client):
    picture = images(1, (60, 44))[0]
    for kind in ("JPEG", "WEBP"):
        lossy = encode(picture, kind, quality=80)
        (ours,) = decode_call([lossy], 10_000, 10_000)
        again = encode(ours)
        answers = [
            client.post("/v1/predict", files=as_files([data])).json() for data in (lossy, again)
        ]
        assert answers[0]["values"] == answers[1]["values"]


def test_one_batch_of_many_calls_is_cut_where_they_end(served):
    geometry = served.preprocessing.geometry
    levels = [geometry(picture) for picture in images(6)]
    calls = [(levels[:1], "features"), (levels[1:4], "logits"), (levels[4:], "features")]
    batch = served.preprocessing.normalize(served.preprocessing.stack(levels))
    with torch.inference_mode():
        # those that ask for the same output go through the model together
        logits, tokens = served.model(batch[1:4]), served.model.forward_features(batch[[0, 4, 5]])
        features = served.model.forward_head(tokens, pre_logits=True)
    results = served.run(calls)
    for result, expected in zip(results, (features[:1], logits, features[1:]), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_larger_model_runs_on_the_engine(monkeypatch, num_classes):
    """The same numbers up to rounding; what the engine does not run stays timm's."""
    monkeypatch.setattr(pgn_fast.serve.model, "ENGINE_FROM", 0)
    encoded, encode_ = [], FastBackbone.encode
    monkeypatch.setattr(
        FastBackbone, "encode", lambda self, *rest: encoded.append(1) or encode_(self, *rest)
    )
    served = load_served_model(tiny_vit(num_classes))
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoded.clear()
    results = {output: served.passes[output](batch) for output in served.outputs}
    assert len(encoded) == len(results) == 1 + bool(num_classes)
    with torch.inference_mode():
        tokens = served.model.forward_features(served.preprocessing.normalize(batch))
        for output, result in results.items():
            expected = served.model.forward_head(tokens, pre_logits=output == "features")
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    own = tiny_vit()
    own.blocks[0].attn.forward = own.blocks[0].attn.forward  # somebody's own attention
    encoded.clear()
    load_served_model(own).passes["features"](batch)
    assert not encoded


@pytest.mark.parametrize("engine_from", [0, 3e8])
def test_changes_of_the_models_weights_are_seen(monkeypatch, engine_from):
    monkeypatch.setattr(pgn_fast.serve.model, "ENGINE_FROM", engine_from)
    served = load_served_model(tiny_vit())
    calls = [([np.full((3, 32, 32), 7, np.uint8)], "features")]
    (before,) = served.run(calls)
    with torch.no_grad():
        served.model.norm.bias.add_(1.0)
    (after,) = served.run(calls)
    torch.testing.assert_close(after, before + 1.0)


def test_concurrent_calls_get_their_own_answers(client):
    encoded = [encode(picture) for picture in images(24)]
    outputs = ["features", "logits"]
    alone = [
        client.post("/v1/predict", json=as_json([data], output=outputs[i % 2])).json()["values"]
        for i, data in enumerate(encoded)
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(
                lambda i: client.post(
                    "/v1/predict", json=as_json([encoded[i]], output=outputs[i % 2])
                ).json()["values"],
                range(24),
            )
        )
    for one, other in zip(alone, together, strict=True):
        # a batch of another size may add in another order
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)


def test_model_tells_sizes_preprocessing_and_limits(client):
    model = client.get("/v1/model").json()
    assert model["model"] == "tiny"
    assert model["outputs"] == {"features": 48, "logits": 10}
    assert model["preprocessing"]["crop_pct"] == 0.9
    assert model["preprocessing"]["input_size"] == [3, 32, 32]
    assert model["limits"]["images_per_call"] == 32
    assert model["default_output"] == "features"


# decoding


def decoded(data: bytes) -> np.ndarray:
    (image,) = decode_call([data], 25_000_000, 25_000_000)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparency_is_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)]
    expected = [(10, 20, 30), (255, 255, 255), (127, 127, 127)]
    assert decoded(encode(Image.fromarray(rgba))).tolist() == [[list(c) for c in expected]]
    # opaque alpha changes nothing, for every level
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(4, axis=2)
    levels[..., 3] = 255
    assert (decoded(encode(Image.fromarray(levels))) == levels[..., :3]).all()
    # a palette entry that is declared transparent
    palette = noise(random.Random(0), size=(8, 8)).quantize(4)
    assert (decoded(encode(palette, transparency=0))[np.asarray(palette) == 0] == 255).all()


def test_gray_palette_and_cmyk_become_rgb():
    gray = noise(random.Random(0), "L", (5, 4))
    assert (decoded(encode(gray)) == np.asarray(gray)[..., None]).all()
    palette = noise(random.Random(0), size=(8, 8)).quantize(4)
    assert (decoded(encode(palette)) == np.asarray(palette.convert("RGB"))).all()
    cmyk = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(decoded(cmyk).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # the top left quarter is white as a viewer shows it; stored as the tag undoes it
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :24] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright.T[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
        assert np.abs(decoded(data)[..., 0].astype(int) - upright).max() <= 8, kind


def test_damaged_pixels_of_a_png_never_pass():
    data = encode(noise(random.Random(0), size=(40, 40)))
    pixels, rng = decoded(data), random.Random(0)
    begin = data.index(b"IDAT") + 4
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(begin, len(data) - 20)] ^= 1 << rng.randrange(8)
        try:
            assert (decoded(bytes(damaged)) == pixels).all()
        except ApiError as error:
            assert error.status == 400


def test_decoding_stops_at_the_deadline():
    encoded = [encode(picture) for picture in images(3)]
    with pytest.raises(ApiError, match="ran out while decoding") as refusal:
        list(decode_call(encoded, 10**6, 10**6, deadline=time.monotonic() - 1))
    assert refusal.value.status == 503


# refusals


@pytest.mark.parametrize(
    "request_, status, code",
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "bad_request"),
        (
            {"content": b"[" * 10**6, "headers": {"content-type": "application/json"}},
            400,
            "bad_request",
        ),
        ({"json": []}, 400, "bad_request"),
        ({"json": {"images": []}}, 400, "bad_request"),
        ({"json": {"images": "abcd"}}, 400, "bad_request"),
        ({"json": {"images": ["no base64!"]}}, 400, "bad_request"),
        ({"json": {"images": ["é"]}}, 400, "bad_request"),
        ({"json": {"images": [None]}}, 400, "bad_request"),
        ({"json": {"images": ["AAAA"], "output": "tokens"}}, 400, "bad_request"),
        ({"json": {"images": ["AAAA"], "encoding": ["json"]}}, 400, "bad_request"),
        ({"json": {"images": ["AAAA"]}}, 415, "unsupported_image"),
        ({"json": {"images": [""]}}, 415, "unsupported_image"),
        ({"json": {"images": ["AAAA"] * 33}}, 413, "too_many_images"),
        ({"files": as_files([b"AAAA"] * 33)}, 413, "too_many_images"),
        ({"data": {"output": "logits"}, "files": [("x", ("x", b""))]}, 415, "unsupported_image"),
        (
            {"content": b"AAAA", "headers": {"content-type": "image/png"}},
            415,
            "unsupported_media_type",
        ),
        ({"content": b""}, 415, "unsupported_media_type"),
        (
            {"content": b"AAAA", "headers": {"content-type": "multipart/form-data"}},
            400,
            "bad_request",
        ),
        (
            {"content": b"AAAA", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            "bad_request",
        ),
        (
            {
                "content": b'--b\r\ncontent-disposition: form-data; filename="i"\r\n\r\nAA',
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            400,
            "bad_request",
        ),
    ],
)
def test_malformed_calls_are_refused_with_the_reason(client, request_, status, code):
    assert error_of(client.post("/v1/predict", **request_)) == (status, code)


def test_what_is_said_twice_or_behind_the_address_is_refused(client):
    """Which of two tasks is meant cannot be told, and no call is answered for another one."""
    twice = b'{"images": ["AAAA"], "task": "a", "task": "b"}'
    kind = {"content-type": "application/json"}
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    field = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\na\r\n'
    for content, headers in ((twice, kind), (field * 2 + b"--b--\r\n", boundary)):
        answer = client.post("/v1/predict", content=content, headers=headers)
        assert answer.status_code == 400
        assert "'task' is there twice" in answer.json()["error"]["message"]
    answer = client.post("/v1/predict?task=a", files=as_files([encode(images(1)[0])]))
    assert error_of(answer) == (400, "bad_request")
    assert "beside the images in the body" in answer.json()["error"]["message"]
    answer = client.post("/v1/predict?trace=1", files=as_files([encode(images(1)[0])]))
    assert answer.status_code == 200


def test_small_bodies_cannot_become_large_objects(client):
    before = resident_bytes()
    lists = b'{"images": [' + b"[]," * 2_000_000 + b"[]]}"
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/predict", content=lists, headers=headers)
    assert error_of(answer) == (413, "too_many_images")
    fields = {f"field{i}": "x" for i in range(17)}
    answer = client.post("/v1/predict", files=as_files([b"AAAA"]), data=fields)
    assert error_of(answer) == (400, "bad_request")
    assert resident_bytes() - before < 40e6


def test_unknown_routes_answer_in_the_same_form(client):
    assert error_of(client.get("/nothing"))[0] == 404
    assert error_of(client.get("/v1/predict"))[0] == 405


def test_the_refusal_names_the_image(client):
    good, broken = encode(images(1)[0]), encode(images(1, (50, 50))[0])[:-200]
    answer = client.post("/v1/predict", files=as_files([good, broken]))
    assert error_of(answer) == (400, "broken_image")
    assert answer.json()["error"]["message"].startswith("image 1 ")


def test_limits_on_bytes_and_pixels(served):
    settings = ServerSettings(max_call_bytes=5000, max_image_pixels=900, max_call_pixels=1500)
    with TestClient(create_app(served, settings)) as client:

        def post(encoded, **kwargs):
            return client.post("/v1/predict", files=as_files(encoded), **kwargs)

        small = png_of(30, 30, 8, 0, bytes(31 * 30))
        assert post([small]).status_code == 200
        answer = post([png_of(31, 30, 8, 0, bytes(32 * 30))])
        assert error_of(answer) == (413, "too_many_pixels")
        assert "31 × 30 = 930 pixels; this server takes 900" in answer.json()["error"]["message"]
        assert error_of(post([small, small])) == (413, "too_many_pixels")
        assert error_of(post([bytes(5000)])) == (413, "too_many_bytes")

        def pieces():
            yield from [bytes(1000)] * 6

        # without a Content-Length the bytes are counted as they come
        assert error_of(client.post("/v1/predict", content=pieces())) == (413, "too_many_bytes")


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_batch=0 must be above zero"):
        ServerSettings(max_batch=0)
    for endless in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timeout_s={endless} must be a number"):
            ServerSettings(timeout_s=endless)
    with pytest.raises(ValueError, match="can never enter a queue"):
        ServerSettings(max_call_images=500)
    with pytest.raises(ValueError, match="would never be let in"):
        ServerSettings(max_pending_bytes=1000)
    with pytest.raises(ValueError, match="known are features, logits"):
        ServerSettings(default_output="tokens")


def test_a_model_without_classifier_has_no_logits():
    served = load_served_model(tiny_vit(num_classes=0), name="bare")
    with pytest.raises(ValueError, match="bare has no logits"):
        create_app(served, ServerSettings(default_output="logits"))
    with TestClient(create_app(served)) as client:
        call = as_json([encode(images(1)[0])], output="logits")
        assert error_of(client.post("/v1/predict", json=call)) == (400, "no_such_output")


@pytest.mark.parametrize("engine_from", [float("inf"), 0], ids=["timm", "engine"])
def test_a_size_that_the_model_does_not_take_is_refused_at_the_start(monkeypatch, engine_from):
    monkeypatch.setattr(pgn_fast.serve.model, "ENGINE_FROM", engine_from)
    with pytest.raises(ValueError, match="tiny takes no images of 3 × 48 × 48"):
        load_served_model(tiny_vit(), data_args={"input_size": (3, 48, 48)})


def test_the_model_is_frozen_and_untouched(client, served):
    before = {name: value.clone() for name, value in served.model.state_dict().items()}
    client.post("/v1/predict", files=as_files([encode(images(1)[0])]))
    assert not served.model.training
    assert not any(p.requires_grad for p in served.model.parameters())
    for name, value in served.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# abuse


def test_500_odd_images_neither_break_nor_grow_the_server(client):
    good = as_json([encode(images(1)[0])])
    expected = client.post("/v1/predict", json=good).json()
    rng = random.Random(1)
    warmed_up = 0
    for index, (kind, data, allowed) in enumerate(fuzz_cases(500)):
        if index == 150:
            warmed_up = resident_bytes()
        if rng.random() < 0.5:
            answer = client.post("/v1/predict", files=[("x", ("x", data, "text/html"))])
        else:
            answer = client.post("/v1/predict", json=as_json([data]))
        assert answer.status_code in allowed, (kind, answer.text)
        if answer.status_code != 200:
            error_of(answer)
        if index % 5 == 0:
            text = base64.b64encode(data).decode()
            damaged = {"images": [text[: rng.randint(0, len(text))] + rng.choice("!é%\0")]}
            assert client.post("/v1/predict", json=damaged).status_code == 400
            kind = {"content-type": rng.choice(["image/png", "text/html", "", "multipart/mixed"])}
            assert client.post("/v1/predict", content=data, headers=kind).status_code == 415
        if index % 10 == 0:
            assert client.post("/v1/predict", json=good).json() == expected
    assert resident_bytes() - warmed_up < 30e6
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.post("/v1/predict", json=good).json() == expected


def test_ten_times_too_many_calls_get_503_and_the_rest_their_answers(served):
    settings = ServerSettings(max_calls=16, queue_images=16, max_call_images=4, max_batch=4)
    gated = Gated(served)
    app = create_app(gated, settings)
    body = json.dumps(as_json([encode(images(1)[0])])).encode()
    total = 10 * settings.max_calls

    async def storm() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as client,
        ):
            headers = {"content-type": "application/json"}
            calls = [
                asyncio.create_task(client.post("/v1/predict", content=body, headers=headers))
                for _ in range(total)
            ]
            while sum(call.done() for call in calls) < total - settings.max_calls:
                await asyncio.sleep(0.01)
            assert (await client.get("/healthz")).status_code == 200
            gated.gate.set()
            answers = await asyncio.gather(*calls)
            again = await client.post("/v1/predict", content=body, headers=headers)
            text = (await client.get("/metrics")).text
        assert again.status_code == 200
        assert "pgn_fast_calls_in_progress 0.0" in text and "pgn_fast_queue_images 0.0" in text
        return answers

    asyncio.run(storm())  # first of all the clients' and loops' own memory
    before = resident_bytes()
    gated.gate.clear()
    answers = asyncio.run(storm())
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == settings.max_calls
    assert statuses.count(503) == total - settings.max_calls
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert error_of(refused) == (503, "overloaded") and refused.headers["retry-after"] == "1"
    assert resident_bytes() - before < 20e6


def test_idleness_is_noticed_once_after_a_load(served, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.service._IDLE_LOOK_S", 0.05)
    gated, idle = Gated(served), threading.Semaphore(0)
    with (
        TestClient(create_app(gated, on_idle=idle.release)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        for _ in range(2):
            gated.gate.clear()
            # neither before the first call nor again after one, nor in the middle of it
            assert not idle.acquire(timeout=0.3)
            call = pool.submit(client.post, "/v1/predict", json=as_json([encode(images(1)[0])]))
            assert not idle.acquire(timeout=0.3)
            gated.gate.set()
            assert call.result().status_code == 200
            assert idle.acquire(timeout=10)


def test_bodies_in_progress_are_bounded_in_bytes(served):
    settings = ServerSettings(max_call_bytes=1000, max_pending_bytes=1500)
    gated = Gated(served)
    with TestClient(create_app(gated, settings)) as client, ThreadPoolExecutor(1) as pool:
        body = as_json([png_of(20, 20, 8, 0, bytes(21 * 20)) + bytes(500)])
        first = pool.submit(client.post, "/v1/predict", json=body)
        while "pgn_fast_calls_in_progress 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        assert error_of(client.post("/v1/predict", json=body)) == (503, "overloaded")
        gated.gate.set()
        assert first.result().status_code == 200


def test_a_call_that_takes_too_long_gets_503(served):
    gated = Gated(served)
    with TestClient(create_app(gated, ServerSettings(timeout_s=1.0))) as client:
        call = as_json([encode(images(1)[0])])
        assert error_of(client.post("/v1/predict", json=call)) == (503, "timeout")
        gated.gate.set()
        assert client.post("/v1/predict", json=call).status_code == 200


def test_a_failing_model_answers_500_and_the_server_goes_on(served, monkeypatch):
    with TestClient(create_app(served)) as client:
        call = as_json([encode(images(1)[0])])
        nan = torch.full((1, 48), float("nan"))
        for failing in (lambda levels: 1 / 0, lambda levels: nan):
            with monkeypatch.context() as patch:
                patch.setitem(served.passes, "features", failing)
                for encoding in ("json", "base64"):
                    answer = client.post("/v1/predict", json={**call, "encoding": encoding})
                    assert error_of(answer) == (500, "internal")
        assert client.post("/v1/predict", json=call).status_code == 200


def test_metrics_count_what_happened(served):
    with TestClient(create_app(served)) as client:
        encoded = [encode(picture) for picture in images(3)]
        for _ in range(2):
            assert client.post("/v1/predict", json=as_json(encoded)).status_code == 200
        client.post("/v1/predict", content=b"")
        text = client.get("/metrics").text

    def value(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    assert value('pgn_fast_calls_total{status="200"}') == 2
    assert value('pgn_fast_calls_total{status="415"}') == 1
    assert value("pgn_fast_images_total") == 6
    assert value('pgn_fast_batch_images_bucket{le="2.0"}') == 0
    assert value('pgn_fast_batch_images_bucket{le="4.0"}') == 2
    assert value("pgn_fast_call_seconds_count") == 3
    for stage in ("read", "decode", "predict", "answer", "model"):
        assert value(f'pgn_fast_stage_seconds_count{{stage="{stage}"}}') >= 2


# batching


def sums(calls):
    return [torch.tensor([[float(level.sum())] for level in levels]) for levels, _ in calls]


def levels_of(*values: int) -> list[np.ndarray]:
    return [np.full((1, 1, 1), value, np.uint8) for value in values]


def test_batches_fill_up_while_the_model_is_busy():
    sizes: list[int] = []
    gate = threading.Event()

    def run(calls):
        gate.wait(20)
        return sums(calls)

    batcher = Batcher(
        run, max_batch=4, max_wait=0.0, capacity=20, observe_batch=lambda n, s: sizes.append(n)
    )
    first = batcher.submit(levels_of(9), "features")
    while batcher.depth:
        time.sleep(0.001)
    others = [batcher.submit(levels_of(value), "features") for value in range(9)]
    gate.set()
    assert first.result(5).tolist() == [[9.0]]
    assert [other.result(5).item() for other in others] == list(range(9))
    batcher.close()
    assert sizes == [1, 4, 4, 1]


def test_a_batch_waits_for_others_but_not_for_long():
    sizes: list[int] = []
    batcher = Batcher(
        sums, max_batch=8, max_wait=1.5, capacity=20, observe_batch=lambda n, s: sizes.append(n)
    )
    results = [batcher.submit(levels_of(i, i + 1), "features") for i in range(4)]
    assert [result.result(1.2).tolist() for result in results] == [
        [[float(i)], [float(i + 1)]] for i in range(4)
    ]
    lonely = batcher.submit(levels_of(1), "features")
    assert lonely.result(5).tolist() == [[1.0]]
    batcher.close()
    assert sizes == [8, 1]


def test_a_full_queue_refuses_and_a_closing_one_answers_what_it_took():
    gate = threading.Event()

    def run(calls):
        gate.wait(20)
        return sums(calls)

    batcher = Batcher(run, max_batch=2, max_wait=0.0, capacity=4, workers=1)
    taken = [batcher.submit(levels_of(0, 1), "features")]
    while batcher.depth:
        time.sleep(0.001)
    taken += [batcher.submit(levels_of(2, 3), "features") for _ in range(2)]
    with pytest.raises(ApiError, match="4 images wait already") as refusal:
        batcher.submit(levels_of(1), "features")
    assert (refusal.value.status, refusal.value.retry_after) == (503, 1)
    taken[2].cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        time.sleep(0.001)
    with pytest.raises(ApiError, match="shutting down"):
        batcher.submit(levels_of(1), "features")
    gate.set()
    closing.join(5)
    assert [call.result(0).tolist() for call in taken[:2]] == [[[0.0], [1.0]], [[2.0], [3.0]]]
    assert taken[2].cancelled()


def test_a_batch_that_fails_does_not_stop_the_worker():
    def run(calls):
        if calls[0][1] == "logits":
            raise RuntimeError("broken")
        return sums(calls)

    batcher = Batcher(run, max_batch=1, max_wait=0.0, capacity=4)
    with pytest.raises(RuntimeError, match="broken"):
        batcher.submit(levels_of(1), "logits").result(5)
    assert batcher.submit(levels_of(1), "features").result(5).tolist() == [[1.0]]
    batcher.close()


def test_a_call_that_fails_does_not_fail_the_others_of_its_batch():
    sizes: list[int] = []

    def run(calls):
        sizes.append(len(calls))
        if any(key == "logits" for _, key in calls):
            raise RuntimeError("broken")
        return sums(calls)

    batcher = Batcher(run, max_batch=3, max_wait=5.0, capacity=4)
    keys = ("features", "logits", "features")
    results = [batcher.submit(levels_of(i), key) for i, key in enumerate(keys)]
    assert [results[i].result(5).tolist() for i in (0, 2)] == [[[0.0]], [[2.0]]]
    with pytest.raises(RuntimeError, match="broken"):
        results[1].result(5)
    batcher.close()
    assert sizes == [3, 1, 1, 1]
