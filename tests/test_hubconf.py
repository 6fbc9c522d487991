"""torch.hub from a plain checkout, in processes that know nothing of an installed package."""

import ast
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

import backbones
from tests.support.process import ROOT, copy_checkout, python

WORKER = """
import multiprocessing, pickle, sys
import torch

def work(payload, queue):
    import backbones
    model = pickle.loads(payload)
    queue.put((backbones.__file__, model(torch.zeros(1, 3, 32, 32)).shape[1]))

if __name__ == "__main__":
    checkout = sys.argv[1]
    model = torch.hub.load(checkout, "shvit_s1", source="local", num_classes=7).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    from backbones import training  # a later import
    tagged = torch.hub.load(checkout, "model", "shvit_s2.in1k", source="local", num_classes=0)
    assert type(tagged).__module__ == "backbones.shvit"
    loaded = torch.hub.load(checkout, "shvit_s1", source="local", pretrained=True)
    assert loaded.head.l.bias[3] == 42
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(pickle.dumps(model), queue))
    process.start()
    print(queue.get(timeout=120))
    process.join()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("hub") / "checkout")


def test_forward_later_imports_and_spawned_workers_after_the_load(checkout, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    weights = timm.create_model("shvit_s1").state_dict()
    weights["head.l.bias"][3] = 42
    save_file(weights, tmp_path / "shvit_s1.in1k.safetensors")
    environment = {"BACKBONES_WEIGHTS_DIR": str(tmp_path)}
    run = python(tmp_path / "worker.py", checkout, cwd=tmp_path, environment=environment)
    assert run.returncode == 0, run.stderr
    file, classes = ast.literal_eval(run.stdout.splitlines()[-1])
    assert Path(file) == checkout / "backbones" / "__init__.py"
    assert classes == 7


def test_another_package_of_the_name_is_a_clear_error(checkout, tmp_path):
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones" / "__init__.py").write_text("")
    code = f"import backbones, torch; torch.hub.load({str(checkout)!r}, 'shvit_s1', source='local')"
    run = python("-c", code, cwd=tmp_path)
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: another package called 'backbones' is already imported")
    assert str(tmp_path / "backbones" / "__init__.py") in last


def test_entry_points_are_the_models_and_documented(checkout, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(checkout)!r}); import hubconf; "
        "print({n: f.__doc__ for n, f in vars(hubconf).items() "
        "if callable(f) and n[0] != '_'})"
    )
    run = python("-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    entries = ast.literal_eval(run.stdout)
    assert set(entries) == {"model", *backbones.list_models()}
    assert all(text and "timm.create_model" in text for text in entries.values())


def test_dependencies_are_what_the_checkout_imports():
    module = ast.parse((ROOT / "hubconf.py").read_text())
    (dependencies,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "dependencies"
    )
    for name in dependencies:
        __import__(name)
    assert {"torch", "timm"} <= set(dependencies)
