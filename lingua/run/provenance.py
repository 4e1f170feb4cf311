"""Record the provenance of an attempt in `run.json`: command, code, package versions, host and devices.

The code is a git commit and the changes to it, of the checkout that the app is in or, for a job, that was frozen.
Without git, or outside of a checkout, `commit` is null; the hashes of `code` and the versions remain.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lingua.files import read_json, write_json
from lingua.masking import public_text, public_word

RUN_FILE = "run.json"
COMMIT_FILE = "commit.json"
"""In frozen code: `describe_code` of the tree that it was copied from."""
MAX_DIFF = 1 << 20
GIT_S = 10.0
"""How long a start waits for git."""


def describe_code(folder: Path) -> dict[str, Any]:
    """Return the commit of the checkout that `folder` is in, its changes as a diff, and its untracked files."""
    unknown = {"folder": str(folder.absolute()), "commit": None, "dirty": None, "diff": None, "untracked": None}
    if (frozen := folder / COMMIT_FILE).is_file():
        return {**read_json(frozen), "folder": str(folder.absolute())}

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), "-c", "core.quotepath=off", *words]
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, env=env, capture_output=True, check=True, timeout=GIT_S)
        return done.stdout.decode(errors="replace")

    try:
        if not git("ls-files", "--", "*.py").strip():  # installed below a checkout that does not hold it
            return unknown
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "--no-ext-diff", "--no-textconv", "HEAD")
        untracked = git("ls-files", "--others", "--exclude-standard", "--full-name", ":/").splitlines()
    except (OSError, subprocess.SubprocessError):
        return unknown
    shown = diff if len(diff) <= MAX_DIFF else f"{diff[:MAX_DIFF]}\n[{len(diff) - MAX_DIFF} more characters]\n"
    changes = {"dirty": bool(diff or untracked), "diff": public_text(shown), "untracked": untracked[:1000]}
    return unknown | {"commit": commit} | changes


def package_versions() -> dict[str, str]:
    """Return the version of every installed package, from the names of the folders that describe them."""
    found: dict[str, str] = {}
    for folder in reversed([Path(entry) for entry in sys.path if entry]):  # the first on the path is imported
        for info in sorted(folder.glob("*.dist-info")) if folder.is_dir() else ():
            name, _, version = info.stem.rpartition("-")
            found[name] = version
    return dict(sorted(found.items()))


def record_run(run_dir: Path, attempt: int, argv: Sequence[str], code_folder: Path, **facts: Any) -> None:
    record: Mapping[str, Any] = {
        "attempt": attempt,
        "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [public_word(word) for word in argv],
        "working_folder": os.getcwd(),
        **describe_code(code_folder),
        **facts,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }
    write_json(run_dir / RUN_FILE, record)
