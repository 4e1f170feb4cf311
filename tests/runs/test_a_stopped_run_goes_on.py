"""A stop signal on any rank ends all ranks after the same step, with a checkpoint; the run goes on from it bitwise."""

from pathlib import Path

import orjson
import pytest

from tests.trainer import TINY, at_step, fingerprint, losses, published, send_self, train

WORDS = [*TINY, "steps=10"]


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 75), ("SIGUSR2", 75), ("SIGINT", 130)])
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


def test_a_second_interrupt_leaves_at_once(tmp_path: Path):
    def twice() -> None:
        send_self("SIGINT")()
        send_self("SIGINT")()

    assert train([*WORDS, f"dump_dir={tmp_path}"], hook=at_step(4, twice)).exit_codes == [-2]
    assert published(tmp_path) == []


def test_signals_are_configurable(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "stop_signals=[SIGHUP]"]
    assert train(words, hook=at_step(2, send_self("SIGHUP"))).exit_code == 75


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
