#!/usr/bin/env bash
# Made by `lingua launch`. sbatch run.sh: submit it again; bash run.sh: run it here, without Slurm.
#SBATCH --job-name=a_run_rm_-rf
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=20
#SBATCH --mem=2438G
#SBATCH --time=2-00:00:00
#SBATCH --partition=h200
#SBATCH --account=lab
#SBATCH --qos=high
#SBATCH --constraint=[48G|80G]
#SBATCH --exclude=gpu[003-007]
#SBATCH --comment="two words"
#SBATCH --signal=USR2@300
#SBATCH --distribution=block
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --reservation=night
#SBATCH --mail-type=END
unset ${!SLURM_ARRAY_@}
export BASE_DIR='/home/my self/it'"'"'s; echo $HOME
&/lingua'
export PYTHON=/opt/venv/bin/python
export JOB_FILE='/home/my self/it'"'"'s; echo $HOME
&/lingua/out/llama/jobs/launch-1.json'
module load cuda/12.8
ulimit -l unlimited
source '/home/my self/it'"'"'s; echo $HOME
&/lingua/out/llama/code/scripts/job.sh'
