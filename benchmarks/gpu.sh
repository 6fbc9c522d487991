#!/usr/bin/env bash
# What wants a GPU, from a bare checkout: the GPU tests, the ops and the models beside their peers.
#
#   gpu.sh [tests] [ops] [models]      these parts, all three if none is named
#
# It takes LIMIT seconds (580), which the parts share. Further calls for the same code go on where
# the last one stopped. Writes to $OUT; COMMIT names the code where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
out=${OUT:-benchmarks/results}
limit=${LIMIT:-580}
[ $# -gt 0 ] || set -- tests ops models
mkdir -p "$out"
# a later run of the same code adds to the committed rows
cp -n benchmarks/results/{ops,models}_*.json "$out" 2>/dev/null

run() {
    local part=$1 seconds=$2
    case $part in
    tests) set -- -m pytest -m gpu -q -p no:cacheprovider tests/ops ;;
    # what is under way at the end of the budget still ends
    ops | models)
        set -- "benchmarks/$part.py" --write --out "$out" --budget $((seconds - 60)) \
            ${COMMIT:+--commit "$COMMIT"}
        ;;
    *) echo "gpu.sh: $part is none of tests, ops, models" && return 2 ;;
    esac
    timeout "$seconds" python3 "$@" 2>&1 | tee "$out/gpu_$part.log"
}

status=0
while [ $# -gt 0 ]; do
    run "$1" $(((limit - SECONDS) / $#)) || status=$?
    # which depthwise convolutions ours are faster for: commit it to ops/ with the results
    [ "$1" != ops ] || python3 benchmarks/depthwise_table.py --results "$out" \
        --table "$out/depthwise_table.json" --write
    shift
done
exit $status
