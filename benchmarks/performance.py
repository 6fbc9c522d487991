"""Write docs/performance.md and its pictures from the results of the benchmarks.

python benchmarks/performance.py            compare the page with the results; exit code 1 if stale
python benchmarks/performance.py --write    write the page and draw its pictures
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _gpu_page as gpu
from benchmarks import _page as tables
from benchmarks import _plots as plots
from benchmarks._results import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
COMMAND = """```
COMMIT=$(git describe --always) OUT=out benchmarks/gpu.sh tests ops    # ten minutes
COMMIT=$(git describe --always) OUT=out benchmarks/gpu.sh models       # ten more; again: it goes on
cp out/{ops,models}_*.json benchmarks/results/ && python benchmarks/performance.py --write
```"""

Results = Mapping[str, Any]


def read(folder: Path) -> dict[str, Any]:
    """All results of a folder by the names of their files, without ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def page(results: Results) -> str:
    """The text of the page."""
    parts = [_opening(results), *_gpus(results), *_bytes(results), *_cpu(results)]
    return "\n\n".join([*parts, *_kernels(results), *_memory(results)]) + "\n"


def _opening(results: Results) -> str:
    devices = [data["device"] for name, data in results.items() if name.startswith("models_")]
    measured = " and ".join(devices) if devices else "no GPU yet"
    return f"""# Performance

<!-- written by python benchmarks/performance.py --write: change that, not this page -->
Everything here is made of files in [benchmarks/results](../benchmarks/results);
[benchmarks/README.md](../benchmarks/README.md) says how each was measured. A *peer* is what one
would use instead: timm's model for MaxViT, DaViT and SHViT, for the others a plain PyTorch
re-statement of the official algorithm with its copies, gathers and unfolded windows
([benchmarks/official](../benchmarks/official)), as most of the official code no longer installs.
Ours and peer have the same weights, and their outputs are compared before anything is measured.

Times were measured on: {measured}. What needs none - bytes moved, compiled kernels, memory, ratios
on a CPU - is below."""


def _gpus(results: Results) -> Iterator[str]:
    yield "## Times on a GPU"
    files = [(n, d) for n, d in results.items() if n.startswith(("models_", "ops_"))]
    if not files:
        yield f"""\
**Nothing on this page was timed on a GPU.** No speed-up on one is claimed; the kernels were
compiled for four of them and run in Triton's interpreter. On a machine that has one:

{COMMAND}"""
    for name, data in files:
        kind = "models" if name.startswith("models_") else "ops"
        versions = ", ".join(
            f"{key} {data[key]}" for key in ("driver", "torch", "triton", "commit")
        )
        yield f"### {data['device']}: {kind}"
        yield f"{versions[0].upper()}{versions[1:]} ([rows](../benchmarks/results/{name}.json))."
        yield from (_models if kind == "models" else _ops)(name, data["rows"])


def _models(name: str, rows: Sequence[Row]) -> Iterator[str]:
    yield """\
Images per second, of single images milliseconds: called as usual / replayed as a CUDA graph. `bf16`
is weights in bfloat16, in training autocast; `tf32` and `fp32` are float32 with products in TF32 or
not. A training step is forward and backward, without optimizer. The speed-up is that of our fastest
way over the fastest of the peer."""
    if plots.speed_points(rows):
        yield f"![accuracy against throughput, bf16, batch 128](accuracy-speed-{name}.png)"
    for mode in ("inference", "training"):
        for precision in gpu.precisions(rows, mode):
            yield f"{mode.capitalize()}, {precision}:"
            yield gpu.models_table(rows, mode, precision)
    if any("peak_mib" in row and row["mode"] == "training" for row in rows):
        yield "Peak memory of a training step in MiB: weights, images, activations and gradients."
        yield gpu.peak_table(rows)
    failed = gpu.failures(rows)
    if failed:
        yield "What failed:"
        yield "\n".join(failed)


def _ops(name: str, rows: Sequence[Row]) -> Iterator[str]:
    yield """\
The floor of a pass is the time that its compulsory bytes, or its products, take at the device's
measured ceilings. Peers are timm's and the official forms, SDPA, FlexAttention and our plain
PyTorch form, compiled where that helps."""
    yield gpu.ops_table(rows)
    if any("median_ms" in row for row in rows):
        yield f"![floor against measured times](floors-{name}.png)"


