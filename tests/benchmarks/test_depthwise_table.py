"""The table of choices, from made-up measurements."""

import json

import pytest

from backbones.ops import _choice
from benchmarks import depthwise_table
from benchmarks.cases import depthwise_conv, depthwise_conv_norm


def rows(case, mode: str, ours: float, pytorch: float) -> list[dict]:
    base = {"op": case.op, "case": case.name, "dtype": "bfloat16", "mode": mode}
    times = {"backbones": ours, "pytorch": pytorch, "conv2d nchw": 0.001}
    return [{**base, "peer": peer, "median_ms": time} for peer, time in times.items()]


@pytest.fixture
def results(tmp_path):
    conv, norm = depthwise_conv.cases()[0], depthwise_conv_norm.cases()[0]
    measured = [
        *rows(conv, "forward", 0.5, 1.0),
        *rows(conv, "grad_weight", 1.0, 0.25),
        *rows(norm, "grad_norm", 0.5, 0.75),
        # what the table has no place for
        *rows(norm, "training", 1.0, 2.0),
        {"op": conv.op, "case": conv.name, "dtype": "float16", "peer": "backbones", "error": "no"},
        {"op": "window_attention", "case": "any", "dtype": "bfloat16", "mode": "forward"},
    ]
    for device, change in (("a", 1.0), ("b", 0.8)):
        changed = [
            {**row, "median_ms": row["median_ms"] * change}
            if row["peer"] == "pytorch" and "median_ms" in row
            else row
            for row in measured
            if "peer" in row
        ]
        result = {"arch": "sm_90", "rows": changed}
        (tmp_path / f"ops_{device}.json").write_text(json.dumps(result))
    return tmp_path


def test_measurements_become_choices(results, monkeypatch, capsys):
    table = results / "table.json"
    arguments = ["--results", str(results), "--table", str(table)]
    assert depthwise_table.main(arguments) == 0
    assert not table.exists()
    assert depthwise_table.main([*arguments, "--write"]) == 0
    assert "sm_90: ours is faster in 2 of 3" in capsys.readouterr().out
    monkeypatch.setattr(_choice, "TABLE", table)
    read = _choice.read_table.__wrapped__()["sm_90"]
    pixels = 128 * 56 * 56
    assert [(*row.work, row.speedup) for row in read] == [
        ("forward", "bfloat16", 5, 1, pixels, 64, 1.6),
        ("grad_weight", "bfloat16", 5, 1, pixels, 64, 0.2),
        ("norm_backward", "bfloat16", 3, 1, pixels, 96, 1.2),
    ]
    assert _choice.ours_is_faster(read[0].work, read)
    assert not _choice.ours_is_faster(read[1].work, read)
    assert json.loads(table.read_text())["note"] == depthwise_table.HOW


def test_the_committed_table_is_that_of_the_committed_results():
    table = depthwise_table.collect(depthwise_table.RESULTS)
    assert depthwise_table.TABLE.read_text() == depthwise_table.text(table)
