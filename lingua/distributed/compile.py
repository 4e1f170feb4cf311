"""Compile a model with torch.compile, and choose where compiled code is kept between attempts.

Blocks of one kind share their compiled code. A pass without gradients, or with another number of rows, adds one more
version, at most `compile_cache_size_limit` in all. Compiled code is kept in a folder of the node for all its ranks and
for later attempts; since it is executed, a folder that others can write to is refused. Each version of torch has its
own folder. Nothing ever removes these files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingua.config.keys.distributed import DistributedArgs
from lingua.files import DiskError

INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


def compile_model(
    model: nn.Module, blocks: Iterable[nn.Module], args: DistributedArgs, backend: Any = "inductor"
) -> None:
    """Compile the blocks, or the whole model, on their first call. Call this before FSDP2 wraps them.

    torch begins at the first frame below `nn.Module.__call__` that is not its own: a block's `forward`, which all
    blocks of a class share. So hooks of FSDP2 stay outside, and the guards of one block's code hold for all.
    """
    torch._dynamo.config.recompile_limit = args.compile_cache_size_limit
    if args.activation_memory_budget is not None:
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = args.activation_memory_budget
    for module in blocks if args.compile_scope == "block" else [model]:
        module.compile(backend=backend)


def let_length_vary(tensor: Tensor) -> None:
    """Compile for any length of `tensor` at once, instead of again when a second length comes."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


# -- where compiled code is kept -----------------------------------------------------------------------------------


def keep_compiled_code(folder: str | None, env: MutableMapping[str, str] = os.environ) -> Path | None:
    """Point torch's and Triton's caches at `folder` ("auto": a place of this user on this node; None: torch's own).

    Variables that the user has set win. Returns the folder in use, or None if we did not choose it. Raises ValueError
    for a folder that others can write to.
    """
    if folder is None or _is_users(env):
        return None
    places = _places(env) if folder == "auto" else [Path(folder).expanduser().absolute()]
    place = _private(_first_private(places) / f"torch-{torch.__version__}")
    env[INDUCTOR] = str(_private(place / "inductor"))
    # Triton's default is a folder per device, so that ranks would not find each other's kernels.
    env.setdefault(TRITON, str(_private(place / "triton")))
    return place


def _is_users(env: MutableMapping[str, str]) -> bool:
    """Return whether the user chose a folder. torch writes its own choice into the environment when its compiler is
    imported, which `deterministic: true` does."""
    if INDUCTOR not in env:
        return False
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds

    return env[INDUCTOR] != default_cache_dir()


def _places(env: MutableMapping[str, str]) -> list[Path]:
    """Return places on local disks; the first outlives a job and a reboot, while /tmp is often private to a job."""
    roots = ["/var/tmp", env.get("TMPDIR", "/tmp"), "/tmp"]
    return [Path(root) / f"lingua-compiled-{os.getuid()}" for root in roots]


def _first_private(places: Sequence[Path]) -> Path:
    failed: list[ValueError | DiskError] = []
    for place in places:
        try:
            return _private(place)
        except (ValueError, DiskError) as error:
            failed.append(error)
    reasons = "; ".join(str(error) for error in failed)
    text = f"distributed.compile_cache: {reasons}; name a folder of your own on a local disk, or set it to null"
    of_disk = next((error for error in failed if isinstance(error, DiskError) and error.kind != "setup"), None)
    raise ValueError(text) if of_disk is None else DiskError(text, of_disk.errno, of_disk.path)


def _private(folder: Path) -> Path:
    """Make the folder if it is missing; return it. Raises DiskError if that fails, ValueError if others can write."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        facts = folder.lstat()
    except OSError as error:
        raise DiskError.of(error, f"{folder} cannot be made ({error.strerror})") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise ValueError(f"{folder} is not this user's alone, and what lies there is executed")
    return folder
