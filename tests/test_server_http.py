"""Calls that are no HTTP, or lie about themselves, on connections that stay or end in between."""

from __future__ import annotations

import json
import logging
import socket
from contextlib import suppress

import pytest
from odd_images import encode
from serving import as_json, connect, guarded, images, tiny_vit

from pgn_fast.serve import create_app, load_served_model
from pgn_fast.serve.access import AllowedHosts

BODY = json.dumps(as_json([encode(images(1)[0])])).encode()
OWN = b"Host: 127.0.0.1\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def url():
    app = create_app(load_served_model(tiny_vit()), hosts=AllowedHosts.of_server("127.0.0.1"))
    with guarded(app) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def no_error(caplog):
    """Whatever a peer sends, it is no error of the server: no line, and so no traceback."""
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


def post(headers: bytes, body: bytes, path: bytes = b"/v1/predict", host: bytes = OWN) -> bytes:
    kind = b"Content-Type: application/json\r\n"
    return b"POST %s HTTP/1.1\r\n%s%s%s\r\n%s" % (path, host, kind, headers, body)


def get(path: bytes, host: bytes = OWN, method: bytes = b"GET") -> bytes:
    return b"%s %s HTTP/1.1\r\n%s\r\n" % (method, path, host)


def answers(connection: socket.socket, methods: str = "") -> list[tuple[int, bytes, bool]]:
    """Status, body and "it closes the connection" of all answers until the server is done."""
    found, file = [], connection.makefile("rb")
    while line := file.readline():
        status, length, closes = int(line.split()[1]), 0, False
        while (header := file.readline().strip().lower()) not in (b"", b"\r\n"):
            name, _, value = header.partition(b":")
            length = int(value) if name == b"content-length" else length
            closes |= (name, value.strip()) == (b"connection", b"close")
        if methods[len(found) : len(found) + 1] != "H":
            found.append((status, file.read(length), closes))
        else:
            found.append((status, b"", closes))
    return found


def exchange(url: str, *parts: bytes, methods: str = "") -> list[tuple[int, bytes, bool]]:
    """What a connection gets for these parts; each is sent when the answer before it has come."""
    with connect(url) as connection:
        for part in parts[:-1]:
            connection.sendall(part)
            connection.recv(1, socket.MSG_PEEK)
        # the server may have ended it already; what it said before is there
        with suppress(ConnectionError):
            connection.sendall(parts[-1])
        with suppress(ConnectionError):
            return answers(connection, methods)
    return []


# what is no HTTP


@pytest.mark.parametrize(
    "call, status, words",
    [
        pytest.param(b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", 400, "illegal request line", id="tls"),
        pytest.param(b"GET /healthz\r\n\r\n", 400, "illegal request line", id="http-0.9"),
        pytest.param(get(b"/healthz", b""), 400, "Host", id="no-host"),
        pytest.param(get(b"/healthz", OWN * 2), 400, "Host", id="two-hosts"),
        pytest.param(post(b"Content-Length: -5\r\n", BODY), 400, "Content-Length", id="negative"),
        pytest.param(post(LENGTH + b"Content-Length: 3\r\n", BODY), 400, "conflicting", id="two"),
        pytest.param(post(b"Content-Length: " + b"9" * 40 + b"\r\n", b""), 400, "", id="endless"),
        pytest.param(post(b"Transfer-Encoding: gzip\r\n", BODY), 501, "chunked", id="gzip"),
        pytest.param(post(CHUNKED, b"zz\r\n"), 400, "illegal chunk header", id="no-size"),
        pytest.param(post(CHUNKED, b"-5\r\nabc"), 400, "illegal chunk header", id="below-zero"),
        pytest.param(post(CHUNKED, b"1\r\n{XX"), 400, "", id="longer-than-it-says"),
        pytest.param(get(b"/", b"X: " + b"a" * 20_000), 431, "too long", id="long-headers"),
    ],
)
def test_what_is_no_http_is_refused_in_the_usual_form(url, call, status, words):
    ((got, body, closes),) = exchange(url, call)
    error = json.loads(body)["error"]
    assert (got, error["code"], closes) == (status, "bad_http", True)
    assert error["message"].startswith("this is no HTTP/1.1 call: ") and words in error["message"]


@pytest.mark.parametrize("bad", [b"zz\r\n", b"\r\n\r\n"], ids=["size", "lines"])
def test_a_body_that_breaks_after_its_answer_ends_the_connection(url, bad):
    """The call was refused before its body was read; there is no second answer to it."""
    call = post(CHUNKED, b"1\r\n{\r\n", path=b"/nothing")
    assert [status for status, *_ in exchange(url, call, bad)] == [404]
    # or before anybody has looked at the call
    assert [status for status, *_ in exchange(url, call + bad)] == [400]


def test_what_follows_a_call_may_be_no_http(url):
    found = exchange(url, post(LENGTH, BODY) + b"\0garbage\r\n\r\n")
    assert [(status, closes) for status, _, closes in found] == [(200, False), (400, True)]


# what lies, or is unusual


def test_two_lengths_are_refused_and_nothing_that_follows_is_read(url):
    """What is a second call to a proxy that believed the one must not be the first one's body."""
    hidden = b"0\r\n\r\n" + get(b"/healthz")
    lying = post(CHUNKED + b"Content-Length: %d\r\n" % len(hidden), hidden)
    ((status, body, closes),) = exchange(url, lying)
    assert (status, closes) == (400, True)
    assert "by Transfer-Encoding and by Content-Length" in json.loads(body)["error"]["message"]


def test_pipelined_calls_are_answered_in_their_order(url):
    calls = [
        get(b"/healthz"),
        post(LENGTH, BODY),
        get(b"/v1/tasks/none", method=b"HEAD"),
        post(LENGTH, BODY),
        post(b"", b"", path=b"/nothing"),
        # a server has no other protocol for it
        get(b"/v1/model", OWN + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        get(b"/healthz", OWN + b"Connection: close\r\n"),
    ]
    found = exchange(url, b"".join(calls), methods="GPHPPGG")
    assert [status for status, *_ in found] == [200, 200, 404, 200, 404, 200, 200]
    assert found[1][1] == found[3][1] and b'"values"' in found[1][1]


def test_a_target_may_name_the_server_too(url):
    closing = OWN + b"Connection: close\r\n"
    for target, expected in [
        (url.encode() + b"/v1/tasks", 200),
        (b"HTTP://localhost/%76%31/tasks?x=1", 200),
        # the name in the target is the one that counts
        (b"http://evil.example/v1/tasks", 421),
        (b"http://evil.example/healthz", 200),
        (b"http://localhost", 404),
        (b"ftp://localhost/v1/tasks", 404),
    ]:
        ((status, *_),) = exchange(url, get(target, closing))
        assert status == expected, target


def test_a_promise_is_asked_for_only_where_the_call_is_let_in(url):
    asks = b"Connection: close\r\nExpect: 100-continue\r\n"
    with connect(url) as connection:
        connection.sendall(post(asks + LENGTH, b""))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert answers(connection)[0][0] == 200
    ((status, *_),) = exchange(url, post(asks + b"Content-Length: 999999999\r\n", b""))
    assert status == 413
