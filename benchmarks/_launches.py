"""What launchers launch, recorded on meta tensors and compiled for GPUs that are not here.

The launch method of every Triton kernel is replaced while the launchers run, so nothing is started;
Triton's own rules then specialise each launch for a target as they would on the device.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# matrix units (warp group, tensor core 5, warp), wide and asynchronous loads, spills
_SASS = {
    name: re.compile(rf"\b{pattern}")
    for name, pattern in {
        "HGMMA": "HGMMA",
        "UTCHMMA": "UTC[A-Z]*MMA",
        "HMMA": "HMMA",
        "LDG.E.128": r"LDG\.E\.(?:\w+\.)*128",
        "LDGSTS": "LDGSTS",
        "LDL": "LDL",
        "STL": "STL",
    }.items()
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its launcher made it."""

    kernel: JITFunction[Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.__name__

    @property
    def form(self) -> str:
        """Equal for launches that take the same branches: what is None, what is true."""
        values = {**dict(enumerate(self.args)), **self.options}
        chosen = {key: v for key, v in values.items() if v is None or isinstance(v, bool)}
        return f"{self.name} {chosen}"

    def specialise(self, target: GPUTarget) -> Specialised:
        """Decide what Triton compiles for this launch on `target`."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialisation, options = bind(*self.args, **self.options)
        packed = self.kernel._pack_args(backend, self.options, bound, specialisation, options)
        return Specialised(self.kernel, target, *packed)


@dataclass(frozen=True)
class Specialised:
    """What Triton compiles for a launch: types, constants, alignments and options."""

    kernel: JITFunction[Any]
    target: GPUTarget
    options: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    @property
    def variant(self) -> str:
        """Readable summary: first type, constants, warps and stages."""
        pointer = next(t for t in self.signature.values() if t.startswith("*"))
        constants = [
            f"{self.kernel.params[path[0]].name}={value}"
            for path, value in self.constants.items()
            # not the strides of one that Triton makes constants by itself
            if self.kernel.params[path[0]].is_constexpr or value is None
        ]
        compiled = f"warps={self.options.num_warps} stages={self.options.num_stages}"
        return " ".join([pointer[1:], *constants, compiled])

    @property
    def key(self) -> str:
        """Equal for launches that share their machine code."""
        parts = (self.kernel.__name__, self.target, self.signature, self.constants)
        return repr((*parts, self.attributes, self.options))

    def compile(self) -> dict[str, Any]:
        """Compile for the target and read off what the machine code uses, see `resources`.

        Returns:
            The resources, or `{"error": message}` of the compiler.
        """
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        try:
            compiled = triton.compile(source, target=self.target, options=self.options.__dict__)
        # ptxas and LLVM passes raise what they like, and the other kernels are wanted all the same
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return resources(compiled, self.target)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches of Triton kernels inside a `with` block instead of starting them."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    # interpreted kernels too: tests record in a process that interprets
    with patch.object(JITFunction, "run", record), patch.object(InterpretedFunction, "run", record):
        yield launches


def record(call: Callable[[], None]) -> list[Launch]:
    """Record the launches that `call` makes.

    Raises:
        RuntimeError: The kernels are interpreted, so nothing can be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it, interpreted kernels cannot compile")
    with recording() as launches:
        call()
    return launches


def resources(compiled: CompiledKernel, target: GPUTarget) -> dict[str, Any]:
    """Read off registers, stack and shared memory in bytes, and counts of instructions.

    On NVIDIA the stack holds what does not fit the registers, moved by STL and LDL; on AMD `stack`
    is the private segment, and registers are those of the vector and the matrix unit together.
    """
    use = _nvidia(compiled.asm["cubin"]) if target.backend == "cuda" else _amd(compiled.asm)
    return {**use, "shared": compiled.metadata.shared}


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage!r}")
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "instructions": _counts({name: len(op.findall(sass)) for name, op in _SASS.items()}),
    }


def _cuobjdump(option: str, cubin: Path) -> str:
    if not _CUOBJDUMP.exists():
        raise RuntimeError(
            f"no {_CUOBJDUMP}: registers and spills are read with the cuobjdump that comes with "
            f"Triton's wheels; install triton {triton.__version__} from PyPI"
        )
    run = subprocess.run([_CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True)
    return run.stdout


def _amd(asm: dict[str, Any]) -> dict[str, Any]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])
        return int(found[1]) if found else 0

    counts = {
        "v_mfma": len(re.findall(r"\bv_mfma", asm["amdgcn"])),
        "spill": field("vgpr_spill_count"),
    }
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "instructions": _counts({"agpr": field("agpr_count"), **counts}),
    }


def _counts(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
