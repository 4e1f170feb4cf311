# The names of your cluster, in this one file. Replace the values; what you leave out is the cluster's default.
#   source apps/main/configs/site.sh [big|preemptible|small]      before sbatch; an option of sbatch still overrules it
# sbatch reads these variables, and they overrule the #SBATCH lines of a script.

export EMAIL=${EMAIL:-you@example.org} # the scripts of scripts/ pass it on as --mail-user

case ${1:-big} in
  big) # miso_8, miso_8_silent, miso_16, miso_24: whole nodes
    export SBATCH_ACCOUNT=lab SBATCH_PARTITION=h200
    unset SBATCH_CONSTRAINT
    ;;
  preemptible) # preemptible_1, preemptible_4: jobs that others may push aside
    export SBATCH_ACCOUNT=lab SBATCH_PARTITION=preemptible SBATCH_CONSTRAINT='[48G|80G|141G]'
    ;;
  small) # sphinx_1: a single GPU
    export SBATCH_ACCOUNT=lab SBATCH_PARTITION=gpu SBATCH_CONSTRAINT=ampere
    ;;
  *) echo "site.sh: no site ${1}; there are big, preemptible and small" >&2 ;;
esac
