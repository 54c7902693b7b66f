"""A web server that answers like the HuggingFace hub, for the files of a local folder ``<owner>/<name>/...``."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


class FakeHub(http.server.ThreadingHTTPServer):
    """``cut_after``: of parquet files only so many bytes are sent, then the connection ends. ``asked``: all paths."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cut_after: int | None = None
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            self._file(self.server.root / parts[1] / parts[2], "/".join(parts[5:]))
        elif parts[:2] == ["api", "datasets"] and (self.server.root / "/".join(parts[2:4])).is_dir():
            self._api(self.server.root / parts[2] / parts[3], parts[4:], body)
        else:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _api(self, repo: Path, parts: list[str], body: bytes) -> None:
        files = [_described(repo, path) for path in sorted(repo.rglob("*"))]
        kind = parts[0] if parts else "revision"
        if kind == "revision":
            name = f"{repo.parent.name}/{repo.name}"
            siblings = [{"rfilename": file["path"]} for file in files if file["type"] == "file"]
            self._send(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif kind == "tree":
            below = "/".join(parts[2:])
            found = [file for file in files if not below or file["path"].startswith(f"{below}/")]
            if "recursive=true" not in self.path.lower():
                found = [file for file in found if str(Path(file["path"]).parent) == (below or ".")]
            if below and not found:
                self._send(404, {"error": "not there"}, {"X-Error-Code": "EntryNotFound"})
            else:
                self._send(200, found)
        elif kind == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else urllib.parse.parse_qs(body.decode())["paths"]
            self._send(200, [file for file in files if file["path"] in wanted])
        else:
            self._send(404, {"error": "not there"}, {"X-Error-Code": "EntryNotFound"})

    def _file(self, repo: Path, name: str) -> None:
        path = repo / name
        if not path.is_file():
            code = "EntryNotFound" if repo.is_dir() else "RepoNotFound"
            self._send(404, {"error": "not there"}, {"X-Error-Code": code})
            return
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = 0
        if (ranged := self.headers.get("Range")) and self.command == "GET":
            start = int(ranged.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if self.server.cut_after is not None and name.endswith(".parquet"):
                self.wfile.write(content[start : start + self.server.cut_after])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

    def _send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _described(repo: Path, path: Path) -> dict[str, str | int]:
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path.relative_to(repo).as_posix()}
    content = path.read_bytes()
    oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return {"type": "file", "oid": oid, "size": len(content), "path": path.relative_to(repo).as_posix()}


@contextmanager
def serving(root: Path):
    server = FakeHub(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
