from __future__ import annotations

import pytest
import torch

from backbones.training.errors import (
    DivergedError,
    InterruptedRunError,
    StorageError,
    UsageError,
    run_command,
)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("bad\n  input"), 2, "error: bad input\n"),
        (DivergedError("nan"), 3, "error: nan\n"),
        (StorageError("full"), 5, "error: full\n"),
        (InterruptedRunError("later"), 75, "error: later\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "smaller --batch-size"),
        (MemoryError(), 4, "smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB"), 4, "--accumulate 2"),
    ],
)
def test_each_end_has_its_code_and_one_line(capsys, error, code, message):
    assert run_command(lambda: _raise(error)) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_success_is_silent_and_surprises_keep_their_traceback(capsys):
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="surprise"):
        run_command(lambda: _raise(RuntimeError("surprise")))


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_command(lambda: _raise(UsageError("bad"))) == 2
    assert capsys.readouterr().err == ""
