"""A small Hugging Face hub on loopback: data sets of bytes, commits, ranges, and connections that break."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1000  # files from here on are "large" and published with their SHA-256


class FakeHub:
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

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
