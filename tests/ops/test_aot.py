"""Every kernel compiled for GPUs that are not here: limits, and the committed report."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks._report import broken_limits, differences, read
from tests.support.process import ROOT

# a kernel that no case launches would be missing in the report, and nobody would see it
KERNELS = {
    name
    for path in (ROOT / "ops" / "triton").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}


SPILL = {"stack": 8, "instructions": {"HGMMA": 2, "LDL": 1, "STL": 1}}


def row(**fields) -> dict:
    fixed = {"target": "sm_90", "kernel": "some_kernel", "variant": "bf16 P=7", "cases": ["a", "b"]}
    uses = {"registers": 100, "stack": 0, "shared": 1024, "instructions": {"HGMMA": 2}}
    return {**fixed, **uses, **fields}


def compile_all(*options: str) -> str:
    run = subprocess.run(
        [sys.executable, "benchmarks/aot.py", *options],
        cwd=ROOT,
        # interpreted kernels, as the other tests have them, cannot be compiled: it sees to that
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_kernel_compiles_for_sm_90_within_the_limits():
    out = compile_all("--quick", "--target", "sm_90")
    assert KERNELS
    for name in KERNELS:
        assert re.search(rf"^sm_90 +{name} ", out, re.MULTILINE), f"no case launches {name}"


@pytest.mark.slow
def test_all_targets_are_as_in_the_committed_report():
    import triton

    out = compile_all("--quick", "--check")
    # a release of Triton that nobody has reported on yet is held to the limits
    known = triton.__version__ in read(ROOT / "benchmarks" / "results" / "aot.json")
    assert (f"compared with the report of triton {triton.__version__}: 0 worse" in out) == known


@pytest.mark.parametrize(
    "fields, message",
    [
        (SPILL, "8 bytes spilled, none allowed"),
        ({"target": "sm_100", **SPILL}, "8 bytes spilled"),
        ({"shared": 300_000}, "300000 bytes of shared memory, 232448 allowed"),
        ({"target": "gfx942", "shared": 65537}, "65536 allowed"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ],
)
def test_a_broken_limit_is_named(fields, message):
    (line,) = broken_limits([row(), row(**fields)])
    assert message in line and "some_kernel [bf16 P=7] for a" in line


def test_spills_are_allowed_where_registers_are_few_and_stack_where_it_is_unused():
    rows = [row(target="sm_80", **SPILL), row(target="gfx942", **SPILL), row(stack=8)]
    assert not broken_limits(rows)
    assert differences([row()], rows[2:])[0] == []


@pytest.mark.parametrize(
    "new, message",
    [
        ([row(target="sm_80", **SPILL), row()], "sm_80 some_kernel bf16 a: spilled 0 -> 8 bytes"),
        ([row(target="sm_80"), row(instructions={"HMMA": 0})], None),
        (
            [row(target="sm_80"), row(instructions={})],
            "sm_90 some_kernel bf16 a: no HGMMA any more",
        ),
        (
            [row(target="sm_80"), row(cases=["a"])],
            "sm_90 some_kernel bf16 b: only in the committed",
        ),
        ([row(target="sm_80"), row(cases=["a", "b", "c"])], "bf16 c: not in the committed report"),
    ],
)
def test_what_became_worse_is_named(new, message):
    worse, _ = differences([row(target="sm_80"), row()], new)
    assert worse == [] if message is None else any(message in line for line in worse)
    worse, _ = differences([row(target="sm_80"), row()], new, partial=True)
    assert not any("only in" in line for line in worse)


def test_other_tiles_registers_and_memory_are_only_reported():
    worse, changed = differences(
        [row(cases=["a"])],
        [row(cases=["a"], variant="bf16 P=7 warps=8", registers=90, shared=2048)],
    )
    assert worse == []
    assert changed == [
        "sm_90 some_kernel bf16 a: registers 100 -> 90",
        "sm_90 some_kernel bf16 a: shared 1024 -> 2048",
    ]


def test_a_missing_disassembler_is_a_failure_that_says_what_to_do(monkeypatch, tmp_path):
    from benchmarks import _launches

    monkeypatch.setattr(_launches, "_CUOBJDUMP", tmp_path / "cuobjdump")
    with pytest.raises(RuntimeError, match=r"no .*cuobjdump: .*install triton"):
        _launches._nvidia(b"")


def test_interpreted_kernels_are_refused(monkeypatch):
    from benchmarks._launches import record

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: unset it"):
        record(lambda: None)