def _bytes(results: Results) -> Iterator[str]:
    yield "## Bytes moved"
    if "traffic" not in results:
        yield "Not counted yet: `python benchmarks/traffic.py --write`."
        return
    rows = results["traffic"]["rows"]
    yield """\
Most of these models wait for memory, so bytes say what times can at best be. Every operation is
counted that a device runs in eager mode, in bfloat16: what it reads and writes, our kernels with
their temporary sums and all passes over their inputs. Depthwise convolutions of ours count as our
kernels; a GPU that was not measured takes PyTorch's, which move what the file calls `plain`.
Nothing is timed."""
    yield "![accuracy against bytes moved](accuracy-bytes.png)"
    yield "Inference; the ratio is that of the better of ours and ours after `fuse()`:"
    yield tables.traffic_table(rows, "forward")
    yield "Forward and backward in training:"
    yield tables.traffic_table(rows, "training")
    yield """\
Of that the attention, with and without the dense projections before and after it, which are the
same matrix products everywhere:"""
    yield tables.attention_table(rows)
    yield "### Where the bytes go"
    yield "Images of the model's own size; kernels: gigabytes, in the order of ours in inference."
    for model in dict.fromkeys(row["model"] for row in rows):
        yield tables.kinds_table(rows, model)


def _cpu(results: Results) -> Iterator[str]:
    yield "## On a CPU"
    rows = [row for row in results.get("cpu", {}).get("rows", []) if "error" not in row]
    if not rows:
        yield "Not measured yet: `python benchmarks/cpu.py --write`."
        return
    head = results["cpu"]
    yield f"""\
Inference in float32 on {head["cpu"]}, torch {head["torch"]}, timm {head["timm"]}: how many times as
fast as the peer, each in the layout in which it is faster. Above 1 ours is faster: as created /
after `fuse()`, then beside the peer after its own `fuse()` if it has one. They take turns on a
machine that is not idle, so a few percent mean nothing."""
    yield "![times as fast as the peer on a CPU](cpu.png)"
    yield tables.cpu_table(rows)


def _kernels(results: Results) -> Iterator[str]:
    yield "## Compiled kernels"
    triton, rows = list(results["aot"].items())[-1]
    yield f"""\
Every kernel for every shape of the models, compiled by Triton {triton} without a GPU: the worst of
each op. Spilled are bytes of stack that a kernel loads or stores; on sm_90 and sm_100 none may. A
form is one choice of types and tiles; 16-byte loads count asynchronous copies."""
    yield tables.aot_table(rows)


def _memory(results: Results) -> Iterator[str]:
    yield "## Memory in training"
    yield """\
The most memory that forward and backward of a part take on a CPU, in float32, against the official
formulation. Allocations are counted, so every run gives the same numbers. The large kernels merge a
batch norm per kernel; for small maps of many channels that takes more than the peer."""
    yield tables.memory_table(results)


def draw(results: Results, docs: Path) -> None:
    """Draw all pictures that the page shows."""
    if "traffic" in results:
        points = plots.bytes_points(results["traffic"]["rows"])
        label = "MB moved per image in inference (bf16, batch 128; counted)"
        plots.draw_accuracy(points, label, docs / "accuracy-bytes.png")
    rows = [row for row in results.get("cpu", {}).get("rows", []) if "error" not in row]
    if rows:
        plots.draw_cpu(rows, docs / "cpu.png")
    for name, data in results.items():
        if name.startswith("models_") and plots.speed_points(data["rows"]):
            label = f"images per second, inference, bf16, batch 128, {data['device']}"
            path = docs / f"accuracy-speed-{name}.png"
            plots.draw_accuracy(plots.speed_points(data["rows"]), label, path)
        if name.startswith("ops_") and any("median_ms" in row for row in data["rows"]):
            plots.draw_floors(data["rows"], docs / f"floors-{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, 1 if the page is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the page and its pictures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    arguments = parser.parse_args(argv)
    results, path = read(arguments.results), arguments.docs / "performance.md"
    text = page(results)
    if arguments.write:
        path.write_text(text)
        draw(results, arguments.docs)
        print(f"wrote {path}")
    elif not path.exists() or path.read_text() != text:
        print(f"{path} is stale: python benchmarks/performance.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
