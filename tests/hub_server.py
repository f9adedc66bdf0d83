"""A Hub on this machine for tests: the routes that the official clients read repos through.

Run as `python hub_server.py FOLDER`: serves FOLDER/owner/name/ as the repo owner/name, a model or a
data set, and prints the port on its first line. A repo folder with a file `.gated` answers 403 as a gated one.
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of model info, file trees and files."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def _respond(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            self._api(parts[2:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(self.root / parts[0] / parts[1], parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"")

    def _api(self, parts: list[str]) -> None:
        repo = self.root / "/".join(parts[:2])
        if not repo.is_dir():
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = [path for path in sorted(repo.rglob("*")) if path.is_file() and path.name != ".gated"]
        names = [path.relative_to(repo).as_posix() for path in files]
        if "tree" in parts:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
            return self._send_json(entries)
        return self._send_json(
            {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names], "tags": []}
        )

    def _file(self, repo: Path, revision: str, name: str) -> None:
        path = repo / name
        if (repo / ".gated").exists():
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT) or not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._send(200, path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
