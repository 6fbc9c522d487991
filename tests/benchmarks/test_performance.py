"""The page of measurements: it is what the results say, and it says what a device measured."""

import re

import pytest

from benchmarks import performance
from benchmarks._gpu_page import best, ops_table, speedup
from benchmarks._page import markdown, traffic_table
from benchmarks._plots import bytes_points, speed_points, top1

PAGE = performance.DOCS / "performance.md"


def test_the_page_is_what_the_results_say():
    text = performance.page(performance.read(performance.RESULTS))
    assert PAGE.read_text() == text, "python benchmarks/performance.py --write"


def test_pictures_that_the_page_shows_exist():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE.read_text()):
        assert (PAGE.parent / name).stat().st_size > 5000, name


def model_row(provider: str, ms: float, graph: bool = False, **changes) -> dict:
    row = {"model": "davit_tiny", "provider": provider, "mode": "inference", "precision": "bf16"}
    row |= {"size": [224, 224], "batch": 128, "peer": "timm", "graph": graph, **changes}
    return {**row, "median_ms": ms, "images_per_s": 1e3 * row["batch"] / ms}


MODEL_ROWS = [
    model_row("ours", 12.8),
    model_row("ours fused", 10.0),
    model_row("ours fused", 8.0, graph=True),
    model_row("peer", 25.6),
    model_row("peer compiled", 16.0),
    model_row("peer compiled", 12.8, graph=True),
    model_row("ours", 40.0, mode="training", peak_mib=9000.0),
    model_row("peer", 80.0, mode="training", peak_mib=18000.0),
    model_row("ours", 2.5, precision="fp32", batch=1),
    {
        key: value
        for key, value in model_row("peer", 1, size=[800, 1216], error="RuntimeError: no").items()
        if key not in ("median_ms", "images_per_s")
    },
]
MODELS = {
    "device": "NVIDIA H200",
    **dict.fromkeys(("driver", "torch", "triton", "commit"), "1"),
    "rows": MODEL_ROWS,
}
TIMES = {"bound_us": 30.0, "percent_of_floor": 60.0}
OP_ROW = {"op": "window_attention", "case": "a", "dtype": "bfloat16", "mode": "forward"}
OPS = {
    **MODELS,
    "rows": [
        {**OP_ROW, "peer": "backbones", "median_ms": 0.05, **TIMES},
        {**OP_ROW, "peer": "timm", "median_ms": 0.2, **TIMES},
        {**OP_ROW, "peer": "sdpa", "median_ms": 0.1, **TIMES},
        {**OP_ROW, "peer": "flex core compiled", "error": "RuntimeError: no"},
    ],
}


@pytest.fixture(scope="module")
def results() -> dict:
    found = performance.read(performance.RESULTS)
    return {**found, "models_nvidia_h200": MODELS, "ops_nvidia_h200": OPS}


def test_what_a_device_measured_is_on_the_page(results):
    text = performance.page(results)
    assert "Nothing on this page was timed" not in text
    assert "Times were measured on: NVIDIA H200." in text
    assert "[rows](../benchmarks/results/models_nvidia_h200.json)" in text
    lines = text.splitlines()
    cells = "10000 / - | 12800 / 16000 | 5000 / - | 8000 / 10000 | 1.60 | 1.60 |"
    assert f"| `davit_tiny` | timm | 128 x 224 x 224 | {cells}" in lines
    assert "| `davit_tiny` | timm | 1 x 224 x 224 | 2.50 ms / - | - | - |" in lines
    assert any("128 x 800 x 1216" in line and "fails / -" in line for line in lines)
    assert "| `davit_tiny` | bf16 | 128 x 224 x 224 | 9000 | 18000 | 0.50 | - | - | - |" in lines
    assert "- `davit_tiny` peer, 1 rows: RuntimeError: no" in lines
    assert "![accuracy against throughput, bf16, batch 128]" in text and "(floors-" in text


def test_ops_are_summed_up_by_their_floors_and_fastest_peers():
    (line,) = ops_table(OPS["rows"]).splitlines()[2:]
    assert line == "| `window_attention` | forward | 1 | 60 to 60 (60) | 2.00 to 2.00 (2.00) |"


def test_the_fastest_of_each_side_is_compared():
    rows = MODEL_ROWS[:6]
    assert best(rows, "ours", graph=False)["provider"] == "ours fused"
    assert best(rows, "peer", graph=True)["provider"] == "peer compiled"
    assert speedup(rows, graph=False) == pytest.approx(1.6)
    assert speedup(rows[:3], graph=False) is None


def test_pictures_of_a_device_are_drawn(results, tmp_path):
    performance.draw(results, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn >= {"accuracy-speed-models_nvidia_h200.png", "floors-ops_nvidia_h200.png"}
    (point,) = speed_points(MODEL_ROWS)
    assert point == ("davit_tiny", 12800.0, 8000.0)
    assert top1("davit_tiny") == 82.8 and top1("tic_tiny") is None


def counts(megabytes: float) -> dict:
    return {"total": [7, megabytes], "kinds": {"copy": [7, megabytes]}}


def test_bytes_that_a_peer_cannot_move_are_missing():
    row = {"model": "davit_tiny", "image": [224, 224], "batch": 2, "mode": "forward"}
    row |= {"ours": counts(3000.0), "fused": counts(2000.0)}
    whole = {**row, "timm": counts(8000.0)}
    broken = {**row, "error": "timm: AssertionError: no such size"}
    assert traffic_table([whole, broken], "forward").splitlines()[2:] == [
        "| `davit_tiny` | 2 x 224 x 224 | timm | 7 | 3.00 | 2.00 | 7 | 8.00 | 0.25 |",
        "| `davit_tiny` | 2 x 224 x 224 | none of this size | 7 | 3.00 | 2.00 | - | - | - |",
    ]
    assert bytes_points([whole]) == [("davit_tiny", 1000.0, 4000.0)]
    assert bytes_points([broken]) == [("davit_tiny", 1000.0, None)]


def test_tables_are_markdown():
    assert markdown(["a", "b"], [["x", 1.5], ["y", None]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1.5 |",
        "| y | - |",
    ]


def test_a_stale_page_is_named(capsys, tmp_path):
    (tmp_path / "performance.md").write_text("old")
    assert performance.main(["--docs", str(tmp_path)]) == 1
    assert "is stale: python benchmarks/performance.py --write" in capsys.readouterr().out
    assert performance.main(["--docs", str(tmp_path), "--write"]) == 0
    assert performance.main(["--docs", str(tmp_path)]) == 0
