"""Set how long OpenMP threads spin at a barrier. libgomp reads this when torch loads, so import this package first.

By default they spin for milliseconds, which another process on the same cores could use. A short spin costs nothing
on idle cores and keeps a run several times faster on shared ones (scripts/README.md).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lingua.train.load_model import Loaded

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's setting wins
    os.environ["GOMP_SPINCOUNT"] = "4000"


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load a model, its tokenizer and its config for a notebook: `lingua.load("out/debug@100").model`.

    `path` is RUN, RUN@STEP, a checkpoint folder, a file of weights or a Hugging Face folder. `device` defaults to the
    GPU if there is one, `dtype` to the stored one. Imports torch only when called.
    """
    from lingua.train.load_model import load_described

    return load_described(path, device, dtype)
