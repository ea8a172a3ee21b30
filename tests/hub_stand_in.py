"""A stand-in for the hub on this machine: enough of its API for huggingface_hub's own client to fetch and to upload."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories: id → revision → path → content. `asked` has every request; `gated` and `down` make it refuse."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.private: dict[str, bool] = {}
        self.down = False
        self.url = ""

    def put(self, name: str, folder: Path, revision: str = "main", inside: str = "") -> None:
        files = {
            f"{inside}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()
        }
        self.repos.setdefault(name, {}).setdefault(revision, {}).update(files)

    def commit(self, name: str, revision: str) -> str:
        """A commit's hash, which changes with the content."""
        files = self.repos[name][revision]
        return hashlib.sha1(
            repr(
                [name, *sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())]
            ).encode()
        ).hexdigest()

    def find(self, name: str, revision: str) -> str | None:
        """The branch that a branch or commit names."""
        return next((b for b in self.repos[name] if revision in (b, self.commit(name, b))), None)


class Answer(Exception):
    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body, self.headers = status, body, headers


def missing(code: str, status: int = 404) -> Answer:
    return Answer(status, {"error": code}, **{"X-Error-Code": code, "X-Error-Message": code})


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(self.get)

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, method: Any) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        try:
            if self.hub.down:
                raise Answer(503, {"error": "down"})
            method(path, sent)
        except Answer as answer:
            body = (
                answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            )
            self.send_response(answer.status)
            for key, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if name not in self.hub.repos or (self.hub.private.get(name) and not self.is_known):
            raise missing("RepoNotFound", 404 if self.is_known else 401)
        if (branch := self.hub.find(name, revision)) is None:
            raise missing("RevisionNotFound")
        return branch, self.hub.repos[name][branch]

    def get(self, path: str, _: bytes) -> None:
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            branch, files = self.repo(found[1], found[2] or "main")
            siblings = [{"rfilename": name} for name in files]
            raise Answer(
                200,
                {"id": found[1], "sha": self.hub.commit(found[1], branch), "siblings": siblings},
            )
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            _, files = self.repo(found[1], found[2])
            entry = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            raise Answer(200, entry)
        if found := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            branch, files = self.repo(found[1], found[2])
            if found[1] in self.hub.gated and not self.is_known:
                raise missing("GatedRepo", 403)
            if found[3] not in files:
                raise missing("EntryNotFound")
            content = files[found[3]]
            etag = hashlib.sha1(content).hexdigest()
            raise Answer(
                200,
                content,
                ETag=f'"{etag}"',
                **{"X-Repo-Commit": self.hub.commit(found[1], branch)},
            )
        if path == "api/whoami-v2" and self.is_known:
            raise Answer(200, {"name": "me", "type": "user"})
        if path == "api/whoami-v2":
            raise Answer(401, {"error": "Invalid user token."})
        raise missing("NotFound")

    def post(self, path: str, sent: bytes) -> None:
        if path == "api/validate-yaml":
            raise Answer(200, {"errors": [], "warnings": []})
        if not self.is_known:
            raise Answer(401, {"error": "Invalid username or password."})
        if path == "api/repos/create":
            wanted = json.loads(sent)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name.startswith("others/"):
                raise Answer(
                    403,
                    {"error": "You don't have the rights to create a model under the namespace"},
                )
            status = 409 if name in self.hub.repos else 200
            self.hub.repos.setdefault(name, {"main": {}})
            self.hub.private.setdefault(
                name, wanted.get("visibility") == "private" or bool(wanted.get("private"))
            )
            raise Answer(status, {"url": f"{self.hub.url}/{name}", "name": name})
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)/branch/(.+)", path):
            made = self.hub.repos[found[1]].setdefault(
                found[2], dict(self.hub.repos[found[1]]["main"])
            )
            raise Answer(200, {"files": len(made)})
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(sent)["files"]
            ]
            raise Answer(200, {"files": files})
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)/commit/(.+)", path):
            _, files = self.repo(found[1], found[2])
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commit = self.hub.commit(found[1], found[2])
            raise Answer(
                200,
                {
                    "commitUrl": f"{self.hub.url}/{found[1]}/commit/{commit}",
                    "commitOid": commit,
                    "success": True,
                },
            )
        raise missing("NotFound")


@contextlib.contextmanager
def hub_on_this_machine(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let huggingface_hub ask a server on 127.0.0.1, with an empty cache and no token of the user's."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    patch.setenv("HF_TOKEN_PATH", str(cache / "none"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "none"))
    patch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
