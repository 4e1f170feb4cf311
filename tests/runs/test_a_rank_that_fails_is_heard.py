"""A rank that fails or hangs, wherever it is, takes the others along soon; each says what it knows."""

import itertools
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest

import apps.main.loop
import lingua.run.watchdog
from lingua.checkpoint.shm.slot_writer import SlotWriter
from lingua.data.blocked_source import DataError
from lingua.data.loader import Batch, Loader
from lingua.run.watchdog import Watchdog
from tests.trainer import TINY, Hook, at_step, kill_self, published, train

WORDS = [*TINY, "steps=12", "checkpoint.dump.every=2", "distributed.timeout_s=300"]


def fail_loading(at_batch: int, error: Exception, on_rank: int) -> Hook:
    """Hook: on one rank, batch number `at_batch` (from 1) cannot be had."""

    def hook(rank: int) -> None:
        next_batch, count = Loader.__next__, itertools.count(1)

        def failing(self: Loader) -> Batch:
            if next(count) == at_batch:
                raise error
            return next_batch(self)

        if rank == on_rank:
            setattr(Loader, "__next__", failing)  # noqa: B010

    return hook


def quickly(hook: Hook) -> Hook:
    """The hook, in a process that does not wait long for ranks that are gone."""

    def impatient(rank: int) -> None:
        for name in ("ECHO_S", "LAST_WORDS_S"):
            setattr(lingua.run.watchdog, name, 1.0)
        hook(rank)

    return impatient


def last_words(run_dir: Path, rank: int) -> dict[str, Any]:
    return orjson.loads((run_dir / "logs" / f"error_{rank}.json").read_bytes())


def test_alone(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path}"], hook=fail_loading(4, DataError("x.jsonl line 7: no text"), 0))
    assert result.exit_code == 1
    assert "error: x.jsonl line 7: no text" in result.output
    facts = last_words(tmp_path, 0)
    assert (facts["kind"], facts["step"], facts["rank"], facts["incarnation"]) == ("data", 3, 0, 1)
    assert facts["restart_may_help"] is False
    assert "in failing" in facts["traceback"]
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["reason"], stop["kind"], stop["rank"], stop["step"], stop["exit_code"]) == ("error", "data", 0, 3, 1)

    assert train([*WORDS, f"dump_dir={tmp_path}"]).exit_code == 0  # and the next start numbers these words
    assert not (tmp_path / "logs" / "error_0.json").exists()
    assert orjson.loads((tmp_path / "logs" / "error_0.0001.json").read_bytes()) == facts
    assert orjson.loads((tmp_path / "logs" / "stop.0001.json").read_bytes()) == stop


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.gate), 2])
def test_the_others_leave_soon_with_a_sentence_of_their_own(tmp_path: Path, failing: int):
    """Nobody waits for the collective to time out: that would take 300 s, and a test may take 120."""
    hook = fail_loading(4, DataError("x.jsonl line 7: no text"), failing)
    result = train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=3, hook=hook)
    assert result.exit_codes == [1, 1, 1], result.output
    for rank in range(3):
        facts = last_words(tmp_path, rank)
        assert (facts["kind"], facts["rank"]) == ("data", rank)
        assert "x.jsonl line 7: no text" in facts["message"]
        assert facts["because_of_rank"] == (None if rank == failing else failing)
        if rank != failing:
            assert f"rank {failing} failed, so rank {rank} leaves" in result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["reason"], stop["kind"], stop["rank"], stop["step"]) == ("error", "data", failing, 3)
    assert train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=3).exit_code == 0  # the lock was given back


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.gate)])
def test_a_bug_in_a_thread_that_stages_ends_all(tmp_path: Path, failing: int):
    def hook(rank: int) -> None:
        def bug(*_: object) -> None:
            raise NameError("name 'oops' is not defined")

        if rank == failing:
            setattr(SlotWriter, "_write_small", bug)  # noqa: B010

    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.async_save_mode=shm", "checkpoint.linger_s=0"]
    result = train(words, n_ranks=2, hook=hook)
    assert result.exit_codes == [1, 1], result.output
    assert "in bug" in last_words(tmp_path, failing)["traceback"]
    assert "NameError: name 'oops' is not defined" in last_words(tmp_path, 1 - failing)["message"]
    assert (tmp_path / "stop.json").exists()
    assert published(tmp_path) == []


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_gone_without_a_word(tmp_path: Path, killed: int):
    result = train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=2, hook=quickly(at_step(5, kill_self, on_rank=killed)))
    left = 1 - killed
    assert result.exit_codes[killed] == -9
    assert result.exit_codes[left] == 1
    facts = last_words(tmp_path, left)
    assert facts["kind"] == "nccl"
    assert facts["restart_may_help"] is True
    assert "lost" in facts["message"] or "gone" in facts["message"]
    assert train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=2).exit_code == 0


