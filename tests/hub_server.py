"""A Hub on this machine for tests: the routes that the official client reads repos through and writes them.

`with Hub(folder) as hub:` serves folder/owner/name/ as the repo owner/name, a model or a data set, from a thread
at `hub.url`; `python hub_server.py FOLDER` does so in a process of its own and prints the port on its first line.
A repo folder with a file `.gated` answers 403 as a gated one. What is pushed is kept in memory.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "c0ffee" + "0" * 34
_LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".png")


@dataclass
class Repo:
    """Commits, each with all of its files, and the branches and pull requests that point at them."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.commit_of(revision)]

    def add_commit(self, files: dict[str, bytes], ref: str) -> str:
        oid = hashlib.sha1(f"{ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid


@dataclass
class Failure:
    """An answer that replaces the proper one.

    Attributes:
        route: pattern of the method and the path, such as ``PUT /lfs``.
        status: of the answer; 0 cuts the connection in the middle of the request's body, None answers properly.
        after: so many requests are answered properly first.
        times: so many fail then.
        first: called when it happens, before the answer.
        content: the body; ``{token}`` stands for the token of the request.
    """

    route: str
    status: int | None
    after: int = 0
    times: int = 1
    first: Callable[[], object] = lambda: None
    headers: dict[str, str] = field(default_factory=dict)
    content: str = ""


class Hub:
    """The server: its repos, the accounts of its tokens, what failed by order, and what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    @property
    def port(self) -> int:
        return self._server.server_port

    def add_account(self, token: str, name: str, role: str = "write", orgs: tuple[tuple[str, str], ...] = (), **rest):
        """A token and whose it is, as whoami answers; `orgs` are names and roles, `rest` more about the token."""
        self.accounts[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org, "roleInOrg": role_there} for org, role_there in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role, **rest}},
        }

    def fail(self, route: str, status: int | None, **how: object) -> None:
        """Let requests fail, see :class:`Failure`."""
        self.failures.append(Failure(route, status, **how))

    def count(self, route: str) -> int:
        """How many requests there were of a route."""
        return sum(re.match(route, request) is not None for request in self.requests)

    def repo(self, name: str) -> Repo | None:
        """A repo; a folder's files are its first commit."""
        folder = self.root / name
        if name not in self.repos and name.count("/") == 1 and folder.is_dir():
            files = {path.relative_to(folder).as_posix(): path.read_bytes()
                     for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".gated"}  # fmt: skip
            self.repos[name] = Repo({COMMIT: files}, {"main": COMMIT}, gated=(folder / ".gated").exists())
        return self.repos.get(name)

    def may_write(self, token: str | None, owner: str) -> bool:
        """Whether a token's owner and its role allow writing."""
        account = self.accounts.get(token)
        if account is None or account["auth"]["accessToken"]["role"] == "read":
            return False
        writers = {org["name"] for org in account["orgs"] if org["roleInOrg"] in ("admin", "write", "contributor")}
        return owner in {account["name"], *writers}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            failure = self._failure(f"{self.command} {path}")
            if failure:
                failure.first()
        length = int(self.headers.get("Content-Length") or 0)
        if failure and failure.status == 0:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.content = self.rfile.read(length)
        self.query = parse_qs(query)
        if failure and failure.status:
            content = failure.content.replace("{token}", self.token or "")
            return self._send(failure.status, content.encode(), failure.headers)
        with self.hub.lock:
            self._route([unquote(part) for part in path.strip("/").split("/")])

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _failure(self, request: str) -> Failure | None:
        for failure in self.hub.failures:
            if re.match(failure.route, request):
                if failure.after:
                    failure.after -= 1
                elif failure.times:
                    failure.times -= 1
                    return failure
        return None

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _route(self, parts: list[str]) -> None:
        if parts[0] == "datasets":
            parts = parts[1:]
        match parts:
            case ["api", "whoami-v2"]:
                account = self.hub.accounts.get(self.token)
                self._send_json(account) if account else self._send_error(401, "Invalid username or password.")
            case ["api", "validate-yaml"]:
                valid = json.loads(self.content)["content"].startswith("---\n")
                self._send_json({"errors": [] if valid else [{"message": "no metadata"}]}, 200 if valid else 400)
            case ["api", "repos", "create"]:
                self._create(json.loads(self.content))
            case ["lfs", oid]:
                fits = hashlib.sha256(self.content).hexdigest() == oid
                self.hub.objects.update({oid: self.content} if fits else {})
                self._send(200 if fits else 400, b"")
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._batch(f"{owner}/{name.removesuffix('.git')}")
            case ["api", "models" | "datasets", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._send(404, b"")

    def _repo(self, name: str, writing: bool = False) -> Repo | None:
        """A repo that the token may see, or write to; else the refusal is sent."""
        repo = self.hub.repo(name)
        can_write = self.hub.may_write(self.token, name.split("/")[0])
        if repo is None or (repo.private and not can_write):
            self._send_error(401 if self.token is None else 404, "Repository not found", "RepoNotFound")
        elif writing and not can_write:
            self._send_error(403, "You don't have the required permissions")
        else:
            return repo
        return None

    def _create(self, wanted: dict) -> None:
        owner = wanted["organization"] or self.hub.accounts[self.token]["name"]
        name = f"{owner}/{wanted['name']}"
        if not self.hub.may_write(self.token, owner):
            return self._send_error(403, "You don't have the rights to create a model under this namespace")
        if self.hub.repo(name):
            return self._send_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"},
                                   409)  # fmt: skip
        repo = self.hub.repos[name] = Repo({}, {}, private=wanted.get("visibility") == "private")
        repo.add_commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "main")
        return self._send_json({"url": f"{self.hub.url}/{name}"})

    def _batch(self, name: str) -> None:
        if self._repo(name):
            objects = json.loads(self.content)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.objects:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self._send_json({"transfer": "basic", "objects": objects})

    def _api(self, name: str, rest: list[str]) -> None:
        if rest == ["auth-check", "write"]:
            if self._repo(name, writing=True):
                self._send(200, b"")
            return
        # Whoever may read may open a pull request.
        opens = self.query.get("create_pr") == ["1"]
        repo = self._repo(name, writing=bool(rest) and rest[0] in ("branch", "commit", "preupload") and not opens)
        if repo is None:
            return
        if rest[:1] == ["discussions"]:
            return self._discussions(name, repo)
        if rest[:1] == ["branch"]:
            if rest[1] in repo.refs:
                return self._send_error(409, "Reference already exists")
            repo.refs[rest[1]] = repo.refs["main"]
            return self._send_json({})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.commit_of(revision)
        if commit is None:
            return self._send_error(404, "Invalid rev id", "RevisionNotFound")
        files = repo.commits[commit]
        match rest[:1]:
            case ["tree"]:
                self._send_json([_entry(path, content) for path, content in sorted(files.items())])
            case ["preupload"]:
                self._send_json({"files": list(self._upload_modes(files))})
            case ["commit"]:
                self._commit(name, repo, revision, commit)
            case _:
                names = [{"rfilename": path} for path in sorted(files)]
                self._send_json({"id": name, "sha": commit, "private": repo.private, "siblings": names, "tags": []})

    def _upload_modes(self, files: dict[str, bytes]):
        asked = json.loads(self.content)
        ignored = asked.get("gitIgnore", files.get(".gitignore", b"").decode()).split()
        for file in asked["files"]:
            path = file["path"]
            yield {
                "path": path,
                "uploadMode": "lfs" if _is_lfs(path) else "regular",
                "shouldIgnore": any(fnmatch(path, pattern) for pattern in ignored),
                "oid": _oid(path, files[path]) if path in files else None,
            }

    def _commit(self, name: str, repo: Repo, revision: str, parent: str) -> None:
        changes = [json.loads(line) for line in self.content.splitlines()]
        expected = changes[0]["value"].get("parentCommit")
        opens = self.query.get("create_pr") == ["1"]
        if expected and expected != parent and not opens:
            return self._send_error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[expected or parent])
        for change in changes[1:]:
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self._send_error(400, f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        oid = repo.add_commit(files, f"refs/pr/{number}" if opens else revision)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        if opens:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        return self._send_json(answer)

    def _discussions(self, name: str, repo: Repo) -> None:
        found = [
            {"title": "", "num": int(ref.split("/")[-1]), "createdAt": "2026-01-01T00:00:00.000Z", "status": "open",
             "repo": {"name": name, "type": "model"}, "isPullRequest": True}
            for ref in repo.refs if ref.startswith("refs/pr/")
        ]  # fmt: skip
        self._send_json({"discussions": found, "count": len(found), "start": 0})

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        commit = repo.commit_of(revision)
        if commit is None or path not in repo.commits[commit]:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            return self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit or ""})
        content = repo.commits[commit][path]
        return self._send(200, content, {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit})

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, message: str, code: str = "") -> None:
        self._send(status, b"", {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_lfs(path: str) -> bool:
    return path.endswith(_LFS_SUFFIXES)


def _oid(path: str, content: bytes) -> str:
    """What the Hub knows a file by: sha256 of a large one, git's hash of the others."""
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
    return entry


if __name__ == "__main__":
    server = Hub(Path(sys.argv[1]))
    print(server.port, flush=True)
    server.serve()
