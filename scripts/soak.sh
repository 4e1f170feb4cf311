#!/usr/bin/env bash
# What is too long for the gate: every kill point, 200 random kills, all layouts, compiled runs, every Slurm scenario.
# An hour and more on two cores; needs root for Slurm. Prints one table and exits with pytest's code.
#   bash scripts/soak.sh [pytest options, such as -k muon]
set -uo pipefail
cd "$(dirname "$0")/.."
bash .ci/install_slurm || exit 1
report=$(mktemp)
trap 'rm -f "$report"' EXIT
export LINGUA_SOAK_KILLS=${LINGUA_SOAK_KILLS:-200} SLURM_REQUIRED=1
uv run pytest -m "soak or slurm" -n3 --junitxml="$report" "$@"
code=$?
uv run python - "$report" <<'TABLE'
import sys
from collections import defaultdict
from xml.etree import ElementTree

rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    row = rows[case.get("classname", "")]
    outcome = {child.tag for child in case}
    row[1 if outcome & {"failure", "error"} else 2 if "skipped" in outcome else 0] += 1
    row[3] += float(case.get("time", 0))
print(f"\n{'tests':<72} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>8}")
for name, (passed, failed, skipped, seconds) in sorted(rows.items()):
    print(f"{name:<72} {passed:>6.0f} {failed:>6.0f} {skipped:>7.0f} {seconds:>8.0f}")
TABLE
exit $code
