"""A stop signal on any rank ends all ranks after the same step, with a checkpoint; the run goes on from it bitwise."""

import errno
import fcntl
import os
import termios
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

import lingua.train.build
from lingua.checkpoint.manager import CheckpointManager
from lingua.config.keys.data import TokenizerArgs
from lingua.files import Files
from lingua.launch.requeue import Outcome, judge
from lingua.run.metrics import read_metrics
from lingua.tokenizer import Tokenizer
from lingua.train import validate
from tests.fakes import FaultyFiles
from tests.services import both
from tests.trainer import TINY, Hook, at_step, fingerprint, losses, published, send_self, train

WORDS = [*TINY, "steps=10"]


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("SIGTERM", 75),
        pytest.param("SIGUSR2", 75, marks=pytest.mark.soak),
        pytest.param("SIGINT", 130, marks=pytest.mark.soak),
    ],
)
def test_a_signal_saves_and_says_so(tmp_path: Path, name: str, exit_code: int):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    result = train(words, hook=at_step(4, send_self(name)))
    assert result.exit_code == exit_code, result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert stop["reason"] == "signal"
    assert stop["signal"] == name
    assert "asked to stop" in result.output
    assert stop["exit_code"] == exit_code
    assert published(tmp_path) == [stop["step"]]
    assert 4 <= stop["step"] <= 6  # heard one step later

    assert train(words).exit_code == 0
    assert orjson.loads((tmp_path / "stop.json").read_bytes())["reason"] == "finished"
    calm = tmp_path / "calm"
    assert train([*WORDS, f"dump_dir={calm}"]).exit_code == 0
    assert fingerprint(tmp_path, 10) == fingerprint(calm, 10)


def on_disk(files: Files) -> Hook:
    """Hook: checkpoints go to this disk, and pauses between two tries cost no time."""

    def hook(rank: int) -> None:
        manager = partial(CheckpointManager, files=files, sleep=lambda seconds: None)
        setattr(lingua.train.build, "CheckpointManager", manager)  # noqa: B010

    return hook


@pytest.mark.soak
@pytest.mark.ranks
def test_a_signal_to_one_rank_may_save_and_the_run_goes_on(tmp_path: Path):
    """Of two signals before the save, one checkpoint comes; the run trains what it trains undisturbed."""
    words = [*WORDS, "signals.SIGUSR1=save"]

    def two(rank: int) -> None:
        at_step(3, send_self("SIGUSR1"), on_rank=1)(rank)
        at_step(4, send_self("SIGUSR1"), on_rank=0)(rank)

    result = train([*words, f"dump_dir={tmp_path / 'a'}"], n_ranks=2, hook=two)
    assert result.exit_code == 0, result.output
    assert published(tmp_path / "a") == [4, 10]
    assert train([*words, f"dump_dir={tmp_path / 'b'}"], n_ranks=2).exit_code == 0
    assert fingerprint(tmp_path / "a", 10) == fingerprint(tmp_path / "b", 10)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_that_fails_in_the_save_that_a_signal_asks_for_does_not_end_the_run_for_good(
    tmp_path: Path, lasting: bool
):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    disk = FaultyFiles(1, error=errno.EIO, lasting=lasting, operations=("fsync",))
    result = train(words, hook=both(on_disk(disk), at_step(4, send_self("SIGTERM"))))
    assert result.exit_code == (1 if lasting else 75), result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop.get("kind"), stop["exit_code"]) == (("disk", 1) if lasting else (None, 75))
    assert "Input/output error" in result.output
    assert published(tmp_path) == ([] if lasting else [stop["step"]])
    assert judge(Outcome(result.exit_code, stop), max_retries=3).requeue


def test_a_second_interrupt_leaves_at_once(tmp_path: Path):
    def twice() -> None:
        send_self("SIGINT")()
        send_self("SIGINT")()

    assert train([*WORDS, f"dump_dir={tmp_path}"], hook=at_step(4, twice)).exit_codes == [-2]
    assert published(tmp_path) == []


def test_signals_are_configurable(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "stop_signals=[SIGUSR1]"]
    assert train(words, hook=at_step(2, send_self("SIGUSR1"))).exit_code == 75


