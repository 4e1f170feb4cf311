#!/usr/bin/env bash
# All figures of one GPU in one call of under ten minutes, without a network: bench_gpu.json, and a table in bench_gpu.txt.
#   bash scripts/bench_gpu.sh [OUT.json] [options of scripts/bench_gpu.py: --only, --budget-s, --profile, --list]
#   bash scripts/bench_gpu.sh --wheels DIR ...            packages that the machine lacks, as wheels (scripts/README.md)
#   PYTHON=/path/to/python bash scripts/bench_gpu.sh      another environment than the one here
set -euo pipefail
out=bench_gpu.json
if [[ $# -gt 0 && $1 != -* ]]; then
  out=$1
  shift
fi
out=$(realpath -m "$out")
words=()
wheels=
while [[ $# -gt 0 ]]; do
  if [[ $1 == --wheels ]]; then
    wheels=$(realpath "${2:?--wheels needs a folder}")
    shift 2
  else
    words+=("$1")
    shift
  fi
done
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 WANDB_MODE=offline
if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  for wheel in "$wheels"/*.whl; do # a wheel is a zip whose content is what an installation would copy
    "$python" -m zipfile -e "$wheel" "$site"
  done
  PYTHONPATH=$PYTHONPATH:$site
fi
exec "$python" scripts/bench_gpu.py --out "$out" ${words[@]+"${words[@]}"}
