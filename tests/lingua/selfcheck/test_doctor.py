"""Judgements on a machine, from facts alone; and one look at this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.selfcheck.doctor import (
    Diagnosis,
    examine,
    judge_disk,
    judge_gpus,
    judge_kernels,
    judge_shm,
    judge_torch,
    mounted_as,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("row", "level", "text"),
    [
        (judge_torch("2.10.0+cu128", (3, 11))[0], "ok", "3.11"),
        (judge_torch("2.10.0+cu128", (3, 10))[0], "wrong", "3.10"),
        (judge_torch("2.11.0", (3, 12))[1], "ok", "2.11.0"),
        (judge_torch("2.4.1", (3, 12))[1], "wrong", "uv sync"),
        (judge_gpus(["H200", "H200", "L4"], "12.8", True), "ok", "2 x H200, 1 x L4; torch is built for CUDA 12.8"),
        (judge_gpus([], "12.8", False), "note", "no GPU here"),
        (judge_gpus([], "12.8", True), "wrong", "nvidia-smi"),
        (judge_gpus([], None, True), "wrong", "without CUDA"),
        (judge_shm("tmpfs", 100 * GIB, 90 * GIB, None), "ok", "90.0 GiB of 100.0 GiB free"),
        (judge_shm("tmpfs", GIB // 16, GIB // 16, None), "wrong", "--shm-size"),
        (judge_shm("ext4", 100 * GIB, 90 * GIB, None), "wrong", "async_save_mode=null"),
        (judge_shm(None, 0, 0, None), "wrong", "no file system"),
        (judge_shm("tmpfs", 100 * GIB, 90 * GIB, "this is a container"), "note", "this is a container"),
        (judge_disk(Path("out"), "nfs4", 9 * GIB, 0.1, None), "ok", "9.0 GiB free"),
        (judge_disk(Path("out"), "lustre", 9 * GIB, 9.0, None), "note", "async_save_mode=shm"),
        (judge_disk(Path("out"), "ext4", 9 * GIB, 0.1, None), "note", "not shared"),
        (judge_disk(Path("out"), "nfs", 0, 0.1, "out: Disk quota exceeded"), "wrong", "quota"),
        (
            judge_kernels({"sdpa": None, "sdpa_flash": None, "flex": "CUDA only"}, {"sdpa": None, "sdpa_flash": "no"}),
            "ok",
            "sdpa, sdpa_flash; with data.doc_mask: sdpa ",
        ),
    ],
)
def test_judgements(row: Diagnosis, level: str, text: str):
    assert row.level == level
    assert text in f"{row.says} {row.remedy}"
    assert row.level != "wrong" or row.remedy, "what is wrong needs a remedy"


MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/a\\040b tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"), [("/etc", "ext4"), ("/home/x/out", "nfs4"), ("/homes", "ext4"), ("/home/a b/c", "tmpfs")]
)
def test_the_file_system_of_a_path(path: str, kind: str):
    assert mounted_as(Path(path), MOUNTS) == kind


def test_this_machine(tmp_path: Path):
    rows = {row.part: row for row in examine(tmp_path / "out")}
    parts = ["python", "torch", "cuda", "xformers", "attention", "ranks", "compiler", "/dev/shm", "memory"]
    assert list(rows)[:9] == parts
    assert "sdpa" in rows["attention"].says
    assert "gloo" in rows["ranks"].says
    assert list(tmp_path.iterdir()) == []
