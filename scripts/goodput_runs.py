"""Runs of bench_goodput.py: the ways to train, the slow disk, and starting, watching and killing a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench_common import write_corpus

from lingua.checkpoint.shm.area import SERVICE_LOCK, area_of
from lingua.config.keys.model import LlamaArgs
from lingua.files import RunError, remove_leftover
from lingua.model.huggingface import translation_of
from lingua.run.metrics import read_metrics

HERE = Path(__file__).parent
VOCABULARY = 258  # of bytes
POLL_S = 0.05
START_WITHIN_S = 300.0
KINDS = {"kill": signal.SIGKILL, "node": signal.SIGKILL, "term": signal.SIGTERM}


@dataclass(frozen=True)
class Way:
    """A way to save and resume."""

    name: str
    asynchronous: bool = False
    kind: str = ""
    """Kind of every kill; empty: as in the trace."""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("lingua")

    def survives(self, kind: str) -> bool:
        """Return whether memory survives this kind of kill."""
        return self.is_ours and self.asynchronous and kind == "kill"


WAYS = [
    Way("lingua shm", True), Way("lingua shm, node", True, "node"), Way("lingua sync"), Way("dcp.async_save", True),
    Way("dcp.save"), Way("HF Trainer"),
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model and its rows. 12 bytes of state per parameter; a step takes about 0.1 s."""

    dim: int = 384
    n_layers: int = 6
    seq_len: int = 64
    first_steps: int = 50
    """Steps before the first save of the undisturbed run."""


TINY = Shape(dim=32, n_layers=1, seq_len=32, first_steps=100)


@dataclass(frozen=True)
class Bench:
    """Settings of all ways."""

    folder: Path
    shape: Shape
    disk_bytes_per_s: float
    corpus: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", self.folder / "data" / "source" / "source.chunk.00.jsonl")
        write_corpus(self.corpus, 1_000_000)
        build = [
            "cc",
            "-shared",
            "-fPIC",
            "-O2",
            "-o",
            str(self.folder / "slow_disk.so"),
            str(HERE / "slow_disk.c"),
            "-ldl",
        ]
        try:
            subprocess.run(build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RunError(f"slow_disk.c cannot be compiled ({error}); install a C compiler, gcc say") from None
        (self.folder / "clock").write_bytes(bytes(8))
        (self.folder / "disk").mkdir()

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(self.folder / "slow_disk.so"), "HF_HUB_OFFLINE": "1",
            "SLOW_DISK_FOLDER": str(self.folder / "disk"), "SLOW_DISK_CLOCK": str(self.folder / "clock"),
            "SLOW_DISK_BYTES_PER_S": str(self.disk_bytes_per_s),
        }  # fmt: skip

    def command(self, way: Way, folder: Path, every: int) -> list[str]:
        shape = self.shape
        model = LlamaArgs(dim=shape.dim, n_layers=shape.n_layers, n_heads=4)
        if way.is_ours:
            mode = "shm" if way.asynchronous else "null"
            return [
                sys.executable, "-m", "apps.main.train", f"config={HERE.parent / 'apps/main/configs/bytes.yaml'}",
                f"model.dim={model.dim}", f"model.n_layers={model.n_layers}", f"dump_dir={folder}", "steps=1000000",
                f"data.root_dir={self.folder / 'data'}", "data.sources={source: 1.0}", f"data.seq_len={shape.seq_len}",
                "data.batch_size=1", "optim.scheduler=constant", "sample_prompt=null", "validation.at_ends=false",
                f"checkpoint={{dump: {{every: {every}, keep: 2}}, async_save_mode: {mode}, linger_s: 60}}",
                "logging.freq=1", "device=cpu",
            ]  # fmt: skip
        translation = translation_of(model)
        assert translation is not None
        sizes = {"vocab_size": VOCABULARY, "max_seqlen": shape.seq_len, "dtype": "float32"}
        spec = {"way": way.name, "folder": str(folder), "every": every, "corpus": str(self.corpus)}
        spec |= {"seq_len": shape.seq_len, "llama": translation.config_json(model, **sizes, special={})}
        return [sys.executable, str(HERE / "goodput_peers.py"), json.dumps(spec)]


