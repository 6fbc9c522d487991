#!/usr/bin/env bash
# All that wants a GPU, within ten minutes and from a bare checkout: the GPU tests, then the ops
# against their peers. Writes to $OUT. COMMIT names the code where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
out=${OUT:-benchmarks/results}
mkdir -p "$out"
# a later run of the same code adds to the committed rows
cp -n benchmarks/results/ops_*.json "$out" 2>/dev/null

timeout 240 python3 -m pytest -m gpu -q -p no:cacheprovider tests/ops 2>&1 | tee "$out/gpu_tests.log"
tests=$?
python3 benchmarks/ops.py --write --out "$out" --budget $((540 - SECONDS)) \
    ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | tee "$out/gpu_ops.log"
ops=$?
# which depthwise convolutions ours are faster for: commit it to ops/ with the results
python3 benchmarks/depthwise_table.py --results "$out" --table "$out/depthwise_table.json" --write
exit $((tests ? tests : ops))
