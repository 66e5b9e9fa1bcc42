"""The part of the Hugging Face Hub that adapters need, on loopback and in memory."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN, USER = "hf_good", "ann"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"* lfs\n"}})
    messages: list[str] = field(default_factory=list)
    gated: bool = False

    def sha(self, branch: str) -> str:
        files = self.branches[branch]
        return hashlib.sha1(repr([(name, files[name]) for name in sorted(files)]).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """By a branch or by a commit, which are the heads of the branches here."""
        heads = {self.sha(branch): branch for branch in self.branches}
        return self.branches.get(heads.get(revision, revision))


class FakeHub(ThreadingHTTPServer):
    """Answers as the Hub does; `requests` lists method and path of everything that was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = 0  # a status that every request gets

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.server.broken:
            return self.refuse(self.server.broken, "Out of order")
        if token not in ("", TOKEN) and not path.startswith("/large/"):
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.known = token == TOKEN
        routes = [
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"GET /api/models/([^/]+/[^/]+)/tree/(.+)", self.tree),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /large/(\w+)", self.upload),
            (r"(?:GET|HEAD) /large/(\w+)", self.download),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, action in routes:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(*found.groups())
        return self.refuse(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository; None after a refusal."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "Repository not found", "RepoNotFound")
            return None
        if repo.gated:
            self.refuse(403, "Access to model is restricted", "GatedRepo")
            return None
        if write and not self.known:
            self.refuse(401, "Invalid username or password.")
            return None
        return repo

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            return self.refuse(401, "Invalid username or password.")
        if asked["organization"] != USER:
            return self.refuse(403, "You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[name] = Repo(private)
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate(self) -> None:
        header = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        wrong = [key for key in ("license", "base_model") if " " in str(header.get(key, ""))]
        errors = [{"message": f'"{key}" must be one of the known ones'} for key in wrong]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": [{"message": "a remark"}]})

    def branch(self, name: str, branch: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return None
        if branch in repo.branches:
            return self.refuse(409, "Reference already exists")
        repo.branches[branch] = dict(repo.branches["main"])
        return self.answer(201)

    def info(self, name: str, revision: str | None) -> None:
        if (repo := self.repo(name)) is None:
            return None
        files = repo.files(revision or "main")
        if files is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        sha = next(repo.sha(branch) for branch, there in repo.branches.items() if there is files)
        listed = [{"rfilename": file} for file in sorted(files)]
        return self.answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": listed})

    def tree(self, name: str, revision: str) -> None:
        if (repo := self.repo(name)) is not None:
            files = repo.files(revision) or {}
            rows = [{"type": "file", "path": path, "size": len(files[path]), "oid": path} for path in sorted(files)]
            self.answer(200, rows)

    def preupload(self, name: str, revision: str) -> None:
        if self.repo(name, write=True) is None:
            return
        self.answer(200, {"files": [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if ".safe" in file["path"] else "regular"}
            for file in json.loads(self.body)["files"]
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        if self.repo(name, write=True) is None:
            return
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "the bytes are not those of the hash")
        self.server.large[oid] = self.body
        return self.answer(200)

    def download(self, oid: str) -> None:
        self.answer(200, self.server.large[oid], ETag=f'"{oid}"')

    def commit(self, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return
        files = repo.branches[revision]
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.sha(revision)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (repo := self.repo(name)) is None:
            return None
        files = repo.files(revision)
        if files is None or file not in files:
            return self.refuse(404, "Not found", "EntryNotFound" if files else "RevisionNotFound")
        commit = next(repo.sha(branch) for branch, there in repo.branches.items() if there is files)
        content, oid = files[file], hashlib.sha256(files[file]).hexdigest()
        if ".safe" not in file:
            return self.answer(200, content, ETag=f'"{oid[:40]}"', X_Repo_Commit=commit)
        self.server.large[oid] = content
        headers = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's storage is
        return self.answer(302, Location=f"{elsewhere}/large/{oid}", **headers)


def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Points the client at a Hub, as HF_ENDPOINT does where it is set before the client is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    if "transformers.utils.hub" in sys.modules:  # its client keeps the first Hub that it was pointed at
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running Hub that the client finds, with a token that it knows; no stored token or cache of this machine."""
    from huggingface_hub import constants

    server = FakeHub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    ask(monkeypatch, server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # large files by the LFS protocol
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
