"""A run killed at random moments, again and again, ends as the undisturbed one. Minutes; `.ci/run` runs it."""

import os
import random
import select
import signal
import time
from pathlib import Path

import pytest

from tests.trainer import TINY, Trainer, fingerprint, losses, published, train

N_STEPS = 60
WORDS = [*TINY, f"steps={N_STEPS}", "checkpoint.dump.every=2", "checkpoint.dump.keep=2", "data.num_workers=2"]


def kill_after(seconds: float, words: list[str], n_ranks: int, victim: int) -> bool:
    """Start, kill one rank after so long; whether it was still running."""
    with Trainer(words, n_ranks) as trainer:
        descriptor = os.pidfd_open(trainer.pids[victim])
        ended, _, _ = select.select([descriptor], [], [], seconds)
        os.close(descriptor)
        if not ended:
            os.kill(trainer.pids[victim], signal.SIGKILL)
        trainer.wait()
        return not ended


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n_ranks", "n_kills"), [(1, 30), (2, 10)])
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
