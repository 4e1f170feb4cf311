"""Loader workers: shielded from signals, gone with their parent, loud about errors, nothing left behind."""

from __future__ import annotations

import collections
import errno
import itertools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from lingua.data import workers
from lingua.data.blocked_source import DataError
from lingua.data.loader import Loader, build_loader
from lingua.data.workers import Workers, error_in
from lingua.files import DiskError, RunError
from lingua.run.failure import classify
from tests.corpora import data_args, documents, two_sources, write_source

G = 12


def loader_with_workers(root: Path, **changed: Any) -> Loader:
    plain: dict[str, Any] = {"load_async": True, "num_workers": 2, "prefetch_size": 2, "lanes": 12}
    return build_loader(data_args(root, **{**plain, **changed}), rows_per_step=G)


def pids(loader: Loader) -> list[int]:
    assert isinstance(loader.producer, Workers)
    return loader.producer.pids()


def wait_for_end(pid: int, timeout_s: float = 300) -> None:
    """Block until a process is gone, ours or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], timeout_s)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def named_memory(pids: Iterable[int]) -> list[str]:
    """Files of /dev/shm that these processes have open or mapped; a kill would leave them there."""
    maps = [line.split()[-1] for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    opened = [os.readlink(path) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return [name for name in (*maps, *opened) if name.startswith("/dev/shm/")]


def test_signals_of_the_trainer_do_not_reach_workers(tmp_path: Path) -> None:
    two_sources(tmp_path)
    with (
        build_loader(data_args(tmp_path, lanes=12), rows_per_step=G) as plain,
        loader_with_workers(tmp_path) as loader,
    ):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            for pid in pids(loader):  # at once, while they start, and again later
                os.kill(pid, number)
            for _ in range(8):
                np.testing.assert_array_equal(next(loader).views, next(plain).views)


def test_a_killed_worker_is_reported_and_rows_made_before_are_used(tmp_path: Path) -> None:
    two_sources(tmp_path)
    with loader_with_workers(tmp_path, num_workers=1) as loader:
        next(loader)
        pid = pids(loader)[0]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RunError, match=rf"loader worker 0 \(pid {pid}\) was killed by SIGKILL .*prefetch_size"):
            list(itertools.islice(loader, 10))
        with pytest.raises(RunError, match="has ended"):
            next(loader)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_arrives_with_file_and_offset_behind_the_rows_before_it(tmp_path: Path, asynchronous: bool) -> None:
    folder = write_source(tmp_path, "s", documents("d", 5000), n_files=1)
    file = folder / "s.chunk.00.jsonl"
    whole = file.read_text()
    half = whole.index("\n", len(whole) // 2) + 1
    file.write_text(whole[:half] + "{broken\n" + whole[half:])
    args: dict[str, Any] = {"sources": {"s": 1.0}, "on_bad_line": "error", "load_async": asynchronous, "lanes": 12}
    with loader_with_workers(tmp_path, **args) as loader:
        with pytest.raises(DataError, match=rf"s\.chunk\.00\.jsonl, byte {half}: no JSON .*on_bad_line: skip"):
            collections.deque(loader, maxlen=0)
        assert loader.state_dict()["row"] > 1000


def test_a_bug_arrives_with_its_traceback(tmp_path: Path) -> None:
    two_sources(tmp_path)
    with build_loader(data_args(tmp_path, lanes=12), rows_per_step=G) as plain:
        state = plain.state_dict()
    state["lanes"]["3"]["hash"] = "no hash"
    args = data_args(tmp_path, load_async=True, lanes=12)
    with (
        build_loader(args, rows_per_step=G, state=state) as loader,
        pytest.raises(RuntimeError, match=r"(?s)in a loader worker: .*pack\.py.*ValueError: invalid literal"),
    ):
        next(loader)


class RecordingOutbox(workers._Outbox):
    """Keeps what it would send."""

    def __init__(self) -> None:
        self.notes: list[bytes] = []

    def put(self, kind: int, note: bytes, row: object = None) -> None:
        self.notes.append(note)


def test_an_error_of_the_disk_arrives_with_its_errno_and_file() -> None:
    outbox = RecordingOutbox()
    outbox.fail(OSError(errno.ESTALE, "Stale file handle", "/data/a.jsonl"))
    outbox.fail(DiskError("it is gone", errno.ENOENT, "/data/b.jsonl"))
    outbox.fail(RunError("do this"))
    notes = [orjson.loads(note) for note in outbox.notes]
    assert [(note["kind"], note["errno"], note["path"]) for note in notes] == [
        ("os", errno.ESTALE, "/data/a.jsonl"),
        ("run", errno.ENOENT, "/data/b.jsonl"),
        ("run", None, None),
    ]
    errors = [error_in(note) for note in notes]
    assert [classify(error) for error in errors] == ["disk", "setup", "setup"]
    assert str(errors[2]) == "do this"


def test_bad_lines_are_logged_in_the_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_source(tmp_path, "s", documents("d", 5))
    (folder / "s.chunk.01.jsonl").write_text("{\n")
    with loader_with_workers(tmp_path, sources={"s": 1.0}, num_workers=1, max_bad_fraction=1.0) as loader:
        for _ in range(20):
            next(loader)
    assert sum("s.chunk.01.jsonl, byte 0: no JSON" in message for message in caplog.messages) == 1
    loader.close()
    said = [message for message in caplog.messages if message.startswith("this rank left out ")]
    assert len(said) == 1
    assert "lines of its data as bad: {'not_json': " in said[0]


def test_closing_is_prompt_and_leaves_nothing(tmp_path: Path) -> None:
    two_sources(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    loader = loader_with_workers(tmp_path)
    next(loader)
    started = pids(loader)
    assert named_memory(started) == []
    loader.close()
    loader.close()
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    with pytest.raises(RunError, match="has ended"):
        next(loader)


def test_more_workers_than_lanes(tmp_path: Path) -> None:
    two_sources(tmp_path)
    with loader_with_workers(tmp_path, num_workers=5, lanes=2, batch_size=1) as loader:
        assert len(pids(loader)) == 2
        assert [int(next(loader).rows[0]) for _ in range(4)] == [0, 1, 2, 3]


def test_a_start_that_fails_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_sources(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        loader_with_workers(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


PARENT = """
import sys, torch
from lingua.data.loader import build_loader
from tests.corpora import data_args
print("main is run")
args = data_args(sys.argv[1], load_async=True, num_workers=2, prefetch_size=2, lanes=12)
loader = build_loader(args, rows_per_step=12)
next(loader)
print(*loader.producer.pids(), flush=True)
import os
if os.fork() == 0:  # someone else holds copies of the pipes
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.soak
def test_workers_die_with_a_killed_parent_and_never_import_torch(tmp_path: Path) -> None:
    two_sources(tmp_path)
    script = tmp_path / "parent.py"  # no `if __name__ == "__main__"`: a worker must not run it
    script.write_text(PARENT)
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        assert parent.stdout.readline() == "main is run\n"
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        assert named_memory([parent.pid, *workers]) == []
        parent.kill()
        parent.wait()
        for pid in workers:
            wait_for_end(pid)
