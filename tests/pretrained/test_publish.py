"""Publishing to the stand-in hub, with the real client in processes of its own."""

import hashlib
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from backbones.convert import convert
from backbones.pretrained import WeightsError, load_weights
from backbones.pretrained.checksum import sha256_of
from backbones.pretrained.publish import FILES, publish
from tests.support.hub_server import Hub
from tests.support.hub_server_upload import require_token
from tests.support.process import ROOT, python

KEY = "hf-hub:timm/shvit_s1.in1k/model.safetensors"

# runs commands and prints, for each, its exit code and what it wrote
COMMANDS = """
import contextlib, io, json, os, sys
from backbones.__main__ import main

outcomes = {}
for key, (token, *arguments) in json.loads(sys.argv[1]).items():
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    outcomes[key] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(outcomes))
"""

# creates models by name and prints, for each, the hash of all that it holds
CREATE = """
import json, os, sys, timm, backbones
from tests.pretrained.test_publish import digest

digests = [digest(timm.create_model("hf-hub:acme/shvit_s1.in1k", pretrained=True).state_dict())]
os.environ["BACKBONES_HUB_ORG"] = "acme"
digests.append(digest(timm.create_model("shvit_s1.in1k", pretrained=True).state_dict()))
print(json.dumps(digests))
"""


