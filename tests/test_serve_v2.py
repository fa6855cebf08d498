"""The Open Inference Protocol, by its official client and by hand."""

from __future__ import annotations

import base64
import json
import struct
import time
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from odd_images import encode
from serving import images, serving, tiny_vit
from starlette.testclient import TestClient

import pgn_fast
from pgn_fast.adapters import save_pretrained
from pgn_fast.backbone.load import load_backbone
from pgn_fast.serve import create_app, load_served_model, load_served_tasks

HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    backbone = load_backbone("pgn_demo_vit")
    for name, classes in (("pets", ["cat", "dög"]), ("food", ["x", "y", "z"])):
        torch.manual_seed(len(classes))
        model = pgn_fast.VPT(backbone, len(classes), num_prompts=2)
        torch.nn.init.normal_(model.head.weight)
        save_pretrained(model, folder / name, class_names=classes)
    return load_served_tasks(folder, watch_s=0)


@pytest.fixture(scope="module")
def client(tasks):
    with TestClient(create_app(tasks)) as client:
        yield client


def of_v1(client, encoded: list[bytes], task: str) -> dict:
    texts = [base64.b64encode(data).decode() for data in encoded]
    return client.post("/v1/predict", json={"images": texts, "task": task}).json()


def tensor(data: list | None, shape: list[int], **changed) -> dict:
    return {"name": "images", "datatype": "BYTES", "shape": shape, "data": data, **changed}


# the official client


@pytest.mark.parametrize("binary_in", [True, False], ids=["bytes-in", "json-in"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["bytes-out", "json-out"])
def test_tritons_client_gets_the_same_answer(tasks, client, binary_in, binary_out):
    http = pytest.importorskip("tritonclient.http")
    encoded = [encode(picture) for picture in images(3, (40, 40))]
    expected = of_v1(client, encoded, "pets")
    with serving(create_app(tasks)) as (url, _):
        triton = http.InferenceServerClient(urlsplit(url).netloc)
        assert triton.is_server_live()
        end = time.monotonic() + 20
        while not triton.is_server_ready() and time.monotonic() < end:
            time.sleep(0.01)
        assert triton.is_server_ready()
        assert triton.is_model_ready("pets") and triton.is_model_ready("pets", "1")
        assert not triton.is_model_ready("nothing")
        about = triton.get_model_metadata("food")
        assert [(o["name"], o["shape"]) for o in about["outputs"]] == [
            ("logits", [-1, 3]),
            ("probabilities", [-1, 3]),
            ("labels", [-1]),
        ]
        assert triton.get_server_metadata()["name"] == "pgn_fast"

        given = encoded if binary_in else [base64.b64encode(data) for data in encoded]
        sent = http.InferInput("images", [3], "BYTES")
        sent.set_data_from_numpy(np.array(given, dtype=object), binary_data=binary_in)
        names = ("logits", "probabilities", "labels")
        wanted = [http.InferRequestedOutput(name, binary_data=binary_out) for name in names]
        result = triton.infer("pets", [sent], outputs=wanted, request_id="call 7")
        answer = result.get_response()
        assert (answer["id"], answer["model_name"]) == ("call 7", "pets")
        np.testing.assert_allclose(result.as_numpy("logits"), expected["values"], atol=1e-5)
        best = [image[0] for image in expected["predictions"]]
        labels = [
            label.decode() if isinstance(label, bytes) else label
            for label in result.as_numpy("labels").tolist()
        ]
        assert labels == [each["label"] for each in best]
        highest = result.as_numpy("probabilities").max(axis=1)
        np.testing.assert_allclose(highest, [each["probability"] for each in best], atol=1e-5)
        assert result.as_numpy("logits").dtype == np.float32

        with pytest.raises(http.InferenceServerException, match="there is no model 'nothing'"):
            triton.infer("nothing", [sent])
        triton.close()


@pytest.mark.parametrize("name", ["tiny", "hf-hub:timm/tiny.infer"])
def test_tritons_client_asks_for_a_models_features(name):
    http = pytest.importorskip("tritonclient.http")
    served = load_served_model(tiny_vit(), name=name)
    encoded = [encode(images(1)[0])]
    with serving(create_app(served)) as (url, _):
        triton = http.InferenceServerClient(urlsplit(url).netloc)
        sent = http.InferInput("images", [1], "BYTES")
        sent.set_data_from_numpy(np.array(encoded, dtype=object))
        assert triton.infer(name, [sent]).as_numpy("features").shape == (1, 48)
        logits = [http.InferRequestedOutput("logits")]
        assert triton.infer(name, [sent], outputs=logits).as_numpy("logits").shape == (1, 10)
        assert triton.get_model_metadata(name)["name"] == name
        end = time.monotonic() + 20
        while not triton.is_server_ready() and time.monotonic() < end:
            time.sleep(0.01)
        assert triton.is_model_ready(name, "1") and not triton.is_model_ready("nothing")
        triton.close()
        encoded_name = name.replace("/", "%2F")
        with urlopen(f"{url}/v2/models/{encoded_name}/versions/1") as answer:
            assert json.load(answer)["name"] == name
        # the end of a path belongs to no name
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{url}/v2/models/{name}/nothing")


# by hand


def test_probes_and_versions(client):
    assert client.get("/v2/health/live").status_code == 200
    assert client.head("/v2/health/ready").status_code in (200, 503)
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/models/pets/versions/1").json()["versions"] == ["1"]
    for path in ("/v2/models/pets/versions/2", "/v2/models/nothing", "/v2/nothing"):
        answer = client.get(path)
        assert answer.status_code == 404 and isinstance(answer.json()["error"], str)


def test_default_outputs_and_a_column_of_images(client):
    texts = [base64.b64encode(encode(p)).decode() for p in images(2)]
    for shape in ([2], [2, 1]):
        answer = client.post("/v2/models/food/infer", json={"inputs": [tensor(texts, shape)]})
        # all of them, as the protocol says of a call that names none
        assert [(o["name"], o["shape"], len(o["data"])) for o in answer.json()["outputs"]] == [
            ("logits", [2, 3], 6),
            ("probabilities", [2, 3], 6),
            ("labels", [2], 2),
        ]


@pytest.mark.parametrize(
    "call, status, words",
    [
        ([], 400, "must be a JSON object"),
        ({}, 400, "needs one input"),
        ({"inputs": [tensor(["AAAA"], [1])] * 2}, 400, "needs one input"),
        ({"inputs": ["images"]}, 400, "needs one input"),
        ({"inputs": [tensor(["AAAA"], [1], datatype="FP32")]}, 400, "'images' of 'BYTES'"),
        ({"inputs": [tensor(["AAAA"], [1], name="image")]}, 400, "'images' of 'BYTES'"),
        ({"inputs": [tensor(["AAAA"], [2])]}, 400, "shape is [2], the tensor has 1 images"),
        ({"inputs": [tensor([], [0])]}, 400, "has no image"),
        ({"inputs": [tensor(None, [1])]}, 400, "neither data nor binary_data_size"),
        ({"inputs": [tensor(["!"], [1])]}, 400, "image 0 is not base64"),
        ({"inputs": [tensor(["AAAA"], [1])]}, 415, "image 0 is not PNG, JPEG or WebP"),
        ({"inputs": [tensor(["AAAA"] * 33, [33])]}, 413, "takes 32 a call"),
        (
            {"inputs": [tensor(["AAAA"], [1])], "outputs": [{"name": "features"}]},
            400,
            "food has logits, probabilities, labels",
        ),
        ({"inputs": [tensor(["AAAA"], [1])], "outputs": 7}, 400, "outputs must be a list"),
        (
            {"inputs": [tensor(None, [1], parameters={"binary_data_size": 9})]},
            400,
            "binary_data_size is 9, 0 bytes follow",
        ),
    ],
)
def test_malformed_calls_are_refused_in_the_protocols_form(client, call, status, words):
    answer = client.post("/v2/models/food/infer", json=call)
    error = answer.json()["error"]
    assert answer.status_code == status and isinstance(error, str) and words in error


def binary(header: dict, data: bytes, length: object = None) -> dict:
    text = json.dumps(header).encode()
    return {
        "content": text + data,
        "headers": {HEADER: str(len(text) if length is None else length)},
    }


@pytest.mark.parametrize(
    "data, words",
    [
        (struct.pack("<I", 10) + b"short", "states 10 bytes, 5 follow"),
        (b"\x01\x00", "in the middle of a length"),
        (struct.pack("<I", 0) * 40, "takes 32 a call"),
        (b"", "shape is [1], the tensor has 0 images"),
    ],
)
def test_malformed_binary_tensors_are_refused(client, data, words):
    about = tensor(None, [1], parameters={"binary_data_size": len(data)})
    answer = client.post("/v2/models/food/infer", **binary({"inputs": [about]}, data))
    assert answer.status_code in (400, 413) and words in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "1000000", "x", ""])
