"""The comparison of whole models on a CPU, with models that need no time."""

import json

import pytest
import torch
from torch import nn

from benchmarks import _cpu, cpu


class Scale(nn.Module):
    """A model that can be fused."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.pretrained_cfg = {"input_size": (3, 4, 6)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x

    def fuse(self) -> "Scale":
        return self


@pytest.fixture
def peer(monkeypatch) -> Scale:
    """The peer of every model but the missing one."""
    theirs = Scale()

    def create(name: str) -> tuple[str, dict[str, nn.Module]]:
        if name == "missing":
            raise ModuleNotFoundError("no peer\nat all")
        return "timm", {"ours": Scale(), "fused": Scale(), "peer": theirs}

    monkeypatch.setattr(cpu, "create", create)
    return theirs


def test_rows_are_printed_and_added_to_the_result(peer, monkeypatch, tmp_path, capsys):
    result = tmp_path / "cpu.json"
    monkeypatch.setattr(cpu, "RESULT", result)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    arguments = ["--threads", "1", "2", "--seconds", "0"]
    assert cpu.main(["b", "--batch", "8", "1", *arguments]) == 0
    assert counts == [1, 2, 1, 2, torch.get_num_threads()]
    assert not result.exists()
    assert cpu.main(["b", "--batch", "8", *arguments, "--write"]) == 0
    assert cpu.main(["missing", "a", "--batch", "1", *arguments, "--write"]) == 1
    out = capsys.readouterr().out
    assert "model=missing batch=1 threads=2 error=ModuleNotFoundError: no peer\n" in out
    written = json.loads(result.read_text())
    keys = [(row["model"], row["batch"], row["threads"]) for row in written["rows"]]
    assert keys == [("a", 1, 1), ("a", 1, 2), ("b", 8, 1), ("b", 8, 2)]
    # those of another version go
    result.write_text(json.dumps({**written, "torch": "1.0"}))
    cpu.main(["a", "--batch", "1", "--threads", "1", "--seconds", "0", "--write"])
    assert len(json.loads(result.read_text())["rows"]) == 1


def test_a_wrong_peer_is_an_error_and_not_a_time(peer):
    for factor in (2.001, float("nan")):
        peer.factor.data.fill_(factor)
        (row,) = cpu.measure(["b"], [1], [1], 0)
        assert "outputs differ by" in row["error"] and "ours" not in row


def test_ratios_are_of_medians_and_of_the_faster_peer_for_the_fused():
    times = {"ours": [1.0, 2.0, 9.0], "fused": [1.0, 1.0, 1.0], "peer": [2.0, 3.0, 4.0]}
    row = cpu.summary(times)
    assert (row["ours"], row["fused"], row["ours_best"]) == (1.5, 3.0, 2.0)
    assert (row["turns"], row["spread_peer"]) == (3, 1.4)
    row = cpu.summary({**times, "peer_fused": [1.0, 2.5, 5.0]})
    assert (row["ours"], row["fused"], row["fused_best"]) == (1.5, 2.5, 1.0)


def test_each_model_has_the_layout_in_which_it_is_faster(monkeypatch):
    faster = iter(cpu.FORMATS)

    def time(ways: cpu.Ways, seconds: float) -> dict[str, float]:
        fast = next(faster)
        return {layout: float(layout != fast) for layout in ways}

    monkeypatch.setattr(cpu, "best_times", time)
    models = {"ours": nn.Conv2d(2, 2, 3), "peer": nn.Conv2d(2, 2, 3)}
    ways, layouts = cpu.in_layouts(models, torch.randn(1, 2, 4, 6), 0.0)
    assert layouts == {"ours": "default", "peer": "channels_last"}
    assert not ways["ours"]().is_contiguous(memory_format=torch.channels_last)
    assert ways["peer"]().is_contiguous(memory_format=torch.channels_last)


def test_ways_take_turns_and_the_first_turn_does_not_count():
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    times = _cpu.times_in_turns(ways, 0.0, 3)
    assert "".join(called) == "baabbaab"
    assert [len(values) for values in times.values()] == [3, 3]


def test_models_of_a_comparison_have_the_same_lively_weights():
    peer, models = cpu.create("shvit_s1")
    assert peer == "timm" and list(models) == ["ours", "fused", "peer", "peer_fused"]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        outputs = {name: model(x) for name, model in models.items()}
    assert cpu.difference(outputs) < 1e-5
    # fresh weights make every branch a zero
    assert all(
        value.count_nonzero() for value in models["ours"].state_dict().values() if value.ndim
    )
    assert type(models["peer"]).__module__ == "timm.models.shvit"
    assert len(models["fused"].state_dict()) < len(models["ours"].state_dict())
