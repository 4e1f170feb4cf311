#!/usr/bin/env bash
# One job per learning rate, each with a run folder of its own. Needs BASE_DIR; LRS, CONFIG_FILE, NAME, SCRIPT and
# EMAIL may be set. Words after the command go to sbatch: scripts/lr_sweep.sh --time=1:00:00
set -euo pipefail
: "${BASE_DIR:?is not set; export it (the folder of your checkout)}"
export BASE_DIR CONFIG_FILE=${CONFIG_FILE:-apps/main/configs/llama_280M_8H200.yaml} EXTRA_ARGS
name=${NAME:-$(basename "$CONFIG_FILE" .yaml)}
more=${EXTRA_ARGS-}

for lr in ${LRS:-5e-3 1e-2 5e-2}; do
  run=${name}_lr$lr
  EXTRA_ARGS="dump_dir=out/$run name=$run logging.wandb.name=$run optim.lr=$lr $more"
  sbatch ${EMAIL:+--mail-user="$EMAIL"} --job-name="$run" --export=ALL,BASE_DIR,CONFIG_FILE,EXTRA_ARGS "$@" \
    "$BASE_DIR/apps/main/configs/${SCRIPT:-miso_8}.slurm"
done
