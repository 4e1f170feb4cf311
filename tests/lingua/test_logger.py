import logging
from pathlib import Path

import pytest

from lingua.logger import log_to_folder, start_logging, wrapped


@pytest.fixture(autouse=True)
def restore_logging():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_each_rank_has_a_file_and_rank_0_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for rank in (0, 3):
        start_logging(rank)
        handler = log_to_folder(tmp_path, rank)
        logging.getLogger("lingua.test").info("hello from %d", rank)
        logging.getLogger().removeHandler(handler)
        handler.close()
    shown = capsys.readouterr().err
    assert "hello from 0" in shown
    assert "hello from 3" not in shown
    assert "hello from 0" in (tmp_path / "train.log").read_text()
    assert "3: hello from 3" in (tmp_path / "logs" / "rank_00003.log").read_text()


def test_a_full_disk_under_the_log_is_said_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "train.log").symlink_to("/dev/full")
    start_logging(0)
    handler = log_to_folder(tmp_path, 0)
    for _ in range(3):
        logging.getLogger("lingua.test").info("line")
    logging.getLogger().removeHandler(handler)
    handler.close()
    assert capsys.readouterr().err.count("the run continues without it") == 1


def test_a_sample_of_a_model_that_learnt_escapes_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start_logging(0)
    handler = log_to_folder(tmp_path, 0)
    logging.getLogger("lingua.test").info("a sample: %s", "x\x1b[2Jy\n\tz")
    logging.getLogger().removeHandler(handler)
    handler.close()
    for text in (capsys.readouterr().err, (tmp_path / "train.log").read_text()):
        assert text.endswith("a sample: x\\x1b[2Jy\n\tz\n")


def test_a_terminal_gets_short_lines_that_break_between_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lingua.logger.on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    start_logging(0)
    logging.getLogger("lingua.test").warning("one two three four five six seven eight nine ten")
    shown = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in shown] == ["warning: one two three four", "five six seven eight nine ten"]
    assert wrapped("step 3: a/nll 1.25  a/bpb 2.5", 25) == "step 3: a/nll 1.25\n         a/bpb 2.5"
    command = "    lingua train a_very_long_path/to/a/config.yaml"
    assert wrapped(f"next:\n{command}", 20) == f"next:\n{command}"
