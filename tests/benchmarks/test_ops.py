"""The benchmark of the ops, as far as a CPU goes: its peers agree, its floors are counted right."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import _choice
from benchmarks import _harness, ops
from benchmarks.cases import all_cases, depthwise_conv, tiny_cases, window_attention
from benchmarks.peers import PEERS, Peer, outputs

TINY = {f"{case.op}-{case.name}": case for case in tiny_cases()}
PAIRS = [
    pytest.param(case, peer, id=f"{name}-{peer}")
    for name, case in TINY.items()
    for peer in PEERS[case.op]
    # a second each: one case of each op
    if not peer.endswith("compiled") or "grid8x8" in name or case.op != "window_attention"
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("case, peer", PAIRS)
def test_peers_agree_with_the_reference(case, peer):
    rows = _harness.measure(case, peer, "cpu")
    if case.op == "window_attention" and peer == "timm" and case.ragged and not case.pad:
        assert "timm takes no map that its windows do not fill" in rows[0]["error"]
        return
    modes = ["forward"] if peer.startswith("flex") else list(case.modes)
    assert [row.get("mode") for row in rows] == modes, rows
    assert all("error" not in row and row["difference"] < 1e-5 for row in rows)


class Wrong(Peer):
    def run(self, *arguments):
        return (super().run(*arguments)[0] * 1.001,)


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    case = TINY["partial_attention-tiny@20x28.stage0"]
    monkeypatch.setitem(PEERS[case.op], "backbones", Wrong)
    (row,) = _harness.measure(case, "backbones", "cpu")
    assert row["error"] == "ArithmeticError: differs from the reference"
    assert row["difference"] == pytest.approx(1e-3, rel=1e-3)


def test_proves_itself_without_a_gpu_and_writes_nothing(capsys, tmp_path):
    assert ops.main(["--op", "partial_attention", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "partial_attention tiny@20x28.stage0 sdpa training: differs from the reference" in out
    assert "no result written" in out and not list(tmp_path.iterdir())


def test_refuses_to_write_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        ops.main(["--write"])
    assert "no GPU here, and times of a CPU are no result" in capsys.readouterr().err


def test_an_unknown_case_is_named(capsys):
    assert ops.main(["--case", "davit"]) == 2
    assert "no case contains 'davit'; there are\n  tiny@56x84" in capsys.readouterr().err


def test_names_are_unique():
    names = [(case.op, case.name) for case in all_cases()]
    assert len(set(names)) == len(names)
    assert len(TINY) == len(tiny_cases())


@pytest.mark.parametrize(
    "case",
    # one of each op; of convolutions also one with an activation behind, which is computed anew
    [*{case.op: case for case in all_cases()}.values(), depthwise_conv.tiny_cases()[2]],
    ids=lambda case: f"{case.op}-{case.name}",
)
def test_floors_have_the_flops_of_the_op(case):
    for mode, index in case.modes.items():
        inputs = case.tensors("meta")
        for i, tensor in enumerate(inputs.values()):
            tensor.requires_grad_(index in (None, i))
        with FlopCounterMode(display=False) as counter:
            outs = outputs(case.function()(**inputs))
            forward = counter.get_total_flops()
            sum(out.sum() for out in outs).backward()
        both = counter.get_total_flops()
        parts = {"forward": forward, "training": both}
        assert case.floor(mode).flops == parts.get(mode, both - forward), mode


def test_floors_have_the_bytes_of_all_maps_once():
    case = window_attention.cases()[0]
    size = 2 * 128 * 56 * 56 * 64
    assert case.floor("forward").bytes == 4 * size
    assert case.floor("training").bytes == 11 * size
    case = next(c for c in depthwise_conv.cases() if c.part == "lepe" and c.stage == 0)
    assert [case.floor(mode).bytes for mode in case.modes] == [3 * size, 2 * size, 2 * size]


def test_the_implementation_that_a_row_names_is_timed_backward_too(monkeypatch):
    case = depthwise_conv.tiny_cases()[0]
    for name, ours in (("backbones", True), ("pytorch", False)):
        # as on a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with PEERS[case.op][name](case, torch.compile).scope():
            assert _choice._forced is ours
    assert _choice._forced is None


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that measures everything in no time."""
    head = {"device": "NVIDIA H200", "commit": "abc"}

    def measure(case, peer, device):
        times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 0.5)
        row = {"op": case.op, "case": case.name, "dtype": "bfloat16", "peer": peer, **times}
        rest = {"percent_of_floor": 10.0, "bound_us": 50.0, "peak_mib": 1.0}
        return [{**row, "mode": mode, **rest} for mode in case.modes]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "environment", lambda commit: head)
    monkeypatch.setattr(ops, "measure", measure)

    def run(*options: str) -> list:
        assert ops.main(["--write", "--out", str(tmp_path), *options]) == 0
        result = json.loads((tmp_path / "ops_nvidia_h200.json").read_text())
        assert result.items() >= head.items()
        return result["rows"]

    run.head = head
    return run


def test_runs_of_the_same_code_add_up_and_others_start_anew(gpu):
    first = gpu("--case", "tf_224@224x224.stage0.block")
    peers = len(PEERS["window_attention"])
    assert len(first) == 2 * peers
    assert len(gpu("--case", "tf_224@224x224.stage1.block")) == 4 * peers
    assert len(gpu("--case", "tf_224@224x224.stage1.block")) == 4 * peers
    gpu.head["commit"] = "abd"
    assert gpu("--case", "tf_224@224x224.stage0.block") == first


def test_a_budget_ends_the_run_and_keeps_what_is_measured(gpu, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(ops.time, "monotonic", lambda: next(clock))
    rows = gpu("--budget", "4")
    assert len(rows) == 2 * 4
    assert {row["peer"] for row in rows} <= {"backbones", "timm", "sdpa core"}
    assert "budget of 4 s used: 4 of" in capsys.readouterr().out


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match=r"no ceilings of 'Some GPU': measure them"):
        _harness.ceiling("Some GPU")
