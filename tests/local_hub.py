"""A small Hugging Face hub on this machine, over HTTP: what its client libraries ask one for.

Repositories are folders, `ROOT/models/OWNER/NAME` and `ROOT/datasets/OWNER/NAME`, and beside them
`NAME@TAG` where one has other revisions. A process asks this hub where HF_ENDPOINT is `Hub.url`
before it imports the libraries.
"""

import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves a folder until `close`; `asked` are the paths of all requests so far."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked, self.connections = root, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def close(self):
        """Answers nothing more, not even on connections that are kept open."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if found := _FILE.fullmatch(path):
            kind, name, revision, file = found.groups()
            return self._file(self._repo("datasets" if kind else "models", name, revision), file)
        if found := _API.fullmatch(path):
            kind, name, what, revision, below = found.groups()
            return self._described(self._repo(kind, name, revision), name, what, below or "")
        return self._send({}, 404)

    do_HEAD = do_GET

    def _repo(self, kind, name, revision):
        """The folder of a tag or commit; that of the newest for all others, as `main`."""
        newest = self.server.root / kind / name
        others = newest.parent.glob(f"{newest.name}@*")
        return next(
            (p for p in others if revision in (p.name.partition("@")[2], commit(p))), newest
        )

    def _described(self, repo, name, what, below):
        if not repo.is_dir():
            return self._send({}, 404, {"X-Error-Code": "RepoNotFound"})
        if what != "tree":
            files = [{"rfilename": str(p.relative_to(repo))} for p in repo.rglob("*.*")]
            return self._send({"id": name, "sha": commit(repo), "siblings": files, "tags": []})
        deep = "recursive=true" in self.path.lower()
        told = [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": str(path.relative_to(repo)),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in sorted((repo / below).glob("**/*" if deep else "*"))
        ]
        return self._send(told) if told else self._send({}, 404, {"X-Error-Code": "EntryNotFound"})

    def _file(self, repo, file):
        path = repo / file
        if not path.is_file():
            code = "EntryNotFound" if repo.is_dir() else "RepoNotFound"
            return self._send({}, 404, {"X-Error-Code": code})
        whole = path.read_bytes()
        about = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X-Repo-Commit": commit(repo)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(whole)), len(whole) - 1)
            about["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
            return self._send(whole[first : last + 1], 206, about)
        return self._send(whole, 200, about)

    def _send(self, body, status=200, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit(repo):
    """What stands for the commit of a repository's folder; changes with its files."""
    told = [(str(p), p.stat().st_mtime_ns) for p in sorted(repo.rglob("*"))]
    return hashlib.sha1(repr(told).encode()).hexdigest()
