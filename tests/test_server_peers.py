"""The server among peers that are silent, slow, many or greedy, and its end while they call."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import pytest
from odd_images import encode
from serving import Gated, as_json, connect, guarded, images, tiny_vit
from starlette.testclient import TestClient

from pgn_fast.serve import ServedModel, ServerSettings, create_app, load_served_model
from pgn_fast.serve.admission import Share, client_of
from pgn_fast.serve.connections import connection_limit
from pgn_fast.serve.fair import FairPool


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model(tiny_vit())


@pytest.fixture(scope="module")
def call() -> bytes:
    return json.dumps(as_json([encode(images(1)[0])])).encode()


def honest(url: str, call: bytes) -> int:
    kind = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{url}/v1/predict", call, kind)
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def head(length: int | None) -> bytes:
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return (
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + size
        + b"\r\n\r\n"
    )


# silent and slow peers


@pytest.mark.parametrize(
    "count, opening",
    [
        pytest.param(16, head(16 << 20) + b"{", id="16-promise-all-bytes"),
        pytest.param(80, head(10) + b"{", id="more-than-all-calls-promise-ten-bytes"),
        pytest.param(80, head(None) + b"1\r\n{\r\n", id="chunks-that-never-end"),
        pytest.param(80, b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-a: ", id="headers"),
        pytest.param(80, b"", id="nothing"),
    ],
)
def test_silent_peers_take_nothing_from_others(served, call, count, opening):
    with guarded(create_app(served)) as (url, _), ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(url)).sendall(opening)
        assert [honest(url, call) for _ in range(3)] == [200] * 3


def test_bodies_that_stop_before_their_end_make_way(served, call):
    """They hold all bytes that may be pending, each of them but the last one it promised."""
    settings = ServerSettings(max_call_bytes=50_000, max_pending_bytes=200_000)
    with guarded(create_app(served, settings), settings) as (url, _), ExitStack() as stack:
        sockets = [stack.enter_context(connect(url)) for _ in range(4)]
        for each in sockets:
            each.sendall(head(50_000) + bytes(49_999))
        time.sleep(1.5)
        assert [honest(url, call) for _ in range(3)] == [200] * 3
        assert sockets[0].recv(100).startswith(b"HTTP/1.1 503")


def test_a_body_below_the_minimum_rate_gets_408(served, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.admission.RATE_WINDOW_S", 0.5)
    settings = ServerSettings(min_body_rate=1000)
    with guarded(create_app(served, settings), settings) as (url, _), connect(url) as slow:
        slow.sendall(head(10_000))
        answer = b""
        slow.settimeout(0.1)
        for _ in range(100):
            try:
                slow.sendall(b"{")
                answer += (part := slow.recv(1000))  # head and body may come apart
                if not part or answer.endswith(b"}"):
                    break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408") and b"less than 1000 bytes a second" in answer


def test_a_body_at_the_minimum_rate_is_answered(served, call, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.admission.RATE_WINDOW_S", 0.5)
    settings = ServerSettings(min_body_rate=100)
    with guarded(create_app(served, settings), settings) as (url, _), connect(url) as slow:
        slow.sendall(head(len(call)))
        step = len(call) // 12 + 1
        for at in range(0, len(call), step):
            slow.sendall(call[at : at + step])
            time.sleep(0.12)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("opening", [b"", b"GET /healthz HTTP/1.1\r\nX-a: "], ids=["none", "some"])
def test_headers_that_do_not_come_end_the_connection(served, opening):
    settings = ServerSettings(header_timeout_s=0.5)
    with guarded(create_app(served, settings), settings) as (url, _), connect(url) as slow:
        began = time.monotonic()
        slow.sendall(opening)
        with suppress(ConnectionResetError):
            assert slow.recv(100) == b""
        assert time.monotonic() - began < 8


def test_answers_that_are_not_taken_end_the_connection(served, monkeypatch):
    monkeypatch.setattr("pgn_fast.serve.connections._LOOK_S", 0.2)
    settings = ServerSettings(timeout_s=1.0)
    ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with guarded(create_app(served, settings), settings) as (url, server), connect(url) as deaf:
        deaf.setblocking(False)
        for _ in range(20_000):
            try:
                deaf.send(ask)
            except BlockingIOError:
                break
            except ConnectionError:
                return
        end = time.monotonic() + 15
        while server.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.server_state.connections


# connections


def test_the_most_silent_connections_make_way(served, call, caplog):
    settings = ServerSettings(max_connections=16)
    with guarded(create_app(served, settings), settings) as (url, server), ExitStack() as stack:
        with caplog.at_level(logging.WARNING, "pgn_fast.serve"):
            idle = [stack.enter_context(connect(url)) for _ in range(60)]
            time.sleep(0.6)
            assert [honest(url, call) for _ in range(3)] == [200] * 3
            assert len(server.server_state.connections) <= 16
        assert "16 connections are open" in caplog.text
        for each in idle[:20]:
            with suppress(ConnectionError):
                assert each.recv(1) == b""


def test_connections_in_use_are_not_closed_for_new_ones(served, call):
    settings = ServerSettings(max_connections=8)
    gated = Gated(served)
    with (
        guarded(create_app(gated, settings), settings) as (url, server),
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [pool.submit(honest, url, call) for _ in range(8)]
        while sum(each.phase == "working" for each in server.server_state.connections) < 8:
            time.sleep(0.01)
        with connect(url) as refused:
            assert refused.recv(1000).startswith(b"HTTP/1.1 503")
        gated.gate.set()
        assert [each.result(20) for each in calls] == [200] * 8


def test_the_limit_on_connections_respects_the_processs(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (400, 400))
    monkeypatch.setattr("pgn_fast.serve.connections._open_descriptors", lambda: 54)
    assert connection_limit(512) == 250
    assert connection_limit(100) == 100
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (120, 120))
    with pytest.raises(ValueError, match="may open 120 files"):
        connection_limit(512)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a child process as Linux has them")
def test_the_command_survives_a_lack_of_descriptors_and_ends_with_0(call, tmp_path):
    """180 descriptors, 300 connections: answers, few lines, and exit code 0 after SIGTERM."""
    import resource

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pgn_fast.cli", "serve", "--model", "pgn_demo_vit"]
    flags = ["--device", "cpu", "--port", str(port), "--log-format", "json", "--access-log"]
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as file, ExitStack() as stack:
        server = subprocess.Popen(
            [*command, *flags],
            stderr=file,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (180, 180)),
        )
        stack.callback(server.kill)
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail("the server did not start")
        for _ in range(300):
            stack.enter_context(connect(url)).sendall(b"POST /v1/predict HTTP/1.1\r\nX-a: ")
        time.sleep(1.5)
        assert honest(url, call) == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert 3 < len(lines) < 40
    assert [line["status"] for line in lines if line.get("path") == "/v1/predict"] == [200]
    assert any("draining" in line["message"] for line in lines)
    assert lines[-1]["message"] == "stopped"


# shares of clients


def test_alone_a_client_has_all_beside_others_half_and_newcomers_find_some(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pgn_fast.serve.admission.time.monotonic", lambda: now[0])
    share = Share(16)
    for _ in range(16):
        assert share.fits("a", 1)
        share.take("a", 1)
    assert not share.fits("a", 1)
    # an eighth more, for clients that have none
    for client in ("b", "c"):
        assert share.fits(client, 1)
        share.take(client, 1)
    assert not share.fits("d", 1)
    assert not share.fits("b", 1)
    for _ in range(9):
        share.give_back("a", 1)
    assert share.fits("a", 1) and not share.fits("a", 2)
    now[0] = 60.0
    assert share.fits("a", 7)


def test_one_client_with_all_calls_does_not_shut_out_another(served, call):
    settings = ServerSettings(max_calls=4, queue_images=4, max_call_images=1)
    gated = Gated(served)
    app = create_app(gated, settings)
    kind = {"content-type": "application/json"}
    with (
        TestClient(app, client=("10.0.0.1", 1)) as greedy,
        ThreadPoolExecutor(8) as pool,
    ):
        other = TestClient(app, client=("10.0.0.2", 1))
        other.portal = greedy.portal

        def post(client):
            return client.post("/v1/predict", content=call, headers=kind).status_code

        calls = [pool.submit(post, greedy) for _ in range(4)]
        while "pgn_fast_calls_in_progress 4.0" not in greedy.get("/metrics").text:
            time.sleep(0.01)
        assert post(greedy) == 503
        late = pool.submit(post, other)
        while "pgn_fast_calls_in_progress 5.0" not in greedy.get("/metrics").text:
            time.sleep(0.01)
        gated.gate.set()
        assert [each.result(20) for each in (*calls, late)] == [200] * 5


@pytest.mark.parametrize(
    "host, client",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        (None, ""),
        ("testclient", "testclient"),
    ],
)
def test_clients_are_addresses_and_networks(host, client):
    assert client_of(host) == client


# the pool that decodes


def recording(order: list[str], name: str, steps: int, heavy: bool = True):
    seconds = 0.01
    for _ in range(steps):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        order.append(name)
        yield heavy
    return name


@pytest.mark.parametrize("client", ["same", "other"])
def test_small_work_does_not_wait_for_the_large_before_it(client):
    order: list[str] = []
    pool = FairPool(1, "test", light_threads=0)
    gate = threading.Event()
    blocker = pool.run("blocker", gate.wait, 10)
    large = [pool.submit("same", recording(order, f"large{i}", 20)) for i in range(3)]
    small = pool.submit(client, recording(order, "small", 1))
    gate.set()
    assert small.result(20) == "small" and blocker.result(1)
    assert len(order) < 12 and [each.result(20) for each in large] == ["large0", "large1", "large2"]
    pool.shutdown()


def test_light_steps_have_a_thread_of_their_own():
    pool = FairPool(2, "test")
    gate = threading.Event()

    def heavy():
        yield True
        return gate.wait(20)

    large = [pool.submit("same", heavy()) for _ in range(4)]
    time.sleep(0.1)
    # both other threads are busy for as long as it takes
    assert pool.run("same", sum, [1, 2]).result(10) == 3
    assert not any(each.done() for each in large)
    gate.set()
    assert all(each.result(10) for each in large)
    pool.shutdown()


def test_clients_have_equal_time_however_many_calls_they_have():
    order: list[str] = []
    pool = FairPool(1, "test", light_threads=0)
    gate = threading.Event()
    pool.run("blocker", gate.wait, 10)
    for _ in range(20):
        pool.submit("many", recording(order, "many", 3))
    one = pool.submit("one", recording(order, "one", 15))
    gate.set()
    one.result(20)
    assert order.count("many") < 25
    pool.shutdown()
    assert order.count("many") == 60


def test_large_work_is_not_starved_by_a_stream_of_small():
    order: list[str] = []
    pool = FairPool(1, "test", light_threads=0)
    large = pool.submit("a", recording(order, "large", 20))
    for number in range(500):
        pool.submit("a", recording(order, f"small{number}", 1)).result(20)
        if large.done():
            break
    assert large.done()
    pool.shutdown()


def test_errors_and_cancelled_work_leave_the_threads_alive():
    pool = FairPool(1, "test", light_threads=0)

    def failing():
        yield False
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        pool.submit("a", failing()).result(5)
    order: list[str] = []
    gate = threading.Event()
    pool.run("b", gate.wait, 10)
    dropped = pool.submit("a", recording(order, "dropped", 1))
    assert dropped.cancel()
    gate.set()
    assert pool.run("a", sum, [1, 2]).result(5) == 3
    with pytest.raises(CancelledError):
        dropped.result()
    assert order == []
    pool.shutdown()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run("a", sum, [1])


# the end


def test_busy_clients_lose_no_call_while_the_server_drains(served, call):
    settings = ServerSettings(drain_s=0.7)
    with guarded(create_app(served, settings), settings) as (url, server):
        answered: list[int] = []
        stop = threading.Event()

        def keep_calling() -> str:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
            while not stop.is_set():
                connection.request(
                    "POST", "/v1/predict", call, {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                answer.read()
                answered.append(answer.status)
                if answer.getheader("Connection") == "close":
                    return "told to close"
            return "stopped"

        with ThreadPoolExecutor(10) as pool:
            clients = [pool.submit(keep_calling) for _ in range(10)]
            while len(answered) < 20:
                time.sleep(0.01)
            server.drain()
            with pytest.raises(urllib.error.HTTPError, match="503") as refusal:
                urllib.request.urlopen(f"{url}/readyz", timeout=5)
            assert json.loads(refusal.value.read()) == {"status": "draining"}
            # not ready, alive, and still answering
            assert urllib.request.urlopen(f"{url}/healthz", timeout=5).status == 200
            outcomes = {client.result(20) for client in clients}
            stop.set()
        assert outcomes == {"told to close"} and set(answered) == {200}
        end = time.monotonic() + 10
        while not server.should_exit and time.monotonic() < end:
            time.sleep(0.02)
        assert server.should_exit


def test_signals_drain_then_stop_then_cut_off(served):
    from pgn_fast.serve.lifetime import Server

    app = create_app(served)
    with TestClient(app) as client:
        server = Server(app, ServerSettings(drain_s=60))
        assert client.get("/readyz").status_code in (200, 503)
        server.handle_exit(signal.SIGTERM, None)
        assert client.get("/readyz").json() == {"status": "draining"}
        assert (server.should_exit, server.force_exit) == (False, False)
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == (True, False)
        server.handle_exit(signal.SIGINT, None)
        assert server.force_exit
    other = Server(create_app(served), ServerSettings())
    other.handle_exit(signal.SIGINT, None)
    assert other.should_exit and not other.force_exit


def test_calls_that_are_cut_off_are_told_so(served, call, caplog):
    gated = Gated(served)
    with guarded(create_app(gated)) as (url, server), ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(honest, url, call) for _ in range(4)]
        while sum(each.phase == "working" for each in server.server_state.connections) < 4:
            time.sleep(0.01)
        server.should_exit = server.force_exit = True
        assert [each.result(20) for each in calls] == [503] * 4
    gated.gate.set()
    assert "4 calls were cut off" in caplog.text
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_an_address_in_use_is_one_sentence(served):
    from pgn_fast.errors import UserError
    from pgn_fast.serve.lifetime import Server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"on http://127.0.0.1:{port}: [^:(]+[.]$"):
            Server(create_app(served), ServerSettings()).listen("127.0.0.1", port)
    with pytest.raises(UserError, match="port 70000 is none"):
        Server(create_app(served), ServerSettings()).listen("127.0.0.1", 70_000)
