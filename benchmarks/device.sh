#!/usr/bin/env bash
# On a machine with a CUDA GPU: verify the Triton backend against float64, then time it against the floors and the layer
# beside its peers. Rows are appended to benchmarks/results/*.jsonl. Nothing is timed unless everything is right.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"

python benchmarks/verify_triton.py
python benchmarks/kernel_floors.py "$@"
python -m randbatch bench --device cuda --tokens 131072 262144 524288 1048576 --out "runs/bench-device-$(date +%Y%m%d-%H%M%S)"
