"""timm's own tests of models, run over ours: `python -m tests.timm_suite`.

They are in timm's source distribution only, so that of the installed version is downloaded. Between
a quarter of a minute and many minutes a model; 16 GB of memory for the largest.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

import backbones
from backbones.pretrained import FAMILIES
from tests.support.process import ROOT

_FILES = ("tests/test_models.py", "tests/conftest.py")
# timm runs some tests on the modules of this list only
_MODULES = "FEAT_INTER_FILTERS = ["
# they download weights, and ask for head_norm_first, which no released model uses
_LEFT_OUT = ("pretrained", "test_model_inference", "(test_head_hidden_size and davit)")
_TESTS = " and ".join(f"not {test}" for test in _LEFT_OUT)
_OPTION = "--backbones"


def main(arguments: list[str] | None = None) -> int:
    """Download timm's tests and run them; the exit code of pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.timm_suite", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="models, as 'davit_*'; default all")
    parser.add_argument("-k", dest="tests", default=_TESTS, help="which tests, as pytest's -k")
    parser.add_argument("-n", dest="jobs", default="0", help="how many processes")
    args = parser.parse_args(arguments)
    if not _chosen(args.names):
        parser.error(f"no model is called {' or '.join(args.names)}: python -m backbones list")
    with tempfile.TemporaryDirectory() as folder:
        _download(Path(folder))
        options = ["--import-mode=importlib", "-c", "/dev/null", "--rootdir", folder]
        # names of processes and warnings of markers would hide the summary
        options += ["-p", "tests.timm_suite", "-p", "no:cacheprovider", "--disable-warnings"]
        options += ["-n", args.jobs, "-k", args.tests, "-rfEs", "--tb=short", "--durations=5"]
        options += [f"{_OPTION}={' '.join(args.names)}", folder]
        return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode


def _download(folder: Path) -> None:
    """Put timm's tests into a folder, with our modules among those that it runs all tests on."""
    timm = f"timm=={version('timm')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-binary", ":all:", "--dest", folder, timm], check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as members:
        for name in _FILES:
            source = members.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{name}")
            assert source is not None
            (folder / Path(name).name).write_bytes(source.read())
    tests = folder / "test_models.py"
    text = tests.read_text()
    if text.count(_MODULES) != 1:
        raise RuntimeError(f"{timm} names its modules in another way: correct {__file__}")
    ours = "".join(f"{family!r}, " for family in FAMILIES)
    tests.write_text(text.replace(_MODULES, _MODULES + ours))


def _chosen(patterns: list[str]) -> set[str]:
    """Names of our models that fit a pattern."""
    names = backbones.list_models()
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let pytest and its processes know which models to keep."""
    parser.addoption(_OPTION, default="*", help="models to keep, separated by spaces")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the chosen models."""
    chosen = _chosen(config.getoption(_OPTION).split())
    kept, dropped = [], []
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("model_name", "")
        (kept if name and name.partition(".")[0] in chosen else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


if __name__ == "__main__":
    sys.exit(main())
