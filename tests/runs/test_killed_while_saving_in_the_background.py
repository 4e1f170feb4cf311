"""Trainer, checkpoint service or both killed at any operation of a save in the background: nothing is lost by it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

import apps.main.loop
from lingua.checkpoint import publish
from lingua.checkpoint.layout import folder
from lingua.checkpoint.shm import drain
from lingua.checkpoint.shm.area import area_of, base
from lingua.checkpoint.shm.coordinator import Coordinator
from lingua.checkpoint.shm.slot_writer import SlotFile
from lingua.files import DISK, Files
from lingua.run.metrics import read_metrics
from lingua.run.watchdog import Watchdog
from lingua.train.learner import Run
from lingua.train.monitor import StepMonitor
from tests.fakes import At, BlockingFiles, FaultyFiles, KillFiles
from tests.services import Services, both, served_by
from tests.trainer import TINY, Hook, Trainer, at_step, fingerprint, kill_self, losses, published, send_self, train

N_STEPS = 6
WORDS = [*TINY, f"steps={N_STEPS}", "checkpoint.dump.every=2", "checkpoint.dump.keep=1", "data.num_workers=1"]

# Operations of the service, in the order in which they come for the first checkpoint of a run.
TAKE_SLOT = At(r"rename .*/slot-0\.staged ")
WRITER = At(r"create .*/\.writer-\d{10}-0\.json")
MAKE_FOLDER = At(r"mkdir .*/\d{10}$")
WRITE = At(r"write .*/\d{10}/model\.00000\.distcp$")  # of whichever step is taken first: at an end, the newest
SYNC = At(r"fsync .*/\d{10}/model\.00000\.distcp$")
WRITTEN = At(r"fsync_dir .*/incarnation-\d+/\d{10}$")
MANIFEST = At(r"rename .*/\d{10}/manifest\.json$")
DRAFT = At(r"rename .*/incarnation-1/checkpoint_\d{10}\.done$")
RENAME = At(r"rename .*/incarnation-1/\d{10} ")
MARK = At(r"rename .*/checkpoints/checkpoint_\d{10}\.done$")
SYNC_MARK = At(r"fsync_dir .*/checkpoints$", 2)
WRITER_GONE = At(r"remove .*/writer-\d{10}-0\.json$")
FREE = At(r"rename .*/slot-0\.draining .*/slot-0\.free$")
LAST_SYNC = At(rf"fsync .*/{N_STEPS:010d}/\.metadata$")
# Of its retention, once the last checkpoint is there, and of the memory that it gives back after that.
UNMARK = At(r"rename .*/checkpoint_\d{10}\.done .*\.trash$")
TRASH = At(r"rename .*/\d{10} .*\.trash$")
REMOVE = At(r"remove .*/\d{10}\.trash/manifest\.json$")
REMOVE_MARK = At(r"remove .*/checkpoint_\d{10}\.done\.trash$")
GIVE_BACK_FILE = At(r"remove .*/slot-0/train_state\.00000\.json$")
GIVE_BACK_SLOT = At(r"remove .*/slot-0\.free$")
LAST_LOCK = At(r"remove .*/service\.lock$")
AT_THE_END = (UNMARK, TRASH, REMOVE, REMOVE_MARK, GIVE_BACK_FILE, GIVE_BACK_SLOT, LAST_LOCK)
SERVICE_POINTS = (
    *(TAKE_SLOT, WRITER, MAKE_FOLDER, WRITE, SYNC, WRITTEN, MANIFEST, DRAFT, RENAME, MARK, SYNC_MARK, WRITER_GONE),
    *(FREE, LAST_SYNC, *AT_THE_END),
)

# Operations of rank 0.
PASSAGE = At(r"mkdir .*/incarnation-1$")
JOIN = At(r"reserve .*/events$")
SESSION = At(r"write .*/session$")
SECOND_SESSION = At(r"close .*/session$", 3)  # the first one is of `reserve`
SLOT_MARK = At(r"reserve .*/slot-0\.free$")
SLOT = At(r"mkdir .*/slot-0$")
STAGED = At(r"rename .*/slot-0\.staged$")
STATE = At(r"write .*/slot-0/train_state\.00000\.json$")
FILLED = At(r"write .*/slot-0/\.metadata$")
READY = At(r"write .*/slot-0/ready\.00000$", 3)  # the allocation and each save say first that it is not
READY_SAID = At(r"close .*/slot-0/ready\.00000$", 3)
SECOND_MARK = At(r"write .*/slot-\d\.(free|claimed)$", 2)
SECOND = At(r"rename .*/slot-\d\.staged$", 2)
SECOND_UNREADY = At(r"write .*/ready\.00000$", 5)
THIRD_READY = At(r"write .*/ready\.00000$", 8)
ENDING = At(r"write .*/session$", 3)
MEMORY = At(r"mkdir .*/lingua-\d+$")
BEFORE_THE_SERVICE = (MEMORY, JOIN, PASSAGE, SESSION)
TRAINER_POINTS = (
    *BEFORE_THE_SERVICE,
    *(SECOND_SESSION, SLOT_MARK, SLOT, STAGED, STATE, FILLED, READY, READY_SAID),
    *(SECOND_MARK, SECOND, SECOND_UNREADY, THIRD_READY, ENDING),
)
RANK_1_POINTS = (
    MEMORY,
    At(r"reserve .*/train_state\.00001\.json$"),
    At(r"write .*/train_state\.00001\.json$", 2),
    At(r"write .*/ready\.00001$", 4),
    At(r"close .*/ready\.00001$", 6),  # two of `reserve`, two of each save
)


def words(run_dir: Path, shm: Path, *more: str) -> list[str]:
    where = ["checkpoint.async_save_mode=shm", f"checkpoint.shm_path={shm}", "checkpoint.linger_s=0"]
    return [*WORDS, f"dump_dir={run_dir}", *where, *more]


@cache
def calm_run(folder: Path, n_ranks: int) -> Path:
    """The undisturbed run, synchronous."""
    run_dir = folder / f"calm_{n_ranks}"
    assert train([*WORDS, f"dump_dir={run_dir}"], n_ranks).exit_code == 0
    return run_dir


@pytest.fixture
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    return lambda n_ranks: calm_run(tmp_path_factory.getbasetemp(), n_ranks)


def said_published(run_dir: Path) -> list[int]:
    """Steps that the services say they have published."""
    lines = (line for log in run_dir.glob("logs/checkpoint_service*") for line in log.read_text().splitlines())
    return [int(line.split("'step': ")[1].split(",")[0]) for line in lines if " published {" in line]


def assert_nothing_published_is_lost(run_dir: Path) -> None:
    done = published(run_dir)
    assert max(said_published(run_dir), default=0) <= max(done, default=0)
    for step in done[-1:]:
        root = run_dir / "checkpoints"
        assert publish.damage(folder(root, step), publish.read_marked_manifest(root, step)) == []


def end_calmly(run_dir: Path, shm: Path, n_ranks: int, calm: Path) -> None:
    """Start once more: the end is that of the undisturbed run, and nothing lies about."""
    with Services() as services:
        result = train(words(run_dir, shm), n_ranks, served_by(services))
    assert result.exit_code == 0, result.output
    assert fingerprint(run_dir, N_STEPS) == fingerprint(calm, N_STEPS)
    assert losses(run_dir) == losses(calm)
    assert_nothing_published_is_lost(run_dir)
    assert not list(base(shm).iterdir())
    assert not [path for path in (run_dir / "checkpoints").rglob("*") if path.suffix in (".trash", ".closed")]


def first_steps(run_dir: Path) -> dict[int, int]:
    """Incarnation -> the first step that it trained."""
    found: dict[int, int] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        found.setdefault(record["incarnation"], record["global_step"])
    return found


# -- one of them, at an operation ----------------------------------------------------------------------------------


def service_dies(kill_at: At) -> Callable[[int], Files]:
    return lambda start: KillFiles(kill_at) if start == 1 else DISK


def kill_the_service(run_dir: Path, shm: Path, n_ranks: int, kill_at: At, calm: Path) -> None:
    with Services(service_dies(kill_at)) as services:
        result = train(words(run_dir, shm), n_ranks, served_by(services))
    assert result.exit_code == 0, result.output
    assert_nothing_published_is_lost(run_dir)
    if kill_at not in AT_THE_END:  # there was another one after it
        assert not list(base(shm).iterdir())
    end_calmly(run_dir, shm, n_ranks, calm)


@pytest.mark.soak
@pytest.mark.parametrize("kill_at", [RENAME, FREE])
def test_a_killed_service_is_replaced(tmp_path: Path, shm: Path, calm: Callable[[int], Path], kill_at: At):
    kill_the_service(tmp_path / "run", shm, 1, kill_at, calm(1))


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("kill_at", [MARK])
def test_a_killed_service_of_two_ranks(tmp_path: Path, shm: Path, calm: Callable[[int], Path], kill_at: At):
    kill_the_service(tmp_path / "run", shm, 2, kill_at, calm(2))


def kill_a_rank(run_dir: Path, shm: Path, n_ranks: int, rank: int, kill_at: At, calm: Path) -> None:
    def files(r: int) -> Files:
        return KillFiles(kill_at) if r == rank else DISK

    with Services() as services:
        result = train(words(run_dir, shm), n_ranks, served_by(services, files))
        assert result.exit_codes[rank] == KillFiles.KILLED, result.output
        assert all(code != 0 for code in result.exit_codes)
    assert_nothing_published_is_lost(run_dir)
    if kill_at not in BEFORE_THE_SERVICE:  # it was there, has saved all that was complete, and has left
        assert not list(base(shm).iterdir())
    end_calmly(run_dir, shm, n_ranks, calm)


@pytest.mark.soak
@pytest.mark.parametrize("kill_at", [STAGED, THIRD_READY])
def test_a_killed_trainer_goes_on(tmp_path: Path, shm: Path, calm: Callable[[int], Path], kill_at: At):
    kill_a_rank(tmp_path / "run", shm, 1, 0, kill_at, calm(1))


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize(("rank", "kill_at"), [(1, RANK_1_POINTS[2])])
def test_a_killed_rank_of_two(tmp_path: Path, shm: Path, calm: Callable[[int], Path], rank: int, kill_at: At):
    kill_a_rank(tmp_path / "run", shm, 2, rank, kill_at, calm(2))


# -- both ----------------------------------------------------------------------------------------------------------


def kill_both(run_dir: Path, shm: Path, n_ranks: int, block_at: At, calm: Path) -> None:
    """The service stands still before an operation, then all that lives is killed."""
    there = run_dir.with_name(f"{run_dir.name}.there")
    with Services(lambda start: BlockingFiles(block_at, there)) as services:
        with Trainer(words(run_dir, shm), n_ranks, served_by(services)) as trainer:
            wait_for(there)
            trainer.kill()
        services.kill()
    assert_nothing_published_is_lost(run_dir)
    end_calmly(run_dir, shm, n_ranks, calm)


def wait_for(path: Path) -> None:
    """Wait until there is a file; a test that waits in vain has its time limit."""
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.soak
@pytest.mark.parametrize("block_at", [WRITE, MARK])
def test_when_all_is_killed_the_next_start_goes_on(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], block_at: At
):
    kill_both(tmp_path / "run", shm, 1, block_at, calm(1))


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("block_at", [RENAME])
def test_all_of_two_ranks(tmp_path: Path, shm: Path, calm: Callable[[int], Path], block_at: At):
    kill_both(tmp_path / "run", shm, 2, block_at, calm(2))


@pytest.mark.soak
@pytest.mark.parametrize("kill_at", SERVICE_POINTS)
def test_a_service_killed_at_more_operations(tmp_path: Path, shm: Path, calm: Callable[[int], Path], kill_at: At):
    kill_the_service(tmp_path / "run", shm, 1, kill_at, calm(1))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("n_ranks", "rank", "kill_at"),
    [
        *((1, 0, at) for at in TRAINER_POINTS),
        *((2, 0, at) for at in (SLOT, READY)),
        *((2, 1, at) for at in RANK_1_POINTS),
    ],
)
def test_a_trainer_killed_at_more_operations(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], n_ranks: int, rank: int, kill_at: At
):
    kill_a_rank(tmp_path / "run", shm, n_ranks, rank, kill_at, calm(n_ranks))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("n_ranks", "kill_at"), [*((1, at) for at in SERVICE_POINTS), *((2, at) for at in (WRITE, MARK, FREE))]
)
def test_all_killed_at_more_operations(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], n_ranks: int, kill_at: At
):
    kill_both(tmp_path / "run", shm, n_ranks, kill_at, calm(n_ranks))


# -- what is only in memory ----------------------------------------------------------------------------------------


def leave_in_memory(run_dir: Path, shm: Path, n_ranks: int = 1) -> None:
    """Steps 2 and 4 are complete in memory, none is on the disk, and everything is dead."""

    def kill_when_complete() -> None:
        slots = area_of(run_dir, shm).slots()
        while not any(found and found[0].step == 4 for found in (slot.complete() for slot in slots)):
            time.sleep(0.01)
        kill_self()

    with Services(lambda start: BlockingFiles(WRITE)) as services:
        train(words(run_dir, shm), n_ranks, both(served_by(services), at_step(5, kill_when_complete)))
        services.kill()
    assert published(run_dir) == []


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("n_ranks", [2])
def test_what_is_complete_in_memory_is_where_the_next_start_goes_on(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], n_ranks: int
):
    run_dir = tmp_path / "run"
    leave_in_memory(run_dir, shm, n_ranks)
    end_calmly(run_dir, shm, n_ranks, calm(n_ranks))
    assert first_steps(run_dir) == {1: 1, 2: 5}


@pytest.mark.soak
@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_start_trains_on_from_memory_while_the_disk_stands_still(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], n_ranks: int
):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    leave_in_memory(run_dir, shm, n_ranks)

    def let_the_disk_move() -> None:
        assert published(run_dir) == []
        gate.touch()

    with Services(lambda start: BlockingFiles(WRITE, until=gate)) as services:
        result = train(words(run_dir, shm), n_ranks, both(served_by(services), at_step(5, let_the_disk_move, 0)))
    assert result.exit_code == 0, result.output
    assert sorted(said_published(run_dir)) == [2, 4, 6]  # each once
    assert first_steps(run_dir) == {1: 1, 2: 5}
    assert fingerprint(run_dir, N_STEPS) == fingerprint(calm(n_ranks), N_STEPS)
    assert losses(run_dir) == losses(calm(n_ranks))


@pytest.mark.soak
def test_a_stop_before_the_first_step_waits_until_what_was_in_memory_is_on_the_disk(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path]
):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    leave_in_memory(run_dir, shm)

    def stop_at_once(rank: int) -> None:
        go_on, finish = apps.main.loop.train_to_the_end, Coordinator.finish

        def stopped(run: Run, watchdog: Watchdog, monitor: StepMonitor, *rest: Any) -> int:
            send_self("SIGTERM")()
            monitor.note_stop(True)
            return go_on(run, watchdog, monitor, *rest)

        def opened(*args: Any) -> str | None:
            gate.touch()
            return finish(*args)

        setattr(apps.main.loop, "train_to_the_end", stopped)  # noqa: B010
        setattr(Coordinator, "finish", opened)  # noqa: B010

    with Services(lambda start: BlockingFiles(WRITE, until=gate)) as services:
        result = train(words(run_dir, shm), 1, both(served_by(services), stop_at_once))
        assert result.exit_code == 75, result.output
        assert published(run_dir)[-1] == 4
    assert (stop(run_dir)["step"], stop(run_dir)["unsaved"]) == (4, None)
    end_calmly(run_dir, shm, 1, calm(1))


@pytest.mark.soak
def test_starts_killed_while_they_save_what_they_found(tmp_path: Path, shm: Path, calm: Callable[[int], Path]):
    run_dir = tmp_path / "run"
    leave_in_memory(run_dir, shm)
    for n, block_at in enumerate((WRITTEN, WRITE)):  # when the first is all written, when it is begun
        blocked = tmp_path / f"blocked_{n}"
        with Services(lambda start, at=block_at, mark=blocked: BlockingFiles(at, mark)) as services:
            with Trainer(words(run_dir, shm), 1, served_by(services)) as trainer:
                wait_for(blocked)
                trainer.kill()
            services.kill()
        assert published(run_dir) == []
    end_calmly(run_dir, shm, 1, calm(1))
    assert set(first_steps(run_dir).values()) == {1, 5}  # how far the others came is not known


@pytest.mark.soak
def test_a_folder_begun_anew_inherits_nothing(tmp_path: Path, shm: Path, calm: Callable[[int], Path]):
    run_dir = tmp_path / "run"
    leave_in_memory(run_dir, shm)
    shutil.rmtree(run_dir)
    end_calmly(run_dir, shm, 1, calm(1))
    assert first_steps(run_dir) == {1: 1}


@pytest.mark.soak
def test_memory_of_an_older_timeline_is_not_taken(tmp_path: Path, shm: Path, calm: Callable[[int], Path]):
    """Start 1 leaves step 4 on one node; start 2, on another, begins anew and saves step 2; start 3 is on the first."""
    run_dir, other_node = tmp_path / "run", shm / "other"
    other_node.mkdir()
    leave_in_memory(run_dir, shm)
    with Services() as services:
        hook = both(served_by(services), at_step(1, send_self("SIGTERM")))
        assert train(words(run_dir, other_node), 1, hook).exit_code == 75
    assert published(run_dir) == [2]
    end_calmly(run_dir, shm, 1, calm(1))
    assert first_steps(run_dir) == {1: 1, 2: 1, 3: 3}


@pytest.mark.soak
@pytest.mark.ranks
def test_a_rank_that_was_stopped_in_a_save_wakes_up_when_the_next_attempt_is_through(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path]
):
    run_dir, asleep = tmp_path / "run", tmp_path / "asleep"

    def sleep_in_a_save(rank: int) -> None:
        facts = SlotFile.facts

        def sleep(file: SlotFile) -> publish.FileFacts:
            if not asleep.exists():
                asleep.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return facts(file)

        if rank == 1:
            setattr(SlotFile, "facts", sleep)  # noqa: B010

    with Services() as services, Trainer(words(run_dir, shm), 2, both(served_by(services), sleep_in_a_save)) as sleeper:
        wait_for(asleep)
        os.kill(sleeper.pids[0], signal.SIGKILL)
        assert train(words(run_dir, shm), 2, served_by(services)).exit_code == 0
        os.kill(sleeper.pids[1], signal.SIGCONT)
        assert all(code != 0 for code in sleeper.wait().exit_codes)
    assert fingerprint(run_dir, N_STEPS) == fingerprint(calm(2), N_STEPS)
    assert losses(run_dir) == losses(calm(2))
    assert_nothing_published_is_lost(run_dir)
    assert stop(run_dir)["reason"] == "finished"
    assert not list(base(shm).iterdir())


# -- stop ----------------------------------------------------------------------------------------------------------


def stop(run_dir: Path) -> dict[str, object]:
    return orjson.loads((run_dir / "stop.json").read_bytes())


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize(("n_ranks", "step"), [(1, 4), (2, 2)])
def test_a_stop_signal_saves_before_the_exit(
    tmp_path: Path, shm: Path, calm: Callable[[int], Path], n_ranks: int, step: int
):
    """The step is also due: it is saved once."""
    run_dir = tmp_path / "run"
    with Services() as services:
        hook = both(served_by(services), at_step(step - 1, send_self("SIGTERM"), on_rank=n_ranks - 1))
        result = train(words(run_dir, shm), n_ranks, hook)
        assert result.exit_code == 75, result.output
        assert published(run_dir) == [step]
    assert said_published(run_dir).count(step) == 1
    assert stop(run_dir) == {"reason": "signal", "exit_code": 75, "step": step, "signal": "SIGTERM", "unsaved": None}
    end_calmly(run_dir, shm, n_ranks, calm(n_ranks))


def small_chunks() -> None:
    setattr(drain, "CHUNK_BYTES", 1 << 14)  # noqa: B010


@pytest.mark.soak
def test_a_stop_signal_lifts_the_limit_on_bandwidth(tmp_path: Path, shm: Path):
    run_dir = tmp_path / "run"
    with Services(prepare=small_chunks) as services:
        hook = both(served_by(services), at_step(3, send_self("SIGTERM")))
        slow = "checkpoint.bandwidth_gb_per_s=1e-6"  # a kilobyte per second
        assert train(words(run_dir, shm, slow), 1, hook).exit_code == 75
        assert published(run_dir)[-1] == 4


def ends_in(seconds: float) -> Hook:
    def hook(rank: int) -> None:
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + seconds))

    return hook


@pytest.mark.soak
def test_what_does_not_get_to_the_disk_in_time_is_said(tmp_path: Path, shm: Path, calm: Callable[[int], Path]):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    with Services(lambda start: BlockingFiles(WRITE, until=gate)) as services:
        hook = both(served_by(services), ends_in(0), at_step(3, send_self("SIGTERM")))
        result = train(words(run_dir, shm), 1, hook)
        assert result.exit_code == 75, result.output
        assert published(run_dir) == []
        gate.touch()
    assert "checkpoint 4 is in the memory of " in str(stop(run_dir)["unsaved"])
    assert published(run_dir)[-1] == 4  # the service outlives the trainer
    end_calmly(run_dir, shm, 1, calm(1))
    assert first_steps(run_dir) == {1: 1, 2: 5}


@pytest.mark.soak
def test_a_disk_that_is_full_at_the_end_is_one_sentence(tmp_path: Path, shm: Path, calm: Callable[[int], Path]):
    run_dir = tmp_path / "run"

    def full(start: int) -> Files:
        return FaultyFiles(1, lasting=True, operations=("mkdir",))

    with Services(full) as services:
        result = train(words(run_dir, shm), 1, served_by(services))
        assert result.exit_code == 1
        services.kill()
    assert "the disk is full at" in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert stop(run_dir)["reason"] == "error"
    end_calmly(run_dir, shm, 1, calm(1))
    assert first_steps(run_dir) == {1: 1}