def test_a_run_whose_terminal_is_closed_saves(tmp_path: Path):
    def hook(rank: int) -> None:
        """Lead a session on a terminal of our own, with a bar, and close that at step 2."""
        os.setsid()
        outside, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
        os.dup2(inside, 2)
        os.close(inside)
        os.environ["TERM"] = "xterm"
        at_step(2, lambda: os.close(outside))(rank)

    result = train([*WORDS, f"dump_dir={tmp_path}"], hook=hook)
    assert result.exit_code == 75, result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["signal"], published(tmp_path)) == ("SIGHUP", [stop["step"]])


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_is_asked_and_both_leave_after_the_same_step(tmp_path: Path, asked: int):
    words = [*WORDS, f"dump_dir={tmp_path}", "data.load_async=true"]
    result = train(words, n_ranks=2, hook=at_step(3, send_self("SIGTERM"), on_rank=asked))
    assert result.exit_code == 75, result.output
    (step,) = published(tmp_path)
    assert step in (3, 4, 5)
    assert max(losses(tmp_path)) == step
    assert train(words, n_ranks=2).exit_code == 0
    calm = tmp_path / "calm"
    assert train([*WORDS, f"dump_dir={calm}"], n_ranks=2).exit_code == 0
    assert fingerprint(tmp_path, 10) == fingerprint(calm, 10)


def test_a_signal_after_the_last_step_changes_nothing(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path}"], hook=at_step(10, send_self("SIGTERM")))
    assert result.exit_code == 0, result.output
    assert published(tmp_path) == [10]


def ask_while_building(rank_asked: int, name: str = "SIGTERM") -> Hook:
    """Hook: one rank gets a signal while it builds its tokenizer, which then takes for ever."""

    def hook(rank: int) -> None:
        build = lingua.train.build.build_tokenizer

        def build_slowly(args: TokenizerArgs) -> Tokenizer:
            if rank == rank_asked:
                send_self(name)()
                threading.Event().wait()
            return build(args)

        setattr(lingua.train.build, "build_tokenizer", build_slowly)  # noqa: B010

    return hook


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 75), pytest.param("SIGINT", 130, marks=pytest.mark.soak)])
def test_a_start_is_left_at_once(tmp_path: Path, name: str, exit_code: int):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    result = train(words, hook=ask_while_building(0, name))
    assert result.exit_code == exit_code, result.output
    assert "nothing is lost" in result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["reason"], stop["signal"], stop["exit_code"]) == ("signal", name, exit_code)
    assert orjson.loads((tmp_path / "incarnations" / "0000000001.json").read_bytes())["released"]
    assert train(words).exit_code == 0


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("asked", [0, 1])
def test_a_start_is_left_by_all_ranks_while_they_wait_for_each_other(tmp_path: Path, asked: int):
    words = [*WORDS, f"dump_dir={tmp_path}", "distributed.timeout_s=300"]
    result = train(words, n_ranks=2, hook=ask_while_building(asked))
    assert result.exit_code == 75, result.output
    assert orjson.loads((tmp_path / "stop.json").read_bytes())["exit_code"] == 75
    assert train(words, n_ranks=2).exit_code == 0


@pytest.mark.soak
@pytest.mark.ranks
def test_validation_is_left_by_all_ranks_and_made_up_for(tmp_path: Path):
    """One rank is asked after the first of many batches; the next start begins with that validation."""

    def hook(rank: int) -> None:
        shares = validate.equal_shares

        def ask_after_one(*args: Any) -> Iterator[Any]:
            for number, batch in enumerate(shares(*args)):
                if number == 1 and rank == 1:
                    send_self("SIGTERM")()
                assert number < 4, "validation went on"
                yield batch

        setattr(validate, "equal_shares", ask_after_one)  # noqa: B010

    words = [*WORDS, f"dump_dir={tmp_path}", "validation.every=5", "validation.max_rows=64"]
    result = train(words, n_ranks=2, hook=hook)
    assert result.exit_code == 75, result.output
    assert published(tmp_path) == [5]
    assert not (tmp_path / "metrics.validation.jsonl").exists()
    assert train(words, n_ranks=2).exit_code == 0
    assert [record["global_step"] for record in read_metrics(tmp_path / "metrics.validation.jsonl")] == [5]
