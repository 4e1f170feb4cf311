"""A long run that saves every step in the background grows neither in memory nor in files nor in threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lingua.train.learner import Run
from tests.services import Services, both, served_by
from tests.trainer import TINY, Hook, train

N_STEPS = 500
WARM_STEPS = 100
GROWTH_BYTES = 8 << 20
"""Allowed after the warm-up; a leak of a snapshot (1 MB) per save would be 400 MB, of its JSON 4 MB."""


def measure(log: Path) -> Hook:
    """Hook: note memory, open files and threads of the process after every step."""

    def hook(rank: int) -> None:
        advance = Run.advance

        def advance_and_measure(run: Run) -> None:
            advance(run)
            pages = int(Path("/proc/self/statm").read_text().split()[1]) - shared_pages()
            n_files, n_threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            with log.open("a") as file:
                file.write(f"{run.step} {pages * os.sysconf('SC_PAGE_SIZE')} {n_files} {n_threads}\n")

        setattr(Run, "advance", advance_and_measure)  # noqa: B010

    return hook


def shared_pages() -> int:
    """Slots count as shared: they come in as they are first filled."""
    return int(Path("/proc/self/statm").read_text().split()[2])


@pytest.mark.gate
@pytest.mark.soak
def test_nothing_grows(tmp_path: Path, shm: Path):
    words = [
        *TINY, f"steps={N_STEPS}", "checkpoint.dump.every=1", "checkpoint.dump.keep=2", "data.num_workers=1",
        "checkpoint.async_save_mode=shm", f"checkpoint.shm_path={shm}", "checkpoint.linger_s=0",
        f"dump_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with Services() as services:
        result = train(words, 1, both(served_by(services), measure(tmp_path / "log")))
    assert result.exit_code == 0, result.output
    measured = [[int(word) for word in line.split()] for line in (tmp_path / "log").read_text().splitlines()]
    warm = [line for line in measured if line[0] > WARM_STEPS]
    assert len(warm) == N_STEPS - WARM_STEPS
    memory, files, threads = ([line[column] for line in warm] for column in (1, 2, 3))
    assert max(memory[-50:]) - max(memory[:50]) < GROWTH_BYTES
    # What grows stays: the least of the end tells. A thread may be counted while it ends (faulthandler starts another
    # at each arming; 3 % of looks on a busy machine saw both).
    assert min(files[-50:]) <= max(files[:50])
    assert min(threads[-50:]) <= max(threads[:50])
