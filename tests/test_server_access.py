"""Who may call the server, what each answer carries, and what the server writes of it."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings

import pytest
from odd_images import encode
from serving import as_json, images, tiny_vit
from starlette.testclient import TestClient

from pgn_fast.errors import UserError
from pgn_fast.serve import (
    ApiError,
    ServedModel,
    ServerSettings,
    create_app,
    load_served_model,
    run_server,
)
from pgn_fast.serve.access import AllowedHosts, Tokens
from pgn_fast.serve.body import parse_call
from pgn_fast.serve.logs import JsonLines, OncePerMinute, TextLines


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model(tiny_vit())


@pytest.fixture(scope="module")
def client(served):
    with TestClient(create_app(served)) as client:
        yield client


def status_of(hosts: AllowedHosts, host: str, origin: str | None = None) -> int:
    try:
        hosts.check(host, origin)
    except ApiError as error:
        return error.status
    return 200


# names


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.0.2.3", 200),
        ("api.example.com", 200),
        ("a.b.example.org:80", 200),
        ("example.org", 421),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("notexample.org", 421),
        ("", 400),
        (":8000", 400),
        ("localhost:port", 400),
        ("[::1", 400),
        ("[localhost]", 400),
        ("user@localhost", 400),
        ("localhost/path", 400),
    ],
)
def test_a_server_answers_to_its_own_names_only(host, status):
    hosts = AllowedHosts.of_server("127.0.0.1", ["api.example.com", "*.example.org"])
    assert status_of(hosts, host) == status


def test_a_server_that_others_reach_answers_to_the_machines_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "worker-7")
    assert status_of(AllowedHosts.of_server("0.0.0.0"), "worker-7:80") == 200
    assert status_of(AllowedHosts.of_server("127.0.0.1"), "worker-7:80") == 421
    assert status_of(AllowedHosts.of_server("127.0.0.1", ["*"]), "evil.example") == 200
    assert status_of(AllowedHosts(), "evil.example") == 200


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_strangers_may_not_call(origin, status):
    assert status_of(AllowedHosts.of_server("127.0.0.1"), "localhost", origin) == status


def test_a_wrong_name_is_refused_before_the_body_but_probes_are_answered(served):
    app = create_app(served, hosts=AllowedHosts.of_server("127.0.0.1"))
    with TestClient(app, base_url="http://evil.example") as client:
        answer = client.post("/v1/predict", content=b"x")
        assert answer.status_code == 421 and answer.json()["error"]["code"] == "wrong_host"
        assert "--allowed-host" in answer.json()["error"]["message"]
        assert client.get("/v1/model").status_code == 421
        assert client.get("/healthz").status_code == 200


# tokens


def test_calls_need_a_token_and_probes_none(served, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# this week's\nsesame\n\nold one\n")
    file.chmod(0o600)
    with TestClient(create_app(served, tokens=Tokens(file))) as client:
        call = as_json([encode(images(1)[0])])

        def status(authorization: str | None) -> int:
            headers = {} if authorization is None else {"Authorization": authorization}
            return client.post("/v1/predict", json=call, headers=headers).status_code

        assert status("Bearer sesame") == status("bearer  old one") == 200
        for wrong in (None, "", "Bearer", "Bearer ", "Bearer sesam", "Basic sesame", "sesame"):
            assert status(wrong) == 401, wrong
        assert status("Bearer # this week's") == 401
        refused = client.get("/metrics")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "unauthorized"
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code in (200, 503)


def test_a_changed_token_file_is_read_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pgn_fast.serve.access._LOOK_S", 0.0)
    file = tmp_path / "tokens"
    file.write_text("one\n")
    file.chmod(0o600)
    tokens = Tokens(file)
    tokens.check("Bearer one")
    file.write_text("another\n")
    tokens.check("Bearer another")
    with pytest.raises(ApiError):
        tokens.check("Bearer one")
    # other tokens of the same size, copied with the time of the old ones
    status = file.stat()
    file.write_text("revoked\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    tokens.check("Bearer revoked")
    file.write_text("another\n")
    tokens.check("Bearer another")
    # a file that is half written, a pipe or gone leaves the tokens in use
    damages = [lambda: file.write_text("\n"), file.unlink]
    if hasattr(os, "mkfifo"):
        damages.append(lambda: os.mkfifo(file))
    for damage in damages:
        damage()
        caplog.clear()
        tokens.check("Bearer another")
        assert "the tokens in use stay" in caplog.text


def test_token_files_that_cannot_serve_are_refused(tmp_path, caplog):
    with pytest.raises(UserError, match="No such file"):
        Tokens(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(UserError, match="must hold one token a line"):
        Tokens(empty)
    for data in (b"se\0cret", "secret\n".encode("utf-16"), "secret\n".encode("utf-16-le")):
        empty.write_bytes(data)  # no header carries it
        with pytest.raises(UserError, match="more than printable ASCII"):
            Tokens(empty)
    empty.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # an editor's
    for token in ("one", "two"):
        Tokens(empty).check(f"Bearer {token}")
    with pytest.raises(UserError, match="is no plain file"):
        Tokens(tmp_path)
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="pipe is no plain file"):
            Tokens(tmp_path / "pipe")
        caplog.clear()
        empty.write_text("secret\n")
        empty.chmod(0o644)
        Tokens(empty)
        assert f"{empty} can be read by others (mode 644)" in caplog.text
        assert "secret" not in caplog.text


# routes and what answers carry


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v1/model", "/metrics", "/v2", "/v2/models/tiny"]
)
def test_head_is_answered_where_get_is(client, path):
    end = time.monotonic() + 20
    while client.get("/readyz").status_code != 200 and time.monotonic() < end:
        time.sleep(0.01)
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.head("/v1/predict").status_code == client.get("/v1/predict").status_code == 405


def test_no_page_loads_scripts_from_elsewhere(client):
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404
    assert "/v1/predict" in client.get("/openapi.json").json()["paths"]


def test_a_last_slash_gets_the_usual_form_and_not_a_redirect(client):
    answer = client.post("/v1/predict/", content=b"", follow_redirects=False)
    assert answer.status_code == 404
    assert (
        answer.json()["error"]["message"] == "there is no /v1/predict/. Leave out the last slash."
    )
    assert client.delete("/v1/model").headers["allow"] in ("GET", "HEAD", "GET, HEAD")


def test_not_ready_before_the_model_is_warm(served, monkeypatch):
    import threading

    gate, sizes = threading.Event(), []

    def warm_up(max_batch: int) -> None:
        gate.wait(20)
        sizes.append(max_batch)

    monkeypatch.setattr(served, "warm_up", warm_up)
    with TestClient(create_app(served)) as client:
        assert client.get("/readyz").json() == {"status": "warming up"}
        assert client.get("/healthz").status_code == 200
        gate.set()
        end = time.monotonic() + 20
        while client.get("/readyz").status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert client.get("/readyz").json() == {"status": "ready"} and sizes == [32]

    monkeypatch.setattr(served, "warm_up", lambda max_batch: 1 / 0)
    with TestClient(create_app(served)) as client:
        time.sleep(0.2)
        assert client.get("/readyz").status_code == 503


def test_the_warm_up_runs_every_output_at_both_ends_of_the_batch_sizes(served, monkeypatch):
    seen = []
    monkeypatch.setattr(
        served, "run", lambda calls: seen.append((len(calls[0][0]), calls[0][1])) or []
    )
    served.warm_up(5)
    assert sorted(seen) == [(1, "features"), (1, "logits"), (5, "features"), (5, "logits")]


def test_every_answer_has_an_id(client):
    first, second = (client.get("/v1/model").headers["x-request-id"] for _ in range(2))
    assert first != second and len(first) == 32
    for path in ("/v1/model", "/nothing"):
        answer = client.get(path, headers={"X-Request-Id": "call:7.a-b_c"})
        assert answer.headers["x-request-id"] == "call:7.a-b_c"
    for strange in ("a b", "x" * 65, 'a"b', ""):
        answer = client.get("/v1/model", headers={"X-Request-Id": strange})
        assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    "disposition",
    [
        "form-data; name=x; filename=a.png",
        "form-data; name=x; filename*=UTF-8''%e2%82%ac.png",
        "form-data; name=x; FileName*=utf-8'en'a.png",
        'form-data; name=x; filename*0="a"; filename*1="b.png"',
        "form-data; filename*=UTF-8''a; name=x",
    ],
)
def test_every_way_to_name_a_file_makes_it_an_image(disposition):
    body = f"--b\r\nContent-Disposition: {disposition}\r\n\r\nDATA\r\n--b--\r\n".encode()
    call = parse_call(
        "multipart/form-data; boundary=b", body, default_output="features", max_images=1
    )
    assert call.images == [b"DATA"]


def test_a_field_whose_name_looks_like_a_file_is_a_field():
    body = b'--b\r\nContent-Disposition: form-data; name="x; filename*=y"\r\n\r\nDATA\r\n--b--\r\n'
    with pytest.raises(ApiError, match="has no image"):
        parse_call("multipart/form-data; boundary=b", body, default_output="", max_images=1)


# the log


def record(message: str, level: int = logging.WARNING, line: int = 1, **extra) -> logging.LogRecord:
    made = logging.LogRecord("pgn_fast.x", level, __file__, line, message, (), None)
    made.__dict__.update(extra)
    return made


def test_the_same_warning_is_written_once_a_minute_with_a_count():
    now = [0.0]
    once = OncePerMinute(lambda: now[0])
    assert once.filter(record("flood"))
    assert not any(once.filter(record("flood")) for _ in range(999))
    assert once.filter(record("another place", line=2))
    about = [once.filter(record("task", line=3, about=name)) for name in ("a", "b", "a")]
    assert about == [True, True, False]
    assert all(once.filter(record("call", logging.INFO)) for _ in range(5))
    now[0] = 61.0
    late = record("flood")
    assert once.filter(late)
    assert late.getMessage() == "flood (999 more like this since the last line)"


def test_warnings_are_lines_of_the_log(caplog):
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        patched.setattr("pgn_fast.serve.server.create_app", lambda *args, **more: None)
        patched.setattr("pgn_fast.serve.server.logging.config.dictConfig", lambda config: None)
        patched.setattr("pgn_fast.serve.server.torch.set_num_threads", lambda count: None)
        patched.setattr("pgn_fast.serve.server.Server", lambda *args: Warns())
        run_server(None, ServerSettings())
    (line,) = [r for r in caplog.records if r.getMessage() == "an odd file"]
    assert (line.levelno, line.about) == (logging.WARNING, "an odd file")


class Warns:
    def listen(self, host: str, port: int) -> bool:
        warnings.warn("an odd file", stacklevel=1)
        return False


def test_lines_are_json_objects_or_text_on_one_line():
    facts = {"request_id": "r", "path": "/a\nb", "status": 200}
    line = JsonLines().format(record("call", logging.INFO, facts=facts))
    assert "\n" not in line
    parsed = json.loads(line)
    assert {k: parsed[k] for k in facts} == facts and parsed["level"] == "info"
    text = TextLines().format(record("call", logging.INFO, facts=facts))
    assert text.endswith('INFO call request_id="r" path="/a\\nb" status=200')


def test_a_call_is_one_line_with_its_facts(client, caplog):
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    with caplog.at_level(logging.INFO, "pgn_fast.access"):
        client.get("/v1/model?secret=1", headers={"X-Request-Id": "r1", "traceparent": trace})
    (line,) = (each for each in caplog.records if each.name == "pgn_fast.access")
    facts = line.facts
    assert facts.pop("seconds") >= 0
    assert facts == {
        "request_id": "r1",
        "client": "testclient",
        "method": "GET",
        "path": "/v1/model",
        "status": 200,
        "trace_id": "0123456789abcdef0123456789abcdef",
    }
