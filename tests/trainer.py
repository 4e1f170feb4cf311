"""Real trainers in forked processes: torch is loaded once, so a start is cheap, and any line can be a kill.

A `hook(rank)` runs in the child before training and may wrap anything there, say to die at a chosen step.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch._inductor  # noqa: F401 - `deterministic` imports it: seconds, here once for all forks

import apps.main.loop  # noqa: F401 - the trainer imports it late; here once for all forks
from apps.main.train import main
from lingua.config.command_line import run_main
from lingua.run.metrics import read_metrics
from lingua.train.learner import Run
from tests.ports import free_port
from tests.ranks import fork

Hook = Callable[[int], None]

TINY = [
    "apps/main/configs/bytes.yaml",
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.lanes=12",
    "logging.freq=1",
    "optim.warmup=2",
    "validation.at_ends=false",
    "sample_prompt=null",
    "device=cpu",
    "deterministic=true",
    "distributed.timeout_s=300",
]
"""Words of a run that takes a second."""


@dataclass
class Result:
    """How each rank ended (below 0: the signal that killed it), and what all of them said."""

    exit_codes: list[int]
    output: str

    @property
    def exit_code(self) -> int:
        """The one code that all ranks ended with."""
        assert len(set(self.exit_codes)) == 1, f"exit codes {self.exit_codes}\n{self.output}"
        return self.exit_codes[0]


class Trainer:
    """Started ranks; `wait` for their end. A context manager, so that none outlives a test."""

    def __init__(self, words: Sequence[str], n_ranks: int = 1, hook: Hook | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        port = free_port()
        self.pids = [self._start(words, rank, n_ranks, port, hook) for rank in range(n_ranks)]
        self._running = set(self.pids)

    def _start(self, words: Sequence[str], rank: int, n_ranks: int, port: int, hook: Hook | None) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = fork()
        if pid:
            return pid
        code = 99
        try:
            for stream in (1, 2):
                os.dup2(self._said.fileno(), stream)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
                del os.environ[name]
            os.environ["OMP_NUM_THREADS"] = "1"
            if n_ranks > 1:
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(n_ranks),
                    LOCAL_RANK=str(rank),
                    LOCAL_WORLD_SIZE=str(n_ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            if hook is not None:
                hook(rank)
            code = run_main(main, list(words))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self) -> Result:
        codes = []
        for pid in self.pids:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            self._running.discard(pid)
        self._said.seek(0)
        return Result(codes, self._said.read().decode(errors="replace"))

    def __enter__(self) -> Trainer:
        return self

    def kill(self) -> None:
        """Kill -9 what has not been waited for."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)
        self._running.clear()

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._said.close()


def train(words: Sequence[str], n_ranks: int = 1, hook: Hook | None = None) -> Result:
    """Start trainers and wait for their end."""
    with Trainer(words, n_ranks, hook) as trainer:
        return trainer.wait()


def at_step(step: int, act: Callable[[], Any], on_rank: int | None = None) -> Hook:
    """Hook: do `act` right after update `step` (on one rank, or on all)."""

    def hook(rank: int) -> None:
        advance = Run.advance

        def advance_and_act(run: Run) -> None:
            advance(run)
            if run.step == step and on_rank in (None, rank):
                act()

        setattr(Run, "advance", advance_and_act)  # noqa: B010 - a type checker knows what it would be

    return hook


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send_self(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal.Signals[name])


def published(run_dir: Path) -> list[int]:
    """Steps with a `.done` mark."""
    return sorted(int(mark.name[11:21]) for mark in (run_dir / "checkpoints").glob("checkpoint_*.done"))


def losses(run_dir: Path, rel: float = 0.0) -> dict[int, float]:
    """Loss by step; where a step was trained twice, both must be equal, but for `rel` where ranks were others."""
    by_step: dict[int, float] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        step, loss = record["global_step"], record.get("loss/out")
        if loss is None:  # it was not finite
            continue
        before = by_step.setdefault(step, loss)
        assert math.isclose(before, loss, rel_tol=rel), f"step {step} was {before}, then {loss}"
    return by_step


def fingerprint(run_dir: Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds, as its manifest and JSON files say: equal if and only if bitwise equal."""
    folder = run_dir / "checkpoints" / f"{step:010d}"
    facts: dict[str, Any] = orjson.loads((folder / "manifest.json").read_bytes())
    return facts["files"]