@pytest.mark.gate
@pytest.mark.soak
@pytest.mark.ranks
def test_a_killed_rank_is_noticed_where_no_collective_tells(tmp_path: Path):
    """As under NCCL: the main threads of the others wait for ever."""

    def hook(rank: int) -> None:
        at_step(5, kill_self if rank == 1 else threading.Event().wait, on_rank=rank)(rank)

    result = train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=3, hook=hook)
    assert result.exit_codes == [1, -9, 1], result.output
    for rank in (0, 2):
        facts = last_words(tmp_path, rank)
        assert (facts["kind"], facts["because_of_rank"], facts["restart_may_help"]) == ("nccl", 1, True)
        assert "rank 1 is gone without a word" in facts["message"]
    assert train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=3).exit_code == 0


WATCHDOG = ["watchdog.min_s=6", "watchdog.step_factor=5", "watchdog.other_s=100", "steps=20"]


@pytest.mark.soak
@pytest.mark.ranks
def test_a_rank_that_hangs_is_ended_with_the_stacks_of_all(tmp_path: Path):
    def hang_here() -> None:
        threading.Event().wait()

    words = [*WORDS, *WATCHDOG, f"dump_dir={tmp_path}"]
    result = train(words, n_ranks=2, hook=quickly(at_step(12, hang_here, on_rank=1)))
    assert result.exit_codes == [76, 76], result.output
    for rank in range(2):
        assert last_words(tmp_path, rank)["kind"] == "hang"
    stacks = [(tmp_path / "logs" / f"stacks_{rank}.txt").read_text() for rank in range(2)]
    assert "hang_here" in stacks[1]
    assert "hang_here" not in stacks[0]
    assert "in train" in stacks[0]
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["reason"], stop["kind"], stop["exit_code"]) == ("error", "hang", 76)
    assert max(published(tmp_path)) == 10
    assert train(words, n_ranks=2).exit_code == 0


@pytest.mark.parametrize(("validation_s", "exit_code"), [(90.0, 0), (110.0, 76)])
def test_a_slow_validation_is_no_hang_but_an_endless_one_is(tmp_path: Path, validation_s: float, exit_code: int):
    def hook(rank: int) -> None:
        validate = apps.main.loop.validate

        def slowly(run: Any, watchdog: Watchdog) -> Any:
            now = watchdog.heartbeat.now
            watchdog.heartbeat.now = lambda: now() + validation_s  # so much time passes, and the guard looks
            watchdog.look()
            return validate(run, watchdog)

        setattr(apps.main.loop, "validate", slowly)  # noqa: B010

    words = [*WORDS, *WATCHDOG, f"dump_dir={tmp_path}", "validation.every=10"]
    result = train(words, hook=hook)
    assert result.exit_code == exit_code, result.output


def test_what_hangs_in_cleaning_up_is_left_behind(tmp_path: Path):
    def hook(rank: int) -> None:
        setattr(lingua.run.watchdog, "LEAVE_WITHIN_S", 0.5)  # noqa: B010
        setattr(Loader, "close", lambda self: threading.Event().wait())  # noqa: B010
        fail_loading(4, DataError("no text"), 0)(rank)

    assert train([*WORDS, f"dump_dir={tmp_path}"], hook=hook).exit_code == 1
    assert last_words(tmp_path, 0)["kind"] == "data"
    assert (tmp_path / "stop.json").exists()
