"""The scheduler of jobs: Slurm. All other modules import its functions from here.

To add another one, write two files, for its commands and answers and for its job scripts, with the names that other
modules import from here (its dataclasses and `Runner` can be those of slurm.py). Choose between them here, in a way
that also works on a login node, such as `if shutil.which("bsub")`. Jobs of `lingua launch` source `scripts/job.sh`
unchanged, after `trap '' TERM USR1 USR2`, as these signals are for the ranks; your own script that may be requeued
needs its two Slurm variables there.
"""

from lingua.slurm import *  # noqa: F403
from lingua.slurm_script import *  # noqa: F403
