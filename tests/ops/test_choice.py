"""Which implementation of a depthwise convolution runs."""

import json

import pytest
import torch

from backbones.ops import _choice, _depthwise_pytorch, depthwise_conv
from backbones.ops._choice import Measured, Work, ours_is_faster


def work(pixels: int, channels: int, **other) -> Work:
    fixed = {"part": "forward", "dtype": "bfloat16", "kernel": 3, "stride": 1}
    return Work(**{**fixed, **other}, pixels=pixels, channels=channels)


ROWS = [
    Measured(work(1 << 18, 64), 1.5),
    Measured(work(1 << 12, 512), 0.8),
    Measured(work(1 << 12, 512, kernel=7), 1.1),
]


@pytest.mark.parametrize(
    "asked, ours",
    [
        (work(1 << 18, 64), True),
        (work(1 << 12, 512), False),
        # nearest in octaves: of pixels and of channels alike
        (work(1 << 16, 64), True),
        (work(1 << 14, 512), False),
        (work(1 << 20, 32), True),
        (work(1 << 18, 512), True),
        (work(1 << 12, 512, kernel=7), True),
        (work(1, 1, kernel=7), True),
        (work(0, 64), False),
    ],
)
def test_the_nearest_measured_size_decides(asked, ours):
    assert ours_is_faster(asked, ROWS) is ours


@pytest.mark.parametrize(
    "other", [{"part": "norm"}, {"dtype": "float32"}, {"kernel": 5}, {"stride": 2}]
)
def test_what_nobody_measured_pytorch_runs(other):
    assert not ours_is_faster(work(1 << 18, 64, **other), ROWS)
    assert not ours_is_faster(work(1 << 18, 64), [])


def test_the_table_is_well_formed():
    text = json.loads(_choice.TABLE.read_text())
    assert set(text) == {"note", "archs"}
    parts = {"forward", "norm", "norm_backward", "grad_input", "grad_weight"}
    for arch, rows in _choice.read_table().items():
        assert arch.startswith("sm_")
        assert rows, f"{arch}: leave out what has no rows"
        for row in rows:
            assert row.work.part in parts
            assert row.work.kernel in range(3, 18, 2)
            assert row.speedup > 0
    # the note has to go once there is a measurement
    assert ("No GPU has been measured" in text["note"]) == (not text["archs"])


def test_pytorch_computes_on_the_cpu_and_in_wide_types():
    x = torch.zeros(1, 2, 2, 3)
    assert _choice.implementation("forward", x, 3, 1) is _depthwise_pytorch
    with _choice.forced(True):
        assert _choice.implementation("forward", x.double(), 3, 1) is _depthwise_pytorch
        ours = _choice.implementation("forward", x, 3, 1)
        with _choice.forced(False):
            assert _choice.implementation("forward", x, 3, 1) is _depthwise_pytorch
        assert _choice.implementation("forward", x, 13, 1) is _depthwise_pytorch
        assert _choice.implementation("forward", x.half(), 13, 1) is ours
    assert ours.__name__ == "backbones.ops.triton.depthwise_conv"


@pytest.mark.gpu
def test_the_device_is_looked_up():
    x = torch.zeros(2, 8, 8, 16, device="cuda", dtype=torch.bfloat16)
    major, minor = torch.cuda.get_device_capability()
    rows = _choice.read_table().get(f"sm_{major}{minor}", ())
    expected = ours_is_faster(Work("forward", "bfloat16", 3, 1, 128, 16), rows)
    ours = _choice.implementation("forward", x, 3, 1) is not _depthwise_pytorch
    assert ours is expected
    weight = torch.zeros(16, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert not depthwise_conv(x, weight).any()
