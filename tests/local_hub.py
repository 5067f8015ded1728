"""A small Hugging Face hub on this machine, over HTTP: what its client libraries ask one for.

Repositories are folders, `ROOT/models/OWNER/NAME` and `ROOT/datasets/OWNER/NAME`. A process asks
this hub where HF_ENDPOINT is `Hub.url` before it imports the libraries.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+/?(.*))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves until `close`.

    Attributes:
        log: (method, path) of every request.
        faults: pattern of paths -> the status that they get, or a function of the bytes of a file.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root, self.log, self.faults, self.connections = root, [], {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request, client_address) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def close(self) -> None:
        """Answers nothing more, not even on connections that are kept open."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, path: str):
        return next((f for pattern, f in self.faults.items() if re.search(pattern, path)), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        fault = self.server.fault(path)
        if isinstance(fault, int):
            code = {401: "RepoNotFound", 403: "GatedRepo"}.get(fault)
            return self._send(
                b'{"error": "so told"}', fault, {"X-Error-Code": code} if code else {}
            )
        if found := _FILE.fullmatch(path):
            kind, name, file = found.groups()
            return self._file(self._repo("datasets" if kind else "models", name), file, fault)
        if found := _API.fullmatch(path):
            kind, name, what, below = found.groups()
            asked = parse_qs(sent).get("paths") if what == "paths-info" else None
            return self._described(self._repo(kind, name), name, what, below or "", asked)
        return self._send(b"{}", 404)

    do_GET = do_HEAD = do_POST = _answer

    def _repo(self, kind: str, name: str) -> Path:
        return self.server.root / kind / name

    def _described(self, repo: Path, name: str, what: str, below: str, asked: list | None) -> None:
        if not repo.is_dir():
            return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if what == "paths-info":
            return self._listed(repo, [repo / path for path in asked or []])
        if what == "tree":
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            return self._listed(repo, sorted((repo / below).glob("**/*" if deep else "*")))
        files = [{"rfilename": p.relative_to(repo).as_posix()} for p in repo.rglob("*.*")]
        about = {"id": name, "sha": _commit(repo), "siblings": files, "private": False, "tags": []}
        return self._send(json.dumps(about).encode())

    def _listed(self, repo: Path, paths: list[Path]) -> None:
        told = [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(repo).as_posix(),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in paths
            if path.exists()
        ]
        if told:
            return self._send(json.dumps(told).encode())
        return self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def _file(self, repo: Path, file: str, fault) -> None:
        path = repo / file
        if not path.is_file():
            code = "EntryNotFound" if repo.is_dir() else "RepoNotFound"
            return self._send(b"", 404, {"X-Error-Code": code})
        whole = path.read_bytes()
        about = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X-Repo-Commit": _commit(repo)}
        spoilt = fault(whole) if fault else whole
        if len(spoilt) < len(whole):  # the line is cut
            self.close_connection = True
            return self._send(spoilt, 200, {**about, "Content-Length": str(len(whole))})
        whole = spoilt
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(whole)), len(whole) - 1)
            about["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
            return self._send(whole[first : last + 1], 206, about)
        return self._send(whole, 200, about)

    def _send(self, body: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _commit(repo: Path) -> str:
    told = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(repo.rglob("*"))]
    return hashlib.sha1(repr(told).encode()).hexdigest()
