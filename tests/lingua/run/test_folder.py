import errno
import os
import subprocess
from pathlib import Path

import orjson
import pytest

from lingua.run import folder
from lingua.run.folder import (
    archive_exit_records,
    describe_start,
    describe_stop,
    public_environment,
    reserve_last_words,
)


def test_secrets_never_reach_a_file():
    env = {
        "WANDB_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "UV_INDEX_PRIVATE_PASSWORD": "s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "MY_OWN_THING": "s3cret",
        "UV_INDEX_URL": "https://me:s3cret@example.org/simple",
        "SLURM_JOB_ID": "7",
    }
    shown = public_environment(env)
    assert "s3cret" not in str(shown)
    assert shown["SLURM_JOB_ID"] == "7"
    assert shown["WANDB_API_KEY"] == "***"
    assert shown["UV_INDEX_URL"] == "https://***@example.org/simple"


def test_run_sh_repeats_the_command_whatever_it_holds(tmp_path: Path):
    describe_start(tmp_path, ["-c", "import sys; print(sys.argv[1])", "a'; echo foo\nbar"], env={})
    result = subprocess.run(["bash", str(tmp_path / "run.sh")], capture_output=True, text=True, check=True)
    assert result.stdout == "a'; echo foo\nbar\n"


def test_stop_json_repeats_the_exit_code(tmp_path: Path):
    describe_stop(tmp_path, "signal", 75, step=12, signal="SIGTERM")
    record = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert record == {"reason": "signal", "step": 12, "exit_code": 75, "signal": "SIGTERM"}


def test_what_a_start_said_last_is_numbered_by_the_next(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    said = {"stop.json": "1", "logs/error_0.json": "2", "logs/error_12.json": "3", "logs/stacks_0.txt": "4"}
    kept = {"logs/rank_00001.log": "5", "logs/error_0.0001.json": "6"}
    for name, text in (said | kept).items():
        (tmp_path / name).write_text(text)
    archive_exit_records(tmp_path, 2)
    there = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert there == kept | {
        "logs/stop.0002.json": "1",
        "logs/error_0.0002.json": "2",
        "logs/error_12.0002.json": "3",
        "logs/stacks_0.0002.txt": "4",
    }
    archive_exit_records(tmp_path / "new", 0)  # the first start: nothing is there


def test_a_full_disk_does_not_keep_a_run_from_saying_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    reserve_last_words(tmp_path)
    reserve_last_words(tmp_path)  # the next start finds the room that the last one did not need
    monkeypatch.setattr(folder, "write_whole", full)
    describe_stop(tmp_path, "error", 1, kind="disk_full", error="the disk is full " + "x" * 100_000, step=3)
    told = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (told["reason"], told["exit_code"], told["kind"], told["step"]) == ("error", 1, "disk_full", 3)
    assert told["error"].startswith("the disk is full x")
    assert [path.name for path in tmp_path.iterdir()] == ["stop.json"]
