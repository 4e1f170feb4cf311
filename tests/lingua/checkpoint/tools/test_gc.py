"""What gc would delete and deletes; killed at every operation it loses nothing that is published."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lingua.checkpoint import layout, lookup, publish
from lingua.checkpoint.shm.area import TRAINER_LOCK, Save, ShmArea, make_area
from lingua.checkpoint.tools.gc import Garbage, remove_garbage, survey_garbage, why_not_now
from lingua.files import DISK, Files, RunError, write_json
from lingua.run.lock import RunLock
from tests.checkpoints import damage, make_run, names_under, write_part
from tests.fakes import FaultyFiles, KillFiles
from tests.ranks import exit_code_of

KEEP_ONE = {"dump": {"every": 1, "keep": 1}}


@pytest.fixture
def tmp_path(shm: Path) -> Path:
    """In memory: thousands of fsyncs cost nothing there."""
    return shm


def later() -> float:
    """When all that a test has just written lies quiet."""
    return time.time() + 10_000


def untidy(run_dir: Path) -> Path:
    """A run of each kind of garbage, with 1 and 4 worth keeping: 1 is pinned."""
    root = make_run(run_dir, 1, 2, 3, 4, 5, 6, **KEEP_ONE)
    layout.evaluation(run_dir, 5).mkdir(parents=True)
    publish.set_aside(run_dir, root, 5, "broken")
    publish.set_aside(run_dir, root, 6, "later")
    publish.pin(root, 1, "reader", later() + 1000)
    publish.pin(root, 2, "gone", time.time() - 1)
    write_part(root, 7)
    layout.folder(root, 3).rename(layout.going(layout.folder(root, 3), 1))  # retired, but for the end of it
    layout.done_mark(root, 3).rename(layout.going(layout.done_mark(root, 3), 1))
    return root


def tell(items: list[Garbage], run_dir: Path) -> dict[str, str]:
    return {str(item.path.relative_to(run_dir)): item.why for item in items}


EXPECTED = {
    "checkpoints/incarnation-1/0000000003.trash": "half removed (attempt 1)",
    "checkpoints/incarnation-1/0000000007": "half written (attempt 1)",
    "checkpoints/0000000005.broken-1": "set aside: broken",
    "checkpoints/checkpoint_0000000005.done.broken-1": "set aside: broken",
    "checkpoints/0000000006.later-1": "set aside: later",
    "checkpoints/checkpoint_0000000006.done.later-1": "set aside: later",
    "evals/0000000005.broken-1": "set aside: broken",
    "checkpoints/0000000002": "retention",
    "checkpoints/pins/0000000002.gone.json": "an expired pin",
}


def test_what_would_go_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    root = untidy(tmp_path)
    before = names_under(tmp_path)
    items = survey_garbage(tmp_path, now=later)
    assert tell(items, tmp_path) == EXPECTED
    assert all(item.size_bytes > 0 for item in items if "evals" not in str(item.path))
    assert names_under(tmp_path) == before
    assert layout.done_steps(root) == [1, 2, 4]


def test_what_was_told_goes_and_nothing_else(tmp_path: Path) -> None:
    root = untidy(tmp_path)
    told: list[Garbage] = []
    freed = remove_garbage(tmp_path, told.extend, now=later)
    assert tell(told, tmp_path) == EXPECTED
    assert freed == sum(item.size_bytes for item in told)
    assert clean(root)
    assert survey_garbage(tmp_path, now=later) == []
    assert remove_garbage(tmp_path, told.extend, now=later) == 0


def clean(root: Path) -> bool:
    left = {str(path.relative_to(root)) for path in root.iterdir()}
    pinned = sorted(path.name for path in (root / layout.PINS).iterdir())
    return (left, pinned) == (
        {"0000000001", "checkpoint_0000000001.done", "0000000004", "checkpoint_0000000004.done", "pins"},
        ["0000000001.reader.json"],
    )


@pytest.mark.soak
def test_killed_at_every_operation(tmp_path: Path) -> None:
    counting = FaultyFiles()
    untidy(tmp_path / "count")
    remove_garbage(tmp_path / "count", lambda items: None, now=later, files=counting)
    assert counting.n_done > 40
    for kill_at in range(1, counting.n_done + 1):
        run_dir = tmp_path / str(kill_at)
        root = untidy(run_dir)

        def die(run_dir: Path = run_dir, kill_at: int = kill_at) -> None:
            remove_garbage(run_dir, lambda items: None, now=later, files=KillFiles(kill_at))

        assert exit_code_of(die) == KillFiles.KILLED
        for step in (1, 4):
            assert lookup.find_one(f"{run_dir}@{step}").damage() == []
        remove_garbage(run_dir, lambda items: None, now=later)
        assert clean(root), f"killed at {kill_at}: {counting.log[kill_at - 1]}"


def test_a_checkpoint_that_lacks_only_its_mark_is_published(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1, 2)
    layout.done_mark(root, 2).rename(layout.coming(layout.done_mark(root, 2), 1))
    (item,) = survey_garbage(tmp_path, now=later)
    assert (item.why, item.size_bytes) == ("complete except for its mark (attempt 1), will be published", 0)
    remove_garbage(tmp_path, lambda items: None, now=later)
    assert lookup.find_one(f"{tmp_path}@2").damage() == []


# -- what holds it back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "given_up"),
    [((), ["0000000001", "0000000002"]), ((3,), ["0000000001"]), ((2, 3), ["0000000002"])],
)
def test_retention_only_beside_a_checkpoint_that_verifies(
    tmp_path: Path, broken: tuple[int, ...], given_up: list[str]
) -> None:
    root = make_run(tmp_path, 1, 2, 3, **KEEP_ONE)
    for step in broken:
        damage(root, step)
    assert [item.path.name for item in survey_garbage(tmp_path)] == given_up


def test_nothing_goes_when_nothing_verifies(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1, 2, **KEEP_ONE)
    damage(root, 1)
    damage(root, 2)
    before = names_under(root)
    with pytest.raises(RunError, match=r"no checkpoint in .* verifies, so nothing is removed"):
        remove_garbage(tmp_path, lambda items: None, now=later)
    assert names_under(root) == before


def test_a_run_without_a_config_keeps_what_is_published(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 2, 3, **KEEP_ONE)
    (tmp_path / "config.yaml").unlink()
    assert survey_garbage(tmp_path) == []


def test_refused_while_the_run_is_being_trained(tmp_path: Path) -> None:
    root = untidy(tmp_path)
    with RunLock(tmp_path):
        before = names_under(root)
        assert "is being trained by attempt 2" in str(why_not_now(tmp_path))
        with pytest.raises(RunError, match="is being trained by"):
            remove_garbage(tmp_path, lambda items: None)
        assert names_under(root) == before


def test_refused_while_a_service_is_writing(tmp_path: Path) -> None:
    root = untidy(tmp_path)
    write_json(layout.staging_dir(root, 1) / "writer-0000000007-0.json", {"host": "node-b", "boot_id": "1", "pid": 1})
    before = names_under(root)
    with pytest.raises(RunError, match=r"its checkpoint service still writes writer-0000000007-0\.json"):
        remove_garbage(tmp_path, lambda items: None)
    assert names_under(root) == before
    assert why_not_now(tmp_path, now=later) is None  # it has been silent for hours


def area(run_dir: Path, shm: Path, step: int) -> ShmArea:
    """Memory of a run whose processes are all dead, with a complete snapshot in it."""
    found = make_area(run_dir, shm)
    found.session.write({"run_dir": str(run_dir)})
    slot = found.slot(0)
    slot.folder.mkdir()
    save = Save("id", 1, step, (0,))
    slot.put_mark(save)
    slot.report_ready(0, save, {})
    return found


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Another process, that holds a lock until the block ends."""
    program = "import sys; from pathlib import Path; from lingua.files import ProcessLock; "
    program += "ProcessLock(Path(sys.argv[1])).take(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield


