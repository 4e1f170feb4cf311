#!/usr/bin/env bash
# Made by `lingua launch`. sbatch run.sh: submit it again; bash run.sh: run it here, without Slurm.
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --distribution=block
#SBATCH --open-mode=append
#SBATCH --requeue
unset ${!SLURM_ARRAY_@}
export BASE_DIR=/home/me/lingua
export PYTHON=/opt/venv/bin/python
export JOB_FILE=/home/me/lingua/out/llama/jobs/launch-1.json
source /home/me/lingua/out/llama/code/scripts/job.sh
