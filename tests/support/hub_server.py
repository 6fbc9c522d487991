"""A stand-in for the weights hub on the loopback interface, with faults to order.

`Hub` starts it in a process of its own, so that it can really be killed:

    with Hub(tmp_path) as hub:
        hub.add("org/name", {"model.safetensors": data})
        hub.fail("org/name/model.safetensors", "truncate", times=1)
        ...  # a client whose HF_ENDPOINT is hub.endpoint

It answers what the download side of the hub's client asks: HEAD and GET of `resolve`, redirects of
large files to another host name, ranges, error codes, and the model and tree listings of the API.
Plain files are at `hub.url(name)`. Standard library only: it starts in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.hub_server_upload import UploadSide

_ROOT = Path(__file__).resolve().parents[2]
_LARGE = (".safetensors", ".bin", ".pth")
_BODIES = {
    "html": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@dataclass
class Fault:
    """What goes wrong with requests for one file.

    Attributes:
        key: `org/name/file`, or the name of a plain file.
        kind: "truncate" (the connection closes half-way), "stall" (nothing comes after half of the
            file), "short" (half a file that says it is whole), "corrupt" (one bit), "reset",
            "close" (without an answer), "hang", "gated", "html" or "pointer" (another body), or a
            status such as "503".
        method: "HEAD" or "GET".
        times: How often; -1 for ever.
    """

    key: str
    kind: str
    method: str
    times: int


class Hub:
    """A running stand-in hub, for use in a `with` statement.

    Args:
        root: An empty folder for its files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.endpoint = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hub:
        command = [sys.executable, "-m", "tests.support.hub_server", str(self.root)]
        self._process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Stop the server at once; connections to it are refused from now on."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def add(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Put `files` (name -> content) into a repository and return its new commit."""
        folder = self.root / "repos" / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return _commit(folder)

    def add_plain(self, name: str, content: bytes) -> str:
        """Put a file outside any repository and return its URL."""
        path = self.root / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.url(name)

    def url(self, name: str) -> str:
        """The URL of a plain file."""
        return f"{self.endpoint}/plain/{name}"

    def fail(self, key: str, kind: str, method: str = "GET", times: int = -1) -> None:
        """Let requests fail from now on; see `Fault`."""
        fault = {"key": key, "kind": kind, "method": method, "times": times}
        request = urllib.request.Request(f"{self.endpoint}/_fail", json.dumps(fault).encode())
        urllib.request.urlopen(request, timeout=10).close()

    def requests(self, key: str) -> Counter[str]:
        """How often each method asked for the content or the metadata of a file."""
        return Counter(method for method, name in self._log() if name == key)

    def total(self) -> int:
        """How many requests of any kind there were."""
        return sum(name.startswith("/") for _, name in self._log())

    def _log(self) -> list[tuple[str, str]]:
        with urllib.request.urlopen(f"{self.endpoint}/_log", timeout=10) as response:
            return json.load(response)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def fault(self, key: str, method: str) -> str:
        """Log a request and take the kind of fault it shall suffer, if any."""
        with self.lock:
            self.log.append((method, key))
            for fault in self.faults:
                if (fault.key, fault.method) == (key, method) and fault.times != 0:
                    fault.times -= 1
                    return fault.kind
        return ""


class _Handler(UploadSide, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        if self.path != "/_fail":
            return self.upload()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.faults.append(Fault(**body))
        return self._json({})

    def _commit_of(self, folder: Path) -> str:
        return _commit(folder)

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["_log"]:
            return self._json(self.server.log)
        self.server.log.append((self.command, self.path))
        repos = self.server.root / "repos"
        if parts[0] == "plain":
            self._content(self.server.root / "plain", "/".join(parts[1:]))
        elif parts[0] == "cdn":
            self._content(repos, "/".join(parts[1:]))
        elif parts[:2] == ["api", "models"] and (repos / parts[2] / parts[3]).is_dir():
            self._api(repos / parts[2] / parts[3], parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "", "no such page")
        return None

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repos = self.server.root / "repos"
        folder, key = repos / repo_id, f"{repo_id}/{name}"
        if not folder.is_dir():
            return self._error(401, "RepoNotFound", "Repository not found")
        commit = _commit(folder)
        if revision not in ("main", commit):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit}
        if not (folder / name).is_file():
            return self._error(404, "EntryNotFound", "Entry not found", headers)
        if not name.endswith(_LARGE):
            return self._content(repos, key, headers)
        if self.command == "HEAD" and self._suffer(self.server.fault(key, "HEAD")):
            return None
        content = (folder / name).read_bytes()
        port = self.server.server_address[1]
        headers |= {
            "Location": f"http://localhost:{port}/cdn/{key}",
            "X-Linked-ETag": _etag(name, content),
        }
        return self._reply(302, b"", headers | {"X-Linked-Size": str(len(content))})

    def _content(self, root: Path, key: str, headers: dict[str, str] | None = None) -> None:
        """The bytes of a file, or what a fault makes of them."""
        if not (root / key).is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        kind = self.server.fault(key, self.command)
        if self._suffer(kind):
            return None
        body = _BODIES.get(kind) or (root / key).read_bytes()
        headers = {"ETag": _etag(key, body), "Accept-Ranges": "bytes", **(headers or {})}
        half = len(body) // 2
        if kind == "corrupt":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if kind == "truncate":
            self.close_connection = True
            return self._reply(200, body[:half], headers, length=len(body))
        if kind == "stall":
            self._reply(200, body[:half], headers, length=len(body))
            threading.Event().wait(60)
        if kind == "short":
            return self._reply(200, body[:half], headers)
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self._reply(206, body[start:], headers)
        return self._reply(200, body, headers)

    def _suffer(self, kind: str) -> bool:
        """Answer with a fault that leaves no content; False when there is something to send."""
        if kind.isdigit():
            self._error(int(kind), "", "injected", {"Retry-After": "0"} if kind == "429" else {})
        elif kind == "gated":
            self._error(403, "GatedRepo", "Access to this model is restricted")
        elif kind == "hang":
            threading.Event().wait(60)
        elif kind == "close":
            self.close_connection = True
        elif kind == "reset":
            # a zero linger time makes close() send a reset
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            os.close(self.connection.detach())
        else:
            return False
        return True

    def _api(self, folder: Path, parts: list[str]) -> None:
        names = sorted(path.name for path in folder.iterdir())
        if parts[:1] == ["tree"]:
            return self._json([_tree_entry(folder / name) for name in names])
        siblings = [{"rfilename": name} for name in names]
        repo_id = "/".join(folder.parts[-2:])
        return self._json({"id": repo_id, "sha": _commit(folder), "siblings": siblings})

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        self._reply(status, b"", errors | (headers or {}))

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _commit(folder: Path) -> str:
    """A commit that changes with the files of a repository: 40 hex digits."""
    digest = hashlib.sha1()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _etag(name: str, content: bytes) -> str:
    """Large files are known by their SHA-256, others by their git hash."""
    if name.endswith(_LARGE):
        return f'"{hashlib.sha256(content).hexdigest()}"'
    blob = b"blob %d\x00" % len(content) + content
    return f'"{hashlib.sha1(blob).hexdigest()}"'


def _tree_entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    oid = _etag("", content).strip('"')
    entry: dict[str, Any] = {"type": "file", "path": path.name, "size": len(content), "oid": oid}
    if path.name.endswith(_LARGE):
        sha256 = _etag(path.name, content).strip('"')
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry


def main() -> None:
    """Serve the folder given on the command line; the port is printed first."""
    server = _Server(Path(sys.argv[1]))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