def test_memory_of_dead_runs_goes_unless_their_next_start_would_save_what_is_in_it(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    for name in ("run", "unsaved", "living"):
        make_run(tmp_path / name, 1, shm_path=str(shm))
    saved, unsaved = area(tmp_path / "run", shm, 1), area(tmp_path / "unsaved", shm, 2)
    gone, living = area(tmp_path / "gone", shm, 2), area(tmp_path / "living", shm, 1)
    illegible, link = area(tmp_path / "illegible", shm, 2), saved.folder.with_name("a-link")
    illegible.session.path.write_bytes(b"{")
    link.symlink_to(living.folder)
    found: list[Garbage] = []
    with holding(living.folder / TRAINER_LOCK):
        remove_garbage(tmp_path / "run", found.extend)
    gone_runs = (tmp_path / "gone", tmp_path / "run", "unknown")
    assert sorted(item.why for item in found) == [f"memory of {run}" for run in gone_runs]
    assert all(item.size_bytes > 0 for item in found)
    assert [each.folder.exists() for each in (saved, gone, illegible, unsaved, living)] == [False] * 3 + [True] * 2
    assert link.is_symlink()


class Waking(Files):
    """A disk on which a trainer takes the run over before the n-th removal of a folder."""

    def __init__(self, n: int, take_over: Callable[[], object]) -> None:
        self.n, self.take_over = n, take_over

    def remove_tree(self, path: Path, parent: int | None = None) -> None:
        self.n -= 1
        if self.n == 0:
            self.take_over()
        super().remove_tree(path, parent)


def test_a_gc_that_was_overtaken_while_it_slept_stops(tmp_path: Path) -> None:
    root = untidy(tmp_path)

    def take_over() -> None:
        for path in (tmp_path / "incarnations").iterdir():
            path.write_bytes(path.read_bytes().replace(b'"released": false', b'"released": true'))
        taken = RunLock(tmp_path)
        taken.acquire()
        taken._stop.set()  # it beats no more, but it is not released
        taken._wake.set()
        publish.open_staging_dir(root, 3)

    with pytest.raises((RunError, OSError)):
        remove_garbage(tmp_path, lambda items: None, now=later, files=Waking(3, take_over))
    assert layout.done_steps(root) == [1, 2, 4]
    DISK.rmdir(layout.staging_dir(root, 3))


def test_what_is_another_runs_is_left_alone(tmp_path: Path) -> None:
    """As in a copy of a run folder with `checkpoint.path`."""
    root = make_run(tmp_path / "run", 1, 2, 3, **KEEP_ONE)
    with RunLock(tmp_path / "run") as lock:
        lock.bind(root)
    make_run(tmp_path / "copy", path=str(root), **KEEP_ONE)
    with pytest.raises(RunError, match=r"holds the checkpoints of another run, .*/run;"):
        remove_garbage(tmp_path / "copy", lambda items: None, now=later)
    assert layout.done_steps(root) == [1, 2, 3]
