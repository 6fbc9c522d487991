"""The benchmark of whole models, as far as a CPU goes: providers agree, runs go on."""

import json

import pytest
import torch

from benchmarks import _model_runs, models
from benchmarks._model_runs import measure
from benchmarks._models import PROVIDERS, Job, pair, work

INFERENCE = Job("shvit_s1", "ours", "inference", "fp32", (64, 96), 4)
TRAINING = INFERENCE._replace(mode="training")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "job",
    [
        *(INFERENCE._replace(provider=key) for key in ("ours", "ours fused", "peer")),
        INFERENCE._replace(provider="peer compiled"),
        *(TRAINING._replace(provider=key) for key in ("ours", "peer")),
        TRAINING._replace(precision="bf16"),
        INFERENCE._replace(precision="bf16", provider="ours fused"),
    ],
    ids=lambda job: f"{job.mode}-{job.precision}-{job.provider}",
)
def test_providers_agree_with_the_reference(job):
    (row,) = measure(job, "cpu")
    assert "error" not in row
    assert row.items() >= {**job._asdict(), "size": [64, 96], "peer": "timm"}.items()
    rounding = _model_runs.TOLERANCE if job.precision == "fp32" else 0.5
    assert row["difference"] < rounding
    if job.precision == "bf16":
        assert row["difference"] > 1e-3


def test_a_provider_that_is_wrong_is_not_timed(monkeypatch):
    ours, peer = pair("shvit_s1")
    peer.head.l.bias.data += 0.1
    try:
        (row,) = measure(INFERENCE._replace(provider="peer"), "cpu")
    finally:
        peer.load_state_dict(ours.state_dict())
    assert row["error"].startswith("ArithmeticError: differs from the reference by more than")


def test_a_provider_that_cannot_is_a_row():
    (row,) = measure(INFERENCE._replace(size=(16, 16)), "cpu")
    assert row["error"].startswith("ValueError: images of 16x16 are too small")
    assert row["provider"] == "ours" and row["graph"] is False


def test_a_training_step_computes_all_gradients():
    with _model_runs._scope(TRAINING):
        subject, _ = _model_runs._subject(TRAINING, "cpu", PROVIDERS["ours"])
        grads = subject.step()
    assert [grad.shape for grad in grads] == [p.shape for p in subject.module.parameters()]
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_work_begins_with_what_matters_most():
    jobs = list(work(models.NAMES))
    assert len(set(jobs)) == len(jobs)
    assert not [job for job in jobs if PROVIDERS[job.provider].fused and job.mode == "training"]
    quick = [job for job in jobs if not PROVIDERS[job.provider].compiled]
    first = jobs[: 5 * len(models.NAMES)]
    assert first == quick[: len(first)]
    assert {(job.precision, job.batch) for job in first} == {("bf16", 128)}
    assert [job.provider for job in first[:3]] == ["ours", "ours fused", "peer"]
    assert {job.size for job in jobs if job.model == "shvit_s4"} == {(256, 256), (800, 1216)}
    assert {job.precision for job in jobs} == {"bf16", "tf32", "fp32"}


def test_proves_itself_without_a_gpu_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "own_size", lambda name: (128, 128))
    monkeypatch.setattr(models, "PROVIDERS", {"peer": PROVIDERS["peer"]})
    assert models.main(["shvit_s1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "shvit_s1 training fp32 2x128x128 timm: differs from the reference by" in out
    assert "no result written" in out and not list(tmp_path.iterdir())


def test_refuses_to_write_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        models.main(["--write"])
    assert "no GPU here, and times of a CPU are no result" in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys):
    assert models.main(["shvit_s9"]) == 2
    assert "nothing matches 'shvit_s9': did you mean" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that measures everything in no time."""
    head = {"device": "NVIDIA H200", "commit": "abc"}

    def measure(job, device):
        times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 0.5)
        run.jobs.append(job)
        return [
            {**job.row, "graph": graph, **times, "images_per_s": 9.0} for graph in (False, True)
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(models, "environment", lambda commit: head)
    monkeypatch.setattr(models, "measure", measure)

    def run(*options: str) -> list:
        run.jobs = []
        assert models.main(["shvit_s1", "--write", "--out", str(tmp_path), *options]) == 0
        result = json.loads((tmp_path / "models_nvidia_h200.json").read_text())
        assert result.items() >= head.items()
        return result["rows"]

    run.head = head
    return run


def test_a_further_run_goes_on_where_a_budget_ended(gpu, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(models.time, "monotonic", lambda: next(clock))
    jobs = list(work(["shvit_s1"]))
    assert len(gpu("--budget", "4")) == 2 * 4
    assert f"budget of 4 s used: 4 of {len(jobs)} done" in capsys.readouterr().out
    assert gpu.jobs == jobs[:4]
    assert len(gpu("--budget", "3")) == 2 * 7
    assert gpu.jobs == jobs[4:7]
    gpu.head["commit"] = "abd"
    assert len(gpu("--budget", "2")) == 2 * 2
    assert gpu.jobs == jobs[:2]


def test_rows_are_printed_for_people(gpu, capsys):
    gpu()
    lines = capsys.readouterr().out.splitlines()
    times = "0.5 ms (0.5 to 0.5), 9.0 images/s"
    assert f"shvit_s1 inference bf16 128x224x224 ours fused graph: {times}" in lines
    assert f"shvit_s1 training bf16 128x224x224 timm compiled: {times}" in lines
    assert "shvit_s1 training bf16 128x224x224: 1.00 times timm, 1.00 with graphs" in lines
