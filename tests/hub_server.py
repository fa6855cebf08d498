"""A stand-in for the hub's HTTP API on loopback, for the real client: repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """Files by repository; ``gated`` and ``private`` ones are refused as the hub refuses them.

    ``faults``: what is done instead of an answer with a file, by repository.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.faults: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.created: list[dict] = []
        self.messages: list[str] = []
        self.pull_requests = 0

    def commit(self, repo: str) -> str:
        names = sorted(self.files.get(repo, {}).items())
        return hashlib.sha1(repr(names).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, code, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(code)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _address(self):
        return f"http://{self.headers['Host']}"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        if "/resolve/" not in path:
            return self.send(200, b"a hub")
        repo, _, rest = path[1:].partition("/resolve/")
        name = rest.partition("/")[2]
        if repo in self.hub.faults:
            return self.hub.faults[repo](self)
        if repo in self.hub.gated:
            return self.send(403, b"", X_Error_Code="GatedRepo")
        if repo not in self.hub.files:
            return self.send(401, b"", X_Error_Code="RepoNotFound")
        content = self.hub.files[repo].get(name)
        if content is None:
            return self.send(404, b"", X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.send(200, content, ETag=etag, X_Repo_Commit=self.hub.commit(repo))

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        path = unquote(self.path.split("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = (
                f"{asked['organization']}/{asked['name']}"
                if asked.get("organization")
                else asked["name"]
            )
            self.hub.created.append(asked)
            self.hub.files.setdefault(repo, {})
            return self.send(200, {"url": f"{self._address()}/{repo}"})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        repo = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.send(200, {"files": files})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.hub.messages.append(entry["value"]["summary"])
                else:
                    value = entry["value"]
                    self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            oid = self.hub.commit(repo)
            answer = {
                "commitUrl": f"{self._address()}/{repo}/commit/{oid}",
                "commitOid": oid,
                "success": True,
            }
            if "create_pr=1" in self.path:
                self.hub.pull_requests += 1
                answer["pullRequestUrl"] = f"{self._address()}/{repo}/discussions/1"
            return self.send(200, answer)
        return self.send(404, {"error": f"no such route {path}"})

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


@contextmanager
def serve_hub():
    """A hub and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub_in_use(monkeypatch, cache):
    """A hub that the official client talks to instead of the public one; ``cache``: its folder."""
    import huggingface_hub.constants
    from huggingface_hub import file_download, hf_api

    with serve_hub() as (stand_in, address):
        for module in (huggingface_hub.constants, file_download.constants, hf_api.constants):
            monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield stand_in
