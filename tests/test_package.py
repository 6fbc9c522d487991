"""The package as its users get it: from a wheel, and from a folder that nobody installed."""

import pytest

import backbones
from tests.support.process import PACKAGE, ROOT, copy_checkout, python

USE = """
import backbones, timm, sys
from pathlib import Path
import backbones.ops, backbones.pretrained, backbones.training
from backbones.ops import _choice
_choice.read_table()
home = Path(sys.argv[1])
for module in (backbones, backbones.ops, backbones.pretrained, backbones.training):
    assert home in Path(module.__file__).parents, module.__file__
import torch
model = timm.create_model("shvit_s1", num_classes=3).eval()
assert type(model).__module__ == "backbones.shvit"
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
print(backbones.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(
        folder / "source",
        (*PACKAGE, "pyproject.toml", "README.md", "LICENSE", "NOTICE"),
    )
    run = python(
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source),
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


def test_wheel_works_from_another_folder(wheel, tmp_path):
    target = tmp_path / "installed"
    run = python("-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = python("-c", USE, target, cwd=tmp_path, environment={"PYTHONPATH": str(target)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == backbones.__version__
    assert wheel.name == f"fused_backbones-{backbones.__version__}-py3-none-any.whl"
    names = {path.relative_to(target).parts[0] for path in target.rglob("*.py")}
    assert names == {"backbones"}
    assert (target / "backbones" / "py.typed").is_file()
    assert (target / "backbones" / "training" / "digits.npz").is_file()


def test_plain_checkout_works_from_another_folder(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    run = python("-c", USE, checkout, cwd=tmp_path, environment={"PYTHONPATH": str(checkout)})
    assert run.returncode == 0, run.stderr


def test_editable_install_is_this_checkout(tmp_path):
    run = python("-c", USE, ROOT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_import_is_lean(tmp_path):
    code = "import sys, backbones; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["matplotlib", "fvcore", "backbones.detection", "backbones.training"]
    run = python("-c", code, *heavy, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