class Started(NamedTuple):
    """A start that reached its first step."""

    at_s: float
    step: int
    parts: dict[str, float]
    """Seconds by part; `weights`: loading."""


class Running:
    """One run in one folder, which is started, killed and restarted. Times are wall-clock times."""

    def __init__(self, bench: Bench, way: Way, every: int) -> None:
        self.bench, self.way, self.every = bench, way, every
        self.folder = Path(tempfile.mkdtemp(prefix=way.name.replace(" ", "-"), dir=bench.folder / "disk"))
        self.log = bench.folder / f"{self.folder.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill("node")
        remove_leftover(self.folder)

    def start(self) -> Started:
        """Start or resume, and wait for the first step."""
        self.started_s = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.bench.command(self.way, self.folder, self.every), env=self.bench.environment(), stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=HERE.parent,
            )  # fmt: skip
        while (found := self._started()) is None:
            if self.process.poll() is not None or time.time() - self.started_s > START_WITHIN_S:
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RunError(f"{self.way.name} did not train (exit code {self.process.poll()}): {last}")
            time.sleep(POLL_S)
        return found

    def _started(self) -> Started | None:
        if self.way.is_ours:
            notes = [note for note in self._lines("metrics.checkpoint.jsonl") if note["event"] == "trained"]
            return Started(notes[0]["at"], notes[0]["global_step"], notes[0]["parts"]) if notes else None
        before_s, parts = self.started_s, {}
        for line in self._lines("journal.jsonl"):
            parts[line.get("part", "first step")], before_s = line["at"] - before_s, line["at"]
            if "step" in line:
                return Started(before_s, line["step"], parts)
        return None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines that this attempt has written to a file, each with its time, `at`."""
        with suppress(FileNotFoundError):
            lines = read_metrics(self.folder / name)
            for line in lines:
                if "created_at" in line:
                    line["at"] = datetime.fromisoformat(line["created_at"]).timestamp()
            return [line for line in lines if line["at"] >= self.started_s]
        return []

    def ends_s(self) -> dict[int, float]:
        """Return the end of each step of this attempt."""
        if self.way.is_ours:  # the line of a step is written after the next one
            return {line["global_step"] + 1: line["at"] for line in self._lines("metrics.jsonl")}
        return {line["step"]: line["at"] for line in self._lines("journal.jsonl") if "step" in line}

    def last_step(self) -> int:
        """Return the newest step that this attempt has logged; ours logs one after the next is done."""
        name, key = ("metrics.jsonl", "global_step") if self.way.is_ours else ("journal.jsonl", "step")
        return max((line[key] for line in self._lines(name) if key in line), default=0)

    def save_began_s(self, step: int) -> float:
        """Return the start of a background save."""
        if not self.way.is_ours:
            return next(line["at"] for line in self._lines("journal.jsonl") if line.get("step") == step)
        notes = self._lines("metrics.checkpoint.jsonl")
        staged = next(note for note in notes if note["event"] == "staged" and note["global_step"] == step)
        return staged["at"] - staged["seconds"]

    def written(self, step: int) -> tuple[float, int] | None:
        """Return (time when the checkpoint of a step was complete on disk, its bytes), or None if it is not."""
        if self.way.is_ours:
            folder = self.folder / "checkpoints" / f"{step:010d}"
            mark = folder.with_name(f"checkpoint_{step:010d}.done")
        elif self.way.name == "HF Trainer":
            mark = (folder := self.folder / f"checkpoint-{step}") / "trainer_state.json"
        else:
            mark = (folder := self.folder / f"step-{step}") / ".metadata"
        with suppress(FileNotFoundError):
            return mark.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
        return None

    def kill(self, kind: str, grace_s: float = 10.0) -> None:
        """Kill all ranks; `node`: also the service, with all that is in memory."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, KINDS[kind])
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if kind == "node" and self.way.is_ours and (area := area_of(self.folder)).folder.exists():
            lock = area.lock(SERVICE_LOCK)
            while (pid := lock.holder()) is not None:
                os.kill(pid, signal.SIGKILL)
                time.sleep(POLL_S / 10)
            lock.close()
            remove_leftover(area.folder)
