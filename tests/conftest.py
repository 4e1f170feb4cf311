"""One thread per process: tests fork, and run side by side."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

import lingua.config.interrupt  # noqa: F401 (first of all: it sets what torch reads once)
from tests.cli import Lingua
from tests.slurm_cluster import Cluster, until, why_not

if TYPE_CHECKING:
    from tests.checkout import Checkout

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest is no program of ours
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup it is ignored, by trainers of the tests too
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# No test depends on speed or luck: all runs draw the same examples; `pytest --hypothesis-profile=explore` draws others.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("same examples", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same examples")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: whole runs spend a part of their time waiting."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's cache is used or left behind; the sample corpus is made once per worker."""
    monkeypatch.setenv("LINGUA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@contextmanager
def own_environment() -> Iterator[None]:
    """What is set in the environment within ends with it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Of each test too, and of the program that it calls."""
    with own_environment():
        yield


@pytest.fixture(name="lingua")
def _lingua(capsys: pytest.CaptureFixture[str]) -> Lingua:
    return Lingua(capsys)


@pytest.fixture(params=["plain", "a blank, it's; echo foo\n$(new) line"])
def hostile_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder whose name tries to break out of whatever quotes it."""
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of three nodes, one per session. SLURM_REQUIRED=1: its absence is a failure and no skip."""
    reason = why_not()
    if reason is not None and os.environ.get("SLURM_REQUIRED"):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def checkout(tmp_path: Path, slurm: Cluster) -> Iterator[Checkout]:
    """A checkout to submit jobs from; what still runs at the end of the test is cancelled."""
    from tests.checkout import Checkout

    yield Checkout(tmp_path, slurm)
    slurm.cancel_all()


@pytest.fixture
def shm() -> Iterator[Path]:
    """A memory file system's folder of the test's own."""
    folder = Path(tempfile.mkdtemp(prefix="lingua-test-", dir="/dev/shm"))
    yield folder
    until(lambda: _is_removed(folder), f"the end of {folder}")


def _is_removed(folder: Path) -> bool:
    with suppress(OSError):  # a service of the test may be giving back its memory at this moment
        shutil.rmtree(folder)
    return not folder.exists()
