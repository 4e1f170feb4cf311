#!/usr/bin/env bash
# All figures of one GPU in one call of under ten minutes, without a network: a table, and bench_gpu.json beside it.
#   bash scripts/bench_gpu.sh [OUT.json] [options of scripts/bench_step.py: --only, --budget-s, --steps, --list]
#   PYTHON=/path/to/python bash scripts/bench_gpu.sh      another environment than the one here
set -euo pipefail
cd "$(dirname "$0")/.."
out=bench_gpu.json
if [[ $# -gt 0 && $1 != -* ]]; then
  out=$1
  shift
fi
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 WANDB_MODE=offline
exec "$python" scripts/bench_step.py --suite gpu --out "$out" "$@"
