"""Set what torch and pydantic read when they are loaded; so import this package first.

By default OpenMP's threads spin for milliseconds at a barrier, which another process on the same cores could use;
libgomp reads the setting when torch loads. A short spin costs nothing on idle cores and keeps a run several times
faster on shared ones (scripts/README.md).

Pydantic looks for plugins in the metadata of every installed package: hundreds of files of a slow disk at each start.

Under `python -m lingua...` and `python -m apps...` the working folder comes last in `sys.path`, much as with
`python -P`: a `torch.py` there (beside weights, say) must not shadow the package.
"""

from __future__ import annotations

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    sys.path.append(sys.path.pop(0))
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's setting wins
    os.environ["GOMP_SPINCOUNT"] = "4000"
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lingua.train.load_model import Loaded


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust: bool = False,
) -> Loaded:
    """Load a model, its tokenizer and its config for a notebook: `lingua.load("out/debug@100").generate("def main(")`.

    `path` is RUN, RUN@STEP, a checkpoint folder, a file of weights or a Hugging Face folder. `device` defaults to the
    GPU if there is one, `dtype` to the stored one. `trust`: run the plugins and the app that the config beside the
    weights names; without it they are refused, unless you trained the run yourself. torch is imported only when called.
    """
    from lingua.train.load_model import load_described

    return load_described(path, device, dtype, trust=trust)
