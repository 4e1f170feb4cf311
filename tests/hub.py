"""A small Hugging Face hub on loopback: data sets of bytes, commits, ranges, and connections that break."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1000  # files from here on are "large" and published with their SHA-256


class _Loopback:
    """A server in threads of its own, at `url`, until the block ends."""

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class FakeHub(_Loopback):
    """`files`: path -> content. `breaks`: bodies cut in the middle; `refusals`: listings that are a 503."""

    def __init__(self, files: dict[str, bytes], commit: str = "a" * 40, *, breaks: int = 0, refusals: int = 0) -> None:
        self.files, self.commit, self.breaks, self.refusals = files, commit, breaks, refusals
        self.wrong: set[str] = set()
        """Files that are served with other content than the hub says, once each."""
        self.requests: list[str] = []
        self.keys: set[str] = set()
        """Authorization headers that came."""
        self._lock = threading.Lock()

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._serve(Handler)
        return self

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        with self._lock:
            self.requests.append(f"{request.command} {path}")
            self.keys.add(request.headers.get("Authorization", ""))
        if path.startswith("/api/") and "/revision/" in path:
            repo = path.removeprefix("/api/datasets/").partition("/revision/")[0]
            return self._json(request, {"id": repo, "sha": self.commit, "siblings": [], "tags": []})
        if path.startswith("/api/") and f"/tree/{self.commit}" in path:
            if self._once("refusals"):
                return self._send(request, 503, {}, b"")
            return self._json(request, [self._entry(name, data) for name, data in self.files.items()])
        name = path.partition("/resolve/")[2].partition("/")[2]
        if f"/resolve/{self.commit}/" not in path and "/resolve/main/" not in path:
            name = ""
        if name not in self.files:
            return self._send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"")
        return self._file(request, name)

    def _entry(self, name: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
        if len(data) >= LFS_BYTES:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        etag = hashlib.sha256(data).hexdigest() if len(data) >= LFS_BYTES else _git_sha1(data)
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = request.command == "GET" and len(data) >= LFS_BYTES and self._once("breaks")
        if name in self.wrong and request.command == "GET" and not cut:
            self.wrong.discard(name)
            data = bytes(len(data))
        self._send(request, 206 if start else 200, headers, data[start:], cut=cut)

    def _once(self, name: str) -> bool:
        with self._lock:
            left = getattr(self, name)
            setattr(self, name, max(left - 1, 0))
            return left > 0

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if cut else body)
        request.close_connection = True


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class ModelHub(_Loopback):
    """A hub that takes models: repositories, branches, large and small files, commits. Keeps what it was given."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        """Files of each branch of each model."""
        self.visibility: dict[str, str | None] = {}
        self.keys: set[str] = set()
        """Authorization headers that came."""
        self.messages: list[str] = []
        """Of commits."""
        self._large: dict[str, bytes] = {}

    def __enter__(self) -> ModelHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, b"")

            def do_POST(self) -> None:
                hub._answer(self, b"".join(self._body()))

            def _body(self) -> Iterator[bytes]:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    return
                while n_bytes := int(self.rfile.readline(), 16):
                    yield self.rfile.read(n_bytes)
                    self.rfile.readline()
                self.rfile.readline()

            do_PUT = do_POST  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._serve(Handler)
        return self

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.keys.add(request.headers.get("Authorization", ""))
        status, value = self._act(unquote(urlsplit(request.path).path), body)
        text = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)
        request.close_connection = True

    def _act(self, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in self.models:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            self.models[repo], self.visibility[repo] = {"main": {".gitattributes": b""}}, wanted.get("visibility")
            return 200, {"url": f"{self.url}/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self._large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        user, name, act, branch = path.removeprefix("/api/models/").split("/", 3)
        branches = self.models.get(f"{user}/{name}")
        if branches is None:
            return 404, {"error": "Repository not found"}
        if act == "branch":
            made = branch not in branches
            branches.setdefault(branch, dict(branches["main"]))
            return (200, {}) if made else (409, {"error": "exists"})
        if act == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
                for name, data in branches[branch].items()
            ]
        if act == "preupload":
            files = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["size"] >= LFS_BYTES else "regular" for each in files}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        assert act == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self._large[value["oid"]]
            elif line["key"] == "deletedFile":
                del branches[branch][value["path"]]
        return 200, {"commitUrl": f"{self.url}/{user}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}
