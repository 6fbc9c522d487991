"""Programs for other runtimes: ONNX, whole and without any op of ours."""

from pathlib import Path

import pytest
import torch
from torch import nn

import backbones
from tests.backbones.models import FAMILIES, SMALLEST, Small, deterministic, relative_error
from tests.support import golden
from tests.support.process import ROOT, python

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason=f"pip install {_name}, or the extra clients")

FREE = torch.export.Dim.DYNAMIC
BATCH = {0: FREE}
ANY = {0: FREE, 2: FREE, 3: FREE}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Small:
    return request.param


def images(*shape: int) -> torch.Tensor:
    return golden.image(shape).float()


@torch.no_grad()
def check(model: nn.Module, free: dict, shape: tuple[int, ...], others: list, **kwargs) -> None:
    """Export a model at one shape, and run it in onnxruntime at others."""
    import onnxruntime

    program = torch.onnx.export(
        model, (images(*shape),), dynamo=True, dynamic_shapes=(free,), verbose=False, **kwargs
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    assert not program.model_proto.functions
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for other in others:
        x = images(*other)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(logits), model(x)) < 1e-4


@pytest.mark.parametrize("name", ["biformer", "davit", "shvit", "tic"])
def test_onnx_with_free_batch(name):
    model = deterministic(FAMILIES[name].create_short(), torch.float32)
    check(model, BATCH, (2, 3, 64, 64), [(1, 3, 64, 64), (3, 3, 64, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biformer", "davit", "l2vit", "shvit"])
def test_onnx_with_free_batch_and_size(name):
    # MaxViT's windows fill maps of some sizes, and those of others not: these are two programs, as
    # are OverLoCK's of small and large maps
    model = deterministic(FAMILIES[name].create(), torch.float32)
    others = [(2, 3, 96, 160), (1, 3, 101, 133), (3, 3, 64, 224)]
    # sizes that no stage maps to one pixel, which export would make a constant
    check(model, ANY, (2, 3, 96, 160), others)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values(), ids=SMALLEST)
def test_onnx_of_fused_models(name):
    model = deterministic(backbones.create_model(name), torch.float32).fuse()
    size = model.pretrained_cfg["input_size"]
    # a later one than PyTorch's default
    check(model, BATCH, (2, *size), [(1, *size), (3, *size)], opset_version=23)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values(), ids=SMALLEST)
def test_onnx_of_exportable_models_without_classifier(name):
    model = backbones.create_model(name, exportable=True, num_classes=0)
    model = deterministic(model, torch.float32)
    check(model, BATCH, (2, 3, 64, 96), [(1, 3, 64, 96), (3, 3, 64, 96)])


@pytest.mark.slow
def test_the_example(tmp_path: Path):
    file = tmp_path / "model.onnx"
    program = ROOT / "examples" / "export_onnx.py"
    run = python(program, "shvit_s1", file, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    errors = [float(line.split()[-1]) for line in run.stdout.splitlines() if "error" in line]
    assert len(errors) == 2 and max(errors) < 1e-4
    assert file.is_file()


@pytest.mark.slow
@torch.no_grad()
def test_programs_without_ops_of_ours(family):
    # for runtimes other than PyTorch's: timm's flag, at a fixed size with a free batch
    model = deterministic(family.create_short(exportable=True))
    program = torch.export.export(model, (golden.image((2, 3, 64, 64)),), dynamic_shapes=(BATCH,))
    assert "backbones." not in str(program.graph)
    for batch in (1, 3):
        x = golden.image((batch, 3, 64, 64))
        assert relative_error(program.module()(x), model(x)) < 1e-12
