"""Check a peer against the reference, then time it."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import PEERS, Outputs, Peer, outputs

Row = dict[str, Any]

# relative to the norm of the reference, which is computed in float32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Ceiling(NamedTuple):
    """What a device reaches in a second.

    Attributes:
        bytes: Copied, read and written.
        flops: Of bfloat16 on its matrix units.
        vector_flops: Of float32 without them.
    """

    bytes: float
    flops: float
    vector_flops: float


# measured by a large copy and an 8192 x 8192 x 8192 product on random data; the last is lanes times
# clock times two, less a tenth
CEILINGS = {
    "NVIDIA H100 80GB HBM3": Ceiling(3.0e12, 798e12, 60e12),
    "NVIDIA H200": Ceiling(4.3e12, 790e12, 60e12),
}


def ceiling(name: str) -> Ceiling:
    """Look up the device called `name`.

    Raises:
        ValueError: Nobody has measured it.
    """
    if name not in CEILINGS:
        raise ValueError(f"no ceilings of {name!r}: measure them and add them to _harness.CEILINGS")
    return CEILINGS[name]


def environment(commit: str | None) -> dict[str, str]:
    """Describe the device, the versions and the commit of a run on a GPU."""
    import triton

    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "device": torch.cuda.get_device_name(),
        "arch": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "driver": _output(ask) or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or head_commit(),
    }


def head_commit() -> str:
    """The commit of this checkout, marked `-dirty` where files differ from it."""
    return _output(["git", "describe", "--always", "--dirty"]) or "unknown"


def _output(command: list[str]) -> str:
    """First line that a command prints; empty if it cannot run."""
    try:
        folder = Path(__file__).parent
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip().split("\n")[0]


def slug(device: str) -> str:
    """File name for a device."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def compiler(device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.compile` with static shapes; on the CPU without code generation."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    return partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)


def measure(case: Case, name: str, device: str) -> list[Row]:
    """Check and, on a GPU, time one peer of a case; what fails is a row with an `error`."""
    torch._dynamo.reset()
    rows: list[Row] = []
    base: Row = {
        "op": case.op,
        "case": case.name,
        "shape": [case.batch, case.height, case.width, case.channels],
        "dtype": str(case.dtype).removeprefix("torch."),
        "peer": name,
    }
    try:
        peer = PEERS[case.op][name](case, compiler(device))
        with peer.scope():
            base["difference"] = difference(case, peer, device)
            if not base["difference"] <= TOLERANCE[case.dtype]:
                raise ArithmeticError("differs from the reference")
            for mode in case.modes if device == "cuda" or peer.trains_on_cpu else ["forward"]:
                base["mode"] = mode
                rows.append(base | (_time if device == "cuda" else _prove)(case, peer, mode))
    # a peer may lack a kernel, run out of memory or not compile; the others go on
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        rows.append({**base, "error": message[:400]})
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def difference(case: Case, peer: Peer, device: str) -> float:
    """Distance of the peer's output to the reference's in float32, relative to its norm."""
    tensors = case.tensors(device)
    with torch.no_grad():
        exact = case.function(reference=True)(**{k: t.float() for k, t in tensors.items()})
        outs = [peer.to_map(out) for out in peer.run(*peer.prepare(tensors))]
    # a peer may have more outputs, which take its time too
    pairs = zip(outs, outputs(exact), strict=False)
    return max(float((out.float() - value).norm() / value.norm()) for out, value in pairs)


def _step(case: Case, peer: Peer, arguments: tuple[Tensor, ...], mode: str) -> Callable[[], Any]:
    """Function without arguments that does what `mode` says."""
    index = case.modes[mode]
    if mode == "forward":

        @torch.no_grad()
        def forward() -> Outputs:
            return peer.run(*arguments)

        return forward
    chosen = arguments if index is None else arguments[index : index + 1]
    leaves = tuple(argument.requires_grad_() for argument in chosen)
    # of several outputs some may not depend on the one leaf
    outs = tuple(out for out in peer.run(*arguments) if out.requires_grad)
    grads = tuple(torch.randn_like(out) for out in outs)
    if index is not None:
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    def training() -> Outputs:
        # maps that windows fill leave the vector outside them unused
        return torch.autograd.grad(peer.run(*arguments), leaves, grads, allow_unused=True)

    return training


def _prove(case: Case, peer: Peer, mode: str) -> Row:
    """Run once; gradients must be finite."""
    results = _step(case, peer, peer.prepare(case.tensors("cpu")), mode)()
    if not all(torch.isfinite(t).all() for t in results):
        raise ArithmeticError(f"{mode}: not finite")
    return {}


def _time(case: Case, peer: Peer, mode: str) -> Row:
    """Time with inputs that rotate, so that none is in the cache when its turn comes."""
    from triton.testing import do_bench

    floor, device = case.floor(mode), torch.cuda.get_device_properties()
    copies = min(16, 2 + 2 * device.L2_cache_size // floor.bytes)
    sets = [peer.prepare(case.tensors("cuda", seed)) for seed in range(copies)]
    steps = [_step(case, peer, arguments, mode) for arguments in sets]
    highest = peak(steps[0])
    turns = itertools.cycle(steps)
    p20, median, p80 = do_bench(
        lambda: next(turns)(), warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8]
    )
    limit = ceiling(device.name)
    flops = limit.flops if case.on_matrix_units else limit.vector_flops
    bound = max(floor.bytes / limit.bytes, floor.flops / flops)
    return {
        "median_ms": round(median, 5),
        "p20_ms": round(p20, 5),
        "p80_ms": round(p80, 5),
        "tb_per_s": round(floor.bytes / median / 1e9, 3),
        "tflop_per_s": round(floor.flops / median / 1e9, 1),
        "bound_us": round(bound * 1e6, 2),
        "percent_of_floor": round(bound * 1e5 / median, 1),
        "peak_mib": round(highest / 2**20, 1),
    }


def peak(step: Callable[[], Any]) -> int:
    """Bytes that a step takes at its height, on top of its inputs."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
