"""Sets how OpenMP's threads wait, here because libgomp reads it when torch is loaded: so load this package first.

By default they spin at a barrier for milliseconds, time that another process on their cores needs. A short spin costs
nothing when a run has its cores to itself, and keeps it several times faster when it does not (scripts/README.md).
"""

import os

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own setting wins
    os.environ["GOMP_SPINCOUNT"] = "4000"
