"""Publish a converted folder on the hub; without --push, only show what would be uploaded.

The folder is checked first: that it is complete, that its weights are sound and that its card
states a licence. After the upload the hub is asked for the hashes of what it has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from .card import UNKNOWN_LICENSE, license_of
from .checksum import git_hash, sha256_of
from .errors import WeightsError, reason
from .files import read_state_dict

FILES = ("README.md", "config.json", "model.safetensors")
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MAX_CONFIG_BYTES = 2**20
_REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "use a token that may write there, or a repository of your own",
    404: "check the name; a private repository of somebody else looks as if it did not exist",
    409: "somebody else changes the repository now: try again",
    413: "the hub takes no file of that size, or your space there is used up",
}
_RETRY = "check the connection and try again; files that arrived are not sent again"


@dataclass(frozen=True)
class File:
    """A file to publish.

    Attributes:
        name: Its name, in the folder and on the hub.
        size: Its length in bytes.
        sha256: Its hash.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What `publish` did, or would do.

    Attributes:
        folder: The folder.
        repo_id: `org/repo`.
        endpoint: Address of the hub.
        license: The licence that the card states.
        files: What is uploaded.
        commit: The commit on the hub, 40 hex digits; empty if nothing was uploaded.
        url: Where to look at it; empty likewise.
    """

    folder: Path
    repo_id: str
    endpoint: str
    license: str
    files: tuple[File, ...]
    commit: str = ""
    url: str = ""

    def __str__(self) -> str:
        width = max(len(f"{file.size:,}") for file in self.files)
        lines = [
            f"folder   {self.folder}",
            f"to       {self.endpoint}/{self.repo_id}",
            f"licence  {self.license}",
            *(f"{f.size:>{width},} bytes  {f.name:<17}  sha256 {f.sha256}" for f in self.files),
        ]
        if self.commit:
            return "\n".join(
                [*lines, f"commit   {self.commit}, has these hashes", f"see      {self.url}"]
            )
        return "\n".join([*lines, "dry run: nothing was uploaded; add --push to do it"])


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    push: bool = False,
    private: bool = False,
    message: str = "",
) -> Publication:
    """Check a folder that `convert` wrote, and upload it in one commit.

    Args:
        folder: The folder.
        repo_id: `org/repo` on the hub; it is created if need be.
        push: Upload; else everything but that is done.
        private: Create the repository as one that only its owners see.
        message: Subject of the commit.

    Returns:
        What was done, or would be.

    Raises:
        ValueError: The folder is incomplete or has more than it should, its card states no
            licence, or `repo_id` is no name of a repository.
        WeightsError: The weights are damaged; the upload failed; the hub has other files than
            were sent.
    """
    folder = Path(folder)
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no repository: write organisation/name")
    license = _check(folder)
    files = tuple(_describe(folder / name) for name in FILES)
    plan = Publication(folder, repo_id, constants.ENDPOINT, license, files)
    if not push:
        return plan
    api = HfApi(library_name="fused-backbones")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message=message or f"Add {folder.resolve().name}",
        )
        entries = list(api.list_repo_tree(repo_id, revision=commit.oid))
    except Exception as error:  # the client raises what its HTTP library does
        raise WeightsError(_explain(error, plan)) from error
    _compare(folder, files, [entry for entry in entries if isinstance(entry, RepoFile)], plan)
    url = f"{plan.endpoint}/{repo_id}"
    return Publication(folder, repo_id, plan.endpoint, license, files, commit.oid, url)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m backbones publish`.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument("folder", metavar="FOLDER", help="what `convert` wrote")
    parser.add_argument("repo_id", metavar="REPO", help="organisation/name on the hub")
    parser.add_argument("--push", action="store_true", help="upload; else only show what would be")
    parser.add_argument(
        "--private", action="store_true", help="create the repository as a private one"
    )
    parser.add_argument("--message", metavar="M", default="", help="subject of the commit")


def run(arguments: argparse.Namespace) -> int:
    """Publish, and print what was done.

    Args:
        arguments: What was parsed.

    Returns:
        The exit code.

    Raises:
        ValueError: As `publish`.
        WeightsError: As `publish`.
    """
    print(
        publish(
            arguments.folder,
            arguments.repo_id,
            push=arguments.push,
            private=arguments.private,
            message=arguments.message,
        )
    )
    return 0


def _check(folder: Path) -> str:
    """Check a folder, and return the licence of its card."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give what `python -m backbones convert` wrote")
    found = {path.name for path in folder.iterdir()}
    missing, strange = sorted(set(FILES) - found), sorted(found - set(FILES))
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: convert the weights again")
    if strange:
        raise ValueError(f"{folder} has more than is published: move {', '.join(strange)} away")
    config = folder / "config.json"
    try:
        parsed = json.loads(config.read_bytes()[:_MAX_CONFIG_BYTES])
        if not isinstance(parsed, dict) or not isinstance(parsed.get("architecture"), str):
            raise ValueError("it names no architecture")
        license = license_of((folder / "README.md").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} cannot be published: {reason(error, 200)}; convert the weights again"
        ) from error
    if license in ("", UNKNOWN_LICENSE):
        raise ValueError(
            f"{folder / 'README.md'} states no licence of the weights: ask who trained them, and "
            "convert again with --license"
        )
    read_state_dict(folder / "model.safetensors")
    return license


def _describe(path: Path) -> File:
    return File(path.name, path.stat().st_size, sha256_of(path))


def _compare(
    folder: Path, files: tuple[File, ...], entries: list[RepoFile], plan: Publication
) -> None:
    """Compare what the hub says it has with what was sent."""
    there = {entry.path: entry for entry in entries}
    for file in files:
        entry = there.get(file.name)
        if entry is not None and entry.lfs is not None:
            same, has = entry.lfs.sha256 == file.sha256, f"sha256 {entry.lfs.sha256}"
        else:
            # small files are known by git's hash
            git = git_hash(folder / file.name)
            same, has = entry is not None and entry.blob_id == git, "another content"
        if not same:
            raise WeightsError(
                f"{plan.endpoint}/{plan.repo_id} has {has} for {file.name}, which is "
                f"{file.sha256} here: delete that commit and publish again"
            )


def _explain(error: Exception, plan: Publication) -> str:
    """What went wrong with an upload, and what to do, in one line."""
    chain = list(_causes(error))
    failed = [e for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    status = failed[0].response.status_code if failed else 0
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        remedy = "unset HF_HUB_OFFLINE"
    elif status == 401 and get_token() is None:
        remedy = f"you are not logged in: {_REMEDIES[401]}"
    else:
        remedy = _REMEDIES.get(status, _RETRY)
    cause = failed[0] if failed else chain[-1]
    text = re.sub(r"For more information check: \S+ ?", "", reason(cause, 600)).rstrip()
    return f"cannot publish {plan.folder} as {plan.repo_id}: {text}; {remedy}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
