"""A Hugging Face Hub of a hundred lines on 127.0.0.1, which serves one directory as one model, and can misbehave.

Run its clients in a subprocess, with `FakeHub.environment`: huggingface_hub reads its variables when imported.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """One repository, and the faults to play. `requests` collects (method, path, Authorization)."""

    folder: Path
    repo: str = "someone/tiny"
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    down: bool = False  # every answer is 503
    drops: dict[str, int] = field(default_factory=dict)  # file -> how many downloads break off half way
    refuses: frozenset[str] = frozenset()  # files whose download breaks off before the first byte
    swapped: dict[str, bytes] = field(default_factory=dict)  # file -> bytes served instead
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    port: int = 0

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a child process that can reach only this Hub."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HOME": str(home)}
        return kept | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"} | extra

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _ in self.requests if how == method]

    @contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        handler = type("Handler", (HubHandler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
    return entry


def etag(path: str, content: bytes) -> str:
    is_large = path.endswith((".safetensors", ".bin"))
    return hashlib.sha256(content).hexdigest() if is_large else git_oid(content)


class HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the default writes every request to stderr."""

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        api, resolve = f"/api/models/{self.hub.repo}", f"/{self.hub.repo}/resolve/"
        if self.hub.down:
            self.answer(503, b"")
        elif not path.startswith((api, resolve)):
            self.refuse(404, "RepoNotFound")
        elif self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif path.startswith(resolve):
            self.send_file(*path.removeprefix(resolve).split("/", 1))
        else:
            self.send_listing(path.removeprefix(api).strip("/").split("/"))

    def send_listing(self, parts: list[str]) -> None:
        if len(parts) == 2 and parts[1] not in (*self.hub.revisions, self.hub.commit):
            self.refuse(404, "RevisionNotFound")
        elif parts[0] == "tree":
            self.answer_json([tree_entry(path, content) for path, content in self.hub.files().items()])
        else:
            siblings = [{"rfilename": path} for path in self.hub.files()]
            self.answer_json({"id": self.hub.repo, "sha": self.hub.commit, "siblings": siblings})

    def send_file(self, revision: str, name: str) -> None:
        content = self.hub.files().get(name)
        if content is None or revision not in (*self.hub.revisions, self.hub.commit):
            self.refuse(404, "RevisionNotFound" if content else "EntryNotFound")
            return
        headers = {
            "ETag": f'"{etag(name, content)}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        content = self.hub.swapped.get(name, content)
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.answer(206 if begin else 200, content[begin:], headers, stop_at=self.stop_at(name, len(content)))

    def stop_at(self, name: str, size: int) -> int | None:
        """After how many bytes this download breaks off, if it does."""
        if self.command == "GET" and name in self.hub.refuses:
            return 0
        if self.command == "GET" and self.hub.drops.get(name, 0) > 0:
            self.hub.drops[name] -= 1
            return size // 2
        return None

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code})

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, stop_at: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop_at])
        if stop_at is not None:
            self.close_connection = True
