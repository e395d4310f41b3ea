"""The Hugging Face hub in small: a server on this machine that speaks its HTTP and keeps what is uploaded."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

TOKEN = "hf_me"


@dataclass
class Repository:
    """What lies in a repository, by branch and path."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class FakeHub:
    """Accounts by token, repositories by id, every request, and the requests that are refused.

    Attributes:
        refused: Beginning of a request, as "POST /api/repos", and the status that it gets.
    """

    endpoint: str
    accounts: dict[str, dict[str, Any]]
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.requests.append(f"{method} {path}")
        for begin, status in self.refused.items():
            if f"{method} {path}".startswith(begin):
                return status, {"error": "refused by the test"}
        account = self.accounts.get(token)
        if account is None:
            return 401, {"error": "Invalid user token."}
        parts = path.removeprefix("/api/").split("/")
        if parts == ["whoami-v2"]:
            return 200, account
        if parts == ["validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        content = json.loads(body) if body and "commit" not in parts else {}
        if parts == ["repos", "create"]:
            repo = f"{content.get('organization') or account['name']}/{content['name']}"
            status = 409 if repo in self.repositories else 200
            is_private = content.get("visibility") == "private" or bool(content.get("private"))  # of older versions
            self.repositories.setdefault(repo, Repository(is_private))
            return status, {"url": f"{self.endpoint}/{repo}", "name": repo}
        repository = self.repositories.get("/".join(parts[1:3]))
        if repository is None:
            return 404, {"error": "Repository not found"}
        return self._of_repository("/".join(parts[1:3]), repository, parts[3:], content, body)

    def _of_repository(
        self, repo: str, repository: Repository, action: list[str], content: dict[str, Any], body: bytes
    ) -> tuple[int, Any]:
        if not action:
            return 200, {"id": repo, "private": repository.private, "sha": "0" * 40, "tags": [], "siblings": []}
        if action[0] == "branch":
            repository.branches[unquote(action[1])] = {}
            return 200, {}
        files = repository.branches.get(unquote(action[1]))
        if files is None:
            return 404, {"error": "Revision not found"}
        if action[0] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in content["files"]
            ]
            return 200, {"files": modes}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process talks to, with the token of the account `me`, who is in the organization `team`."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.answer(self.command, urlparse(self.path).path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    account = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}
    hub = FakeHub(endpoint, {TOKEN: account})
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
