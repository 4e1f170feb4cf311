"""Copy the code of a run into its folder when it is first submitted, so that later edits do not change the run.

The copy appears atomically, and is replaced only on request. A process started with `environment()` imports the copy
and nothing from the working tree. The copy has the Python files at the top of the tree and folders with Python files or
scripts, including their configs; no links, hidden folders, virtual environments, data or outputs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.trust import VARIABLE
from lingua.files import make_folders, own_temporary, remove_leftover, write_json
from lingua.run.provenance import COMMIT_FILE, describe_code

FOLDER = "code"
_KEPT = (".py", ".pyi", ".yaml", ".yml", ".toml", ".json", ".sh", ".slurm", ".lock", ".html", ".mplstyle", ".tiktoken")
_LEFT_OUT = ("out", "data", "build", "dist", "wandb", "tests")  # at the top of the tree


def freeze_code(tree: Path, run_dir: Path, *, again: bool = False) -> Path:
    """Return the folder of the run's code; copy it from `tree` if there is none or `again`, keeping the old one."""
    code = run_dir / FOLDER
    if os.pathsep in str(code.absolute()):
        raise ConfigError(f"run folder {run_dir} has a {os.pathsep!r} in its path, which Python cannot import from")
    if code.is_dir() and not again:
        return code
    draft = own_temporary(code)
    make_folders(draft)
    for path in _code_files(tree):
        target = draft / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if (facts := describe_code(tree))["commit"] is not None:
        write_json(draft / COMMIT_FILE, facts)
    if code.is_dir():
        code.rename(_free_name(code))
    try:
        draft.rename(code)
    except OSError:
        if not code.is_dir():
            raise
        remove_leftover(draft)  # another attempt was faster
    return code


def environment(code: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return variables with which Python imports from `code`, not from the working folder, and trusts its configs."""
    further = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    return {"PYTHONPATH": os.pathsep.join([str(code.absolute()), *further]), "PYTHONSAFEPATH": "1", VARIABLE: "1"}


def _code_files(tree: Path) -> Iterator[Path]:
    for entry in sorted(tree.iterdir()):
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_file() and entry.suffix in _KEPT:
            yield entry
        elif entry.is_dir() and entry.name not in _LEFT_OUT and _has_code(entry):
            yield from _files_below(entry)


def _has_code(folder: Path) -> bool:
    return any(path.suffix in (".py", ".sh") for path in folder.glob("[!.]*"))


def _files_below(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir():
            yield from _files_below(entry)
        elif entry.suffix in _KEPT:
            yield entry


def _free_name(path: Path) -> Path:
    n = 1
    while (other := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return other