def test_a_wrong_header_length_is_refused(client, length):
    answer = client.post("/v2/models/food/infer", **binary({}, b"", length))
    assert answer.status_code == 400 and HEADER in answer.json()["error"]


def test_compressed_bodies_are_refused(client):
    answer = client.post(
        "/v2/models/food/infer", content=b"x", headers={"Content-Encoding": "gzip"}
    )
    assert answer.status_code == 415 and "uncompressed" in answer.json()["error"]


def test_two_passes_at_once_are_refused():
    served = load_served_model(tiny_vit(), name="tiny")
    with TestClient(create_app(served)) as client:
        outputs = [{"name": "features"}, {"name": "logits"}]
        call = {"inputs": [tensor(["AAAA"], [1])], "outputs": outputs}
        answer = client.post("/v2/models/tiny/infer", json=call)
        assert answer.status_code == 400 and "two passes" in answer.json()["error"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"outputs": [{"name": "logits", "parameters": {"classification": 2}}]}, "classification"),
        (
            {"outputs": [{"name": "logits", "parameters": {"shared_memory_region": "r"}}]},
            "shared_memory_region",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"binary_data": "yes"}}]},
            "binary_data is 'yes'",
        ),
    ],
)
def test_an_output_in_a_form_that_is_not_known_is_refused(client, changed, message):
    call = {"inputs": [tensor(["AAAA"], [1])], **changed}
    answer = client.post("/v2/models/pets/infer", json=call)
    assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text


def test_bytes_that_belong_to_no_input_are_refused(client):
    text = json.dumps({"inputs": [tensor(["AAAA"], [1])]}).encode()
    headers = {HEADER: str(len(text))}
    answer = client.post("/v2/models/pets/infer", content=text + b"left over", headers=headers)
    assert answer.status_code == 400 and "9 bytes follow the JSON" in answer.json()["error"]


def test_a_header_length_of_thousands_of_digits_is_refused(client):
    answer = client.post("/v2/models/pets/infer", content=b"{}", headers={HEADER: "1" * 5000})
    assert answer.status_code == 400 and "the body has 2 bytes" in answer.json()["error"]
