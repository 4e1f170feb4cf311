"""One thread per process: tests fork, and run side by side."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's cache is used or left behind; the sample corpus is made once per worker."""
    monkeypatch.setenv("LINGUA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(params=["plain", "a blank", "it's; echo foo", "new\nline"])
def hostile_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder whose name tries to break out of whatever quotes it."""
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


@pytest.fixture
def shm() -> Iterator[Path]:
    """A memory file system's folder of the test's own."""
    folder = Path(tempfile.mkdtemp(prefix="lingua-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
