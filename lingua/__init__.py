"""Sets how OpenMP's threads wait, here because libgomp reads it when torch is loaded: so load this package first.

By default they spin at a barrier for milliseconds, time that another process on their cores needs. A short spin costs
nothing when a run has its cores to itself, and keeps it several times faster when it does not (scripts/README.md).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lingua.train.load_model import Loaded

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own setting wins
    os.environ["GOMP_SPINCOUNT"] = "4000"


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load a model, its tokenizer and its config, as a notebook wants them: `lingua.load("out/debug@100").model`.

    `path`: RUN, RUN@STEP, a checkpoint folder, a file of weights or a Hugging Face folder. `device`: by default the GPU
    if there is one. `dtype`: by default the one that the weights are stored in. Imports torch only when it is called.
    """
    from lingua.train.load_model import load_described

    return load_described(path, device, dtype)
