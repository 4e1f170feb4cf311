# What every job of lingua does first; sourced by the *.slurm scripts and by the run.sh of `lingua launch`.
#
#   BASE_DIR     the checkout; the job works in it, so relative paths, `out` and `data` mean what they mean there
#   CONFIG_FILE  the config, relative to BASE_DIR
#   EXTRA_ARGS   overrides, separated by blanks: "name=b optim.lr=1e-3"; --refreeze: take code and config anew
#   PYTHON       the interpreter; default: that of $BASE_DIR/.venv, then of an active venv or conda environment
#
# Nothing is installed or synced. A requeued job runs the code and config that its first start froze into the run
# folder; only this file and the environment are today's.

# Slurm's signals are for the ranks: a batch script that dies of one inside its grace would not be requeued.
[[ -z ${SLURM_JOB_ID-} ]] || trap '' TERM USR1 USR2

give_up() { echo "error: $*" >&2; exit 2; }

cd -- "$BASE_DIR" || exit 2
BASE_DIR=$PWD
job=${JOB_FILE-}
if [[ -z $job && ${SLURM_RESTART_COUNT:-0} -gt 0 && -e .jobs/$SLURM_JOB_ID ]]; then
  job=$(readlink -f -- ".jobs/$SLURM_JOB_ID")
fi
if [[ -z $job && -z ${CONFIG_FILE-} ]]; then
  give_up "CONFIG_FILE is not set; export it and submit with --export=ALL,BASE_DIR,CONFIG_FILE"
fi
if [[ -z $job && ! -f $CONFIG_FILE ]]; then
  give_up "CONFIG_FILE is $CONFIG_FILE, which does not exist in $BASE_DIR; check the path"
fi

if [[ -z ${PYTHON-} ]]; then
  for PYTHON in .venv/bin/python "${VIRTUAL_ENV:-/no}/bin/python" "${CONDA_PREFIX:-/no}/bin/python" python3; do
    command -v -- "$PYTHON" >/dev/null && break
  done
fi
command -v -- "$PYTHON" >/dev/null || give_up "PYTHON is $PYTHON, which is not a program here; run uv sync in $BASE_DIR"

code=$BASE_DIR
[[ -z $job ]] || code=$(dirname -- "$(dirname -- "$job")")/code
export BASE_DIR PYTHON PYTHONSAFEPATH=1 PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
if [[ -z $job ]]; then
  exec "$PYTHON" -m lingua.launch.job begin
fi
export LINGUA_TRUST=1 # whoever submitted the job chose its code
hold=lingua.launch.job
[[ ! -d $code/lingua || -f $code/lingua/launch/job.py ]] || hold=lingua.job # frozen before December 2026
exec "$PYTHON" -m $hold hold "$job"
