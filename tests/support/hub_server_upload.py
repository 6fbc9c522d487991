"""The upload side of the stand-in hub: what `huggingface_hub` asks when it publishes a folder.

Creation of a repository, the check of a card's header, the upload of large files by the basic
transfer of git-lfs, and the commit. Everybody may write unless `require_token` was called.

Requests can suffer the faults of `hub.fail`, under the keys `org/name/lfs` (method "PUT": the bytes
of a large file) and `org/name/commit` (method "POST"). The latter also knows "swap": the hub keeps
other bytes of large files than it was given.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

_TOKENS = "tokens.json"


def require_token(root: Path, token: str, *owners: str) -> None:
    """Let nobody write but who sends a token, and only to what these users and teams own.

    Args:
        root: The folder of the hub.
        token: The token.
        *owners: First parts of the repositories that may be written with it.
    """
    path = root / _TOKENS
    tokens = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**tokens, token: owners}))


class _Server(Protocol):
    root: Path
    lock: threading.Lock

    def fault(self, key: str, method: str) -> str: ...


class UploadSide:
    """Mixed into the handler of the stand-in hub, which gives it what is declared here."""

    server: _Server
    path: str
    headers: Any
    rfile: Any
    _suffer: Callable[[str], bool]
    _json: Callable[[Any], None]
    _error: Callable[..., None]
    _reply: Callable[[int, bytes, dict[str, str]], None]
    _commit_of: Callable[[Path], str]

    def do_PUT(self) -> None:
        """Take the bytes of a large file."""
        _, owner, name, oid = self.path.strip("/").split("/")
        kind = self.server.fault(f"{owner}/{name}/lfs", "PUT")
        if kind == "reset":
            self._suffer(kind)
            return
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._suffer(kind):
            return
        blob = self.server.root / "lfs" / oid
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        self._json({})

    def upload(self) -> None:
        """Answer a POST."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "models"] and parts[4:5] in (["preupload"], ["commit"]):
            answer = self._preupload if parts[4] == "preupload" else self._commit
            if self._may_write(parts[2]):
                answer("/".join(parts[2:4]), body)
        elif parts[-2:] == ["objects", "batch"]:
            self._batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body))
        elif parts[0] == "verify":
            self._verify(json.loads(body))
        else:
            self._error(404, "", "no such page")

    def _may_write(self, owner: str) -> bool:
        path = self.server.root / _TOKENS
        if not path.exists():
            return True
        tokens = json.loads(path.read_text())
        owners = tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owners is None:
            self._error(401, "", "Invalid username or password.")
        elif owner not in owners:
            self._error(403, "", f"You don't have the rights to write to {owner}")
        return owners is not None and owner in owners

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization'] or 'someone'}/{asked['name']}"
        if not self._may_write(repo_id.partition("/")[0]):
            return
        folder = self.server.root / "repos" / repo_id
        url = f"http://{self.headers['Host']}/{repo_id}"
        if folder.is_dir():
            answer = {"error": "You already created this model repo", "url": url}
            self._reply(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        folder.mkdir(parents=True)
        # as the hub itself begins a repository
        (folder / ".gitattributes").write_text(
            "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        )
        self._json({"url": url, "id": repo_id})

    def _preupload(self, repo_id: str, body: bytes) -> None:
        if not (self.server.root / "repos" / repo_id).is_dir():
            self._error(404, "RepoNotFound", "Repository not found")
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        host = f"http://{self.headers['Host']}"
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.server.root / "lfs" / item["oid"]).exists():
                answer["actions"] = {
                    "upload": {"href": f"{host}/lfs/{repo_id}/{item['oid']}", "header": {}},
                    "verify": {"href": f"{host}/verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _verify(self, asked: dict[str, Any]) -> None:
        blob = self.server.root / "lfs" / asked["oid"]
        content = blob.read_bytes() if blob.exists() else b""
        if (len(content), hashlib.sha256(content).hexdigest()) == (asked["size"], asked["oid"]):
            self._json({})
            return
        blob.unlink(missing_ok=True)
        self._error(422, "", "the uploaded object has another size or sha256")

    def _commit(self, repo_id: str, body: bytes) -> None:
        kind = self.server.fault(f"{repo_id}/commit", "POST")
        if self._suffer(kind):
            return
        folder = self.server.root / "repos" / repo_id
        with self.server.lock:
            for path, content in self._contents(body):
                swapped = kind == "swap" and path.endswith(".safetensors")
                (folder / path).write_bytes(content[::-1] if swapped else content)
            commit = self._commit_of(folder)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _contents(self, body: bytes) -> Iterator[tuple[str, bytes]]:
        """The files of a commit: one JSON object a line."""
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                yield value["path"], (self.server.root / "lfs" / value["oid"]).read_bytes()