def digest(state_dict: dict[str, Tensor]) -> str:
    """The hash of all names and values."""
    found = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up weights of SHViT-S1, converted."""
    path = tmp_path_factory.mktemp("publish")
    model = timm.create_model("shvit_s1")
    torch.manual_seed(3)
    state = {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    torch.save(state, path / "shvit_s1.pth")
    checksums = path / "checksums.json"
    return convert(path / "shvit_s1.pth", path / "shvit_s1.in1k", checksums=checksums).folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, folder):
    """A hub where commands were run: their outcomes, and the hub itself."""
    path = tmp_path_factory.mktemp("hub")
    with Hub(path / "server") as hub:
        hub.root.mkdir(exist_ok=True)
        require_token(hub.root, "ours", "acme")
        require_token(hub.root, "theirs", "other")
        hub.fail("acme/reset/lfs", "reset", "PUT", times=1)
        hub.fail("acme/full/lfs", "413", "PUT")
        hub.fail("acme/swapped/commit", "swap", "POST")
        # what was uploaded before is not sent again
        copies = {}
        for name in ("reset", "full"):
            copies[name] = path / name
            shutil.copytree(folder, copies[name])
            weights = load_weights(folder)
            weights["head.l.bias"] += len(copies)
            save_file(weights, copies[name] / "model.safetensors")
        name = "acme/shvit_s1.in1k"
        content = (folder / "model.safetensors").read_bytes()
        commit = hub.add("timm/shvit_s1.in1k", {"model.safetensors": content})
        (path / "commit").write_text(commit)
        changed = {KEY: {"sha256": "0" * 64, "size": 1}}
        (path / "changed.json").write_text(json.dumps(changed))
        official = ["", "convert", "shvit_s1.in1k"]
        calls = {
            "dry": ["ours", "publish", str(folder), name],
            "push": ["ours", "publish", str(folder), name, "--push", "--message", "Add SHViT"],
            "again": ["ours", "publish", str(folder), name, "--push"],
            "reset": ["ours", "publish", str(copies["reset"]), "acme/reset", "--push", "--private"],
            "full": ["ours", "publish", str(copies["full"]), "acme/full", "--push"],
            "swapped": ["ours", "publish", str(folder), "acme/swapped", "--push"],
            "logged out": ["", "publish", str(folder), name, "--push"],
            "wrong token": ["none", "publish", str(folder), name, "--push"],
            "of another": ["theirs", "publish", str(folder), name, "--push"],
            "elsewhere": ["theirs", "publish", str(folder), "acme/new", "--push"],
            "official": [*official, str(path / "a"), "--checksums", str(path / "new.json")],
            "changed": [*official, str(path / "b"), "--checksums", str(path / "changed.json")],
        }
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        result = python("-c", COMMANDS, json.dumps(calls), cwd=ROOT, environment=environment)
        assert result.returncode == 0, result.stderr
        yield hub, json.loads(result.stdout.splitlines()[-1])


def test_a_dry_run_shows_all_and_sends_nothing(world, folder):
    hub, outcomes = world
    code, out, err = outcomes["dry"]
    assert (code, err) == (0, "")
    for name in FILES:
        assert name in out and sha256_of(folder / name) in out
        assert f"{(folder / name).stat().st_size:,} bytes" in out
    assert f"{hub.endpoint}/acme/shvit_s1.in1k" in out
    assert "nothing was uploaded; add --push" in out


def test_what_is_pushed_is_what_the_hub_has(world, folder):
    hub, outcomes = world
    code, out, err = outcomes["push"]
    assert (code, err) == (0, "")
    there = hub.root / "repos/acme/shvit_s1.in1k"
    assert sorted(path.name for path in there.iterdir()) == [".gitattributes", *FILES]
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert "has these hashes" in out
    assert out.splitlines()[-1].split()[-1] == f"{hub.endpoint}/acme/shvit_s1.in1k"
    assert outcomes["again"][0] == 0
    # the client tries again after a reset
    assert outcomes["reset"][0] == 0 and hub.requests("acme/reset/lfs")["PUT"] == 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("logged out", ["acme/shvit_s1.in1k", "you are not logged in", "hf auth login"]),
        ("wrong token", ["401", "hf auth login"]),
        ("of another", ["rights", "a repository of your own"]),
        ("elsewhere", ["rights", "a repository of your own"]),
        ("full", ["413", "no file of that size"]),
        ("swapped", ["model.safetensors", "sha256", "delete that commit"]),
    ],
)
def test_failures_are_one_line_with_the_remedy(world, case, words):
    code, out, err = world[1][case]
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0])
    assert all(word in lines[0] for word in words), err
    assert "For more information" not in err


def test_others_get_the_same_bits(world, folder, tmp_path):
    hub, original = world[0], KEY.removeprefix("hf-hub:")
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    before = hub.requests(original)
    there = python("-c", CREATE, cwd=ROOT, environment=environment)
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == [digest(load_weights(folder))] * 2
    # the organisation's copy, not the official one
    assert hub.requests(original) == before


def test_hashes_of_official_files_are_written_down_and_compared(world, folder):
    hub, outcomes = world
    path = hub.root.parent
    code, out, err = outcomes["official"]
    assert (code, err) == (0, "")
    known = {"sha256": sha256_of(folder / "model.safetensors")}
    known["size"] = (folder / "model.safetensors").stat().st_size
    assert json.loads((path / "new.json").read_text()) == {
        KEY: {**known, "revision": (path / "commit").read_text()},
        # the same tensors again
        "converted:shvit_s1.in1k": known,
    }
    assert KEY in out and "converted:shvit_s1.in1k" in out

    code, out, err = outcomes["changed"]
    assert (code, out) == (2, "")
    assert known["sha256"] in err and "0" * 64 in err and KEY in err
    assert not (path / "b").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("no folder", ValueError, "is no folder"),
        ("no card", ValueError, "has no README.md"),
        ("more", ValueError, "more than is published: move .env, notes.txt away"),
        ("no licence", ValueError, "states no licence"),
        ("unknown licence", ValueError, "convert again with --license"),
        ("header", ValueError, "cannot be published"),
        ("config", ValueError, "cannot be published: JSONDecodeError"),
        ("no architecture", ValueError, "names no architecture"),
        ("damaged", WeightsError, "truncated"),
        ("repository", ValueError, "write organisation/name"),
    ],
)
def test_what_is_not_fit_is_not_published(folder, tmp_path, change, error, message):
    copy, repo_id = tmp_path / "copy", "acme/shvit_s1.in1k"
    shutil.copytree(folder, copy)
    card = (copy / "README.md").read_text()
    if change == "no folder":
        copy = tmp_path / "nowhere"
    elif change == "no card":
        (copy / "README.md").unlink()
    elif change == "more":
        (copy / "notes.txt").write_text("mine")
        (copy / ".env").write_text("TOKEN=1")
    elif change == "no licence":
        (copy / "README.md").write_text(card.replace("license: mit\n", ""))
    elif change == "unknown licence":
        (copy / "README.md").write_text(card.replace("license: mit\n", "license: unknown\n"))
    elif change == "header":
        (copy / "README.md").write_text("---\n- a\n---\n")
    elif change == "config":
        (copy / "config.json").write_text("{")
    elif change == "no architecture":
        (copy / "config.json").write_text("{}")
    elif change == "damaged":
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[:-9])
    elif change == "repository":
        repo_id = "shvit"
    for push in (False, True):
        with pytest.raises(error, match=message) as caught:
            publish(copy, repo_id, push=push)
        assert "\n" not in str(caught.value)
