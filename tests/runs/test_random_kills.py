"""A run killed at random moments, again and again, ends as the undisturbed one. Minutes; `.ci/run` runs it.

LINGUA_SOAK_KILLS=200 kills so often while saving in the background.
"""

import os
import random
import select
import signal
import time
from pathlib import Path

import pytest

from lingua.checkpoint.shm.area import base
from tests.services import Services, served_by
from tests.trainer import TINY, Hook, Trainer, fingerprint, losses, published, train

N_STEPS = 60
WORDS = [*TINY, f"steps={N_STEPS}", "checkpoint.dump.every=2", "checkpoint.dump.keep=2", "data.num_workers=2"]


def kill_after(seconds: float, words: list[str], n_ranks: int, victim: int, hook: Hook | None = None) -> bool:
    """Start, kill one rank after so long; whether it was still running."""
    with Trainer(words, n_ranks, hook) as trainer:
        killed = still_runs(trainer.pids[victim], seconds)
        if killed:
            os.kill(trainer.pids[victim], signal.SIGKILL)
        trainer.wait()
        return killed


def still_runs(pid: int, seconds: float) -> bool:
    """Whether a process has not ended after so long."""
    descriptor = os.pidfd_open(pid)
    ended, _, _ = select.select([descriptor], [], [], seconds)
    os.close(descriptor)
    return not ended


def disturb(seconds: float, words: list[str], n_ranks: int, rng: random.Random) -> bool:
    """Start, and after so long kill a rank, the checkpoint service or both; whether the run is not at its end."""
    who = rng.choice(["rank", "service", "both"])
    victim = rng.randrange(n_ranks)
    with Services() as services:
        if who == "rank":
            return kill_after(seconds, words, n_ranks, victim, served_by(services))
        with Trainer(words, n_ranks, served_by(services)) as trainer:
            killed = still_runs(trainer.pids[victim], seconds)
            services.kill()
            if killed and who == "both":
                os.kill(trainer.pids[victim], signal.SIGKILL)
            result = trainer.wait()
            services.kill()
            if killed and who == "service":
                assert result.exit_code == 0, result.output
            return killed and who == "both"


@pytest.mark.soak
@pytest.mark.parametrize(("n_ranks", "n_kills"), [pytest.param(1, 8, marks=pytest.mark.gate), (2, 4)])
def test_random_kills_lose_nothing(tmp_path: Path, n_ranks: int, n_kills: int):
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    began = time.monotonic()
    assert train([*WORDS, f"dump_dir={calm}"], n_ranks).exit_code == 0
    whole_s = time.monotonic() - began
    rng = random.Random(20)  # the moments still differ from machine to machine
    killed = 0
    while killed < n_kills:
        words = [*WORDS, f"dump_dir={disturbed}"]
        if not kill_after(rng.uniform(0.2, 0.9) * whole_s, words, n_ranks, rng.randrange(n_ranks)):
            assert published(disturbed)[-1] == N_STEPS
            assert fingerprint(disturbed, N_STEPS) == fingerprint(calm, N_STEPS)
            disturbed = tmp_path / f"disturbed_{killed}"  # it came through: begin a new one
            continue
        killed += 1
    result = train([*WORDS, f"dump_dir={disturbed}"], n_ranks)
    assert result.exit_code == 0, result.output
    assert fingerprint(disturbed, N_STEPS) == fingerprint(calm, N_STEPS)
    assert losses(disturbed).items() <= losses(calm).items()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("n_ranks", [pytest.param(1, marks=pytest.mark.gate), 2])
def test_random_kills_while_saving_in_the_background(tmp_path: Path, shm: Path, n_ranks: int):
    n_kills = int(os.environ.get("LINGUA_SOAK_KILLS", "40")) * (3 if n_ranks == 1 else 1) // 4
    calm = tmp_path / "calm"
    began = time.monotonic()
    assert train([*WORDS, f"dump_dir={calm}"], n_ranks).exit_code == 0
    whole_s = time.monotonic() - began
    rng = random.Random(21)
    background = ["checkpoint.async_save_mode=shm", f"checkpoint.shm_path={shm}", "checkpoint.linger_s=0.2"]
    n_runs, disturbed = 0, tmp_path / "0"
    for _ in range(n_kills):
        words = [*WORDS, *background, f"dump_dir={disturbed}"]
        before = max(published(disturbed), default=0)
        if not disturb(rng.uniform(0.2, 0.9) * whole_s, words, n_ranks, rng) and before == N_STEPS:
            n_runs, disturbed = n_runs + 1, tmp_path / str(n_runs + 1)  # it is finished: begin a new one
        assert max(published(disturbed), default=0) >= (before if disturbed.exists() else 0)
        if max(published(disturbed), default=0) == N_STEPS:
            assert fingerprint(disturbed, N_STEPS) == fingerprint(calm, N_STEPS)
    for n in range(n_runs + 1):
        with Services() as services:
            result = train([*WORDS, *background, f"dump_dir={tmp_path / str(n)}"], n_ranks, served_by(services))
        assert result.exit_code == 0, result.output
        assert fingerprint(tmp_path / str(n), N_STEPS) == fingerprint(calm, N_STEPS)
        assert losses(tmp_path / str(n)).items() <= losses(calm).items()
    assert not list(base(shm).iterdir())
