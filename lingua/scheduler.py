"""The scheduler that jobs go to: Slurm. All other modules take its functions from here, so the choice is made here.

Another one is two files, for what it says and takes and for the text of its jobs, with the names that others import
from here (its dataclasses and `Runner` can be those of slurm.py), and a choice here that also holds on a login node,
such as `if shutil.which("bsub")`. Jobs of `lingua launch` source `scripts/job.sh` as it is, after `trap '' TERM USR1
USR2`: those are for the ranks; a script of your own that may be requeued needs its two Slurm variables there.
"""

from lingua.slurm import *  # noqa: F403
from lingua.slurm_script import *  # noqa: F403
