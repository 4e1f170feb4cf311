"""The command line of the preparation: same options as ever, memory kept, kill -9 from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

SCRIPT = ["setup/download_prepare_hf_data.py"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(arguments: list[str]) -> tuple[int, str, str]:
    process = start(arguments)
    out, error = process.communicate()
    return process.returncode, out, error


def options(folder: Path) -> list[str]:
    return ["--data_dir", str(folder / "data"), "--tmp_dir", str(folder / "tmp"), "--nchunks", "4"]


@pytest.mark.soak
def test_memory_is_kept_and_a_kill_from_outside_costs_nothing(tmp_path: Path) -> None:
    """256 MB of text with 0.2 GB of memory, killed while it writes the chunks."""
    source = tmp_path / "source"
    source.mkdir()
    lines = [orjson.dumps({"text": f"{n} " + "word " * (n % 1000)}) for n in range(20_000)]
    for number in range(5):
        (source / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    arguments = ["big", "0.2", "--source", str(source), "--json"]
    process = start([*arguments, *options(tmp_path / "killed")])
    assert process.stderr
    for line in process.stderr:
        if "write: " in line and "%" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out = tmp_path / "killed/data/big_shuffled"
    assert list(out.glob("*.chunk.*.jsonl"))
    results = []
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        code, printed, error = finish([*arguments, *options(folder)])
        assert code == 0, error
        results.append(json.loads(printed))
    again, whole = results
    assert again["files"] == whole["files"]
    assert whole["documents"] == 100_000
    assert whole["peak_rss_bytes"] <= 200_000_000
    assert list(again["seconds"]) == ["sort", "write"]


def test_wrong_requests_end_with_one_sentence(tmp_path: Path) -> None:
    code, out, error = finish(["nothing_known", "1", *options(tmp_path)])
    assert (code, out) == (2, "")
    assert error.startswith("error: no data set 'nothing_known'; there are cosmopedia_v2, dclm_baseline_1.0,")
    assert error.count("\n") == 1


def test_the_old_command_line_is_understood(tmp_path: Path) -> None:
    source = tmp_path / "my texts\n"
    source.mkdir()
    (source / "x.jsonl").write_bytes(b'{"text":"a"}\n{"text":"b"}\n{"text":"c"}')
    final = tmp_path / "final"
    arguments = ["mine", "999", f"--tmp_dir={tmp_path}/t", f"--data_dir={tmp_path}/d", "--seed=42", "--nchunks=8"]
    arguments += [f"--final_data_dir={final}", "--clear_work_dir_after_transfer_to_final", "--source", str(source)]
    code, out, error = finish(arguments)
    assert code == 0, error
    assert out == f"3 documents in {final / 'mine_shuffled'}\n"
    assert "3 documents fill 2 chunks, not 8" in error
    assert os.listdir(tmp_path / "d") == []


@pytest.mark.parametrize(
    "words", [["nan"], ["inf"], ["-1"], ["1", "--seed", "9" * 20], ["1", "--workers", "0"], ["1", "--nchunks", "-1"]]
)
def test_a_number_out_of_range_is_named_before_anything_is_touched(tmp_path: Path, words: list[str]) -> None:
    process = start(["x", *words, "--source", str(tmp_path), "--data_dir", str(tmp_path / "data")])
    assert f"{words[-1]} is not between" in process.communicate()[1]
    assert process.returncode == 2
    assert not (tmp_path / "data").exists()
