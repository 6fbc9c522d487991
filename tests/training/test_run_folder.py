from __future__ import annotations

import json

import pytest
import torch
import yaml

from backbones.training.checkpoint import Checkpoint
from backbones.training.config import parse, to_dict, to_yaml
from backbones.training.errors import UsageError
from backbones.training.run_folder import Row, RunFolder, new_run_path
from backbones.training.train_config import TrainConfig


def _row(epoch, top1_ema=None):
    return Row(
        epoch=epoch, step=22 * epoch, lr=0.1 / 3, train_loss=1 / epoch, val_loss=2 / epoch,
        top1=90.0 + epoch / 3, top5=99.0, top1_ema=top1_ema, images_per_s=123.4, wait_percent=1.5,
        skipped=0, bad_images=0, seconds=10.0 * epoch,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_new_runs_are_numbered(tmp_path):
    assert new_run_path(tmp_path, "digits").name == "digits-1"
    (tmp_path / "digits-1").mkdir()
    (tmp_path / "digits-2").mkdir()
    assert new_run_path(tmp_path, "digits").name == "digits-3"


@pytest.mark.parametrize("top1_ema", [None, 93.21])
def test_metrics_survive_a_restart_up_to_its_step(folder, top1_ema):
    rows = [_row(epoch, top1_ema) for epoch in (1, 2, 3)]
    for row in rows:
        folder.add_row(row)
    again = RunFolder(folder.path)
    again.read_rows(step=50)
    assert again.rows == rows[:2]
    again.add_row(rows[2])
    assert len((folder.path / "metrics.csv").read_text().splitlines()) == 4


def test_a_metrics_file_that_is_cut_off_loses_its_last_row_only(folder):
    for epoch in (1, 2):
        folder.add_row(_row(epoch))
    path = folder.path / "metrics.csv"
    path.write_text(path.read_text()[:-30])
    again = RunFolder(folder.path)
    again.read_rows(step=1000)
    assert again.rows == [_row(1)]


def test_only_settings_that_change_results_must_stay(folder):
    def config(*argv):
        return to_dict(parse(TrainConfig, argv, program="train.py").config)

    folder.write_config(to_yaml(parse(TrainConfig, ["--lr", "0.1"], program="train.py")))
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == config("--lr", "0.1")
    same = ["--lr", "0.1", "--workers", "3", "--processes", "1", "--checkpoint-every", "5"]
    folder.check_config(config(*same), TrainConfig)
    with pytest.raises(UsageError, match=r"--lr was 0\.1, now 0\.2; --epochs was 12, now 3"):
        folder.check_config(config("--lr", "0.2", "--epochs", "3"), TrainConfig)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another --out"):
        RunFolder(tmp_path / "file" / "run").create()


@pytest.mark.parametrize(
    ("keep", "best", "kept"), [(1, 1, [1, 5]), (1, 5, [5]), (3, 1, [1, 3, 4, 5]), (3, 4, [3, 4, 5])]
)
def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, keep, best, kept):
    folder = RunFolder(tmp_path, keep)
    # the last step is saved again, with its evaluation
    for step in (1, 2, 3, 4, 5, 5):
        state = Checkpoint({"x": torch.ones(1)}, None, {}, {})
        assert folder.save(step, state, min(step, best))
    left = [path.name for path in sorted(folder.checkpoints.iterdir())]
    again = "step-00000005-again"
    assert left == [again if step == 5 else f"step-{step:08d}" for step in kept]


def test_status_is_plain_json(folder):
    folder.write_status("interrupted", 17, "a signal")
    status = json.loads((folder.path / "status.json").read_text())
    assert status == {"state": "interrupted", "step": 17, "reason": "a signal"}
