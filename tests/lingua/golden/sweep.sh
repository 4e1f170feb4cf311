#!/usr/bin/env bash
# Made by `lingua sweep`. sbatch --array=2 run.sh: submit point 2 again; bash run.sh 2: run it here.
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --signal=USR2@120
#SBATCH --array=1-12%4
#SBATCH --distribution=block
#SBATCH --open-mode=append
#SBATCH --requeue
export BASE_DIR='/home/it'"'"'s me'
export PYTHON=/opt/venv/bin/python
export JOB_FILE='/home/it'"'"'s me/out/llama/jobs'/${1:-${SLURM_ARRAY_TASK_ID:?say which point: bash run.sh 2}}.json
source '/home/it'"'"'s me/out/llama/code/scripts/job.sh'
