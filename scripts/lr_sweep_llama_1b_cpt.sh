#!/usr/bin/env bash
# lr_sweep.sh for continued pretraining of Llama 3.2 1B. INIT_CKPT is the folder of its Hugging Face files.
set -euo pipefail
export CONFIG_FILE=${CONFIG_FILE:-apps/main/configs/llama_1B_8H100_cpt.yaml}
export LRS=${LRS:-1e-5 5e-5 1e-4 5e-4 1e-3 5e-3}
exec "$(dirname "$0")/lr_sweep.sh" "$@"
