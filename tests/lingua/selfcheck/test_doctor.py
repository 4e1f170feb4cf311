"""Judgements on a machine, from facts alone; and one look at this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lingua.selfcheck.doctor import (
    Finding,
    examine,
    judge_disk,
    judge_gpus,
    judge_kernels,
    judge_memory,
    judge_shm,
    judge_slurm,
    judge_torch,
    mounted_as,
    table,
)
from lingua.slurm import cluster_config

GIB = 2**30


@pytest.mark.parametrize(
    ("finding", "level", "said"),
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
        (judge_memory(None, 0), "ok", "no limit"),
        (judge_memory(64 * GIB, GIB), "ok", "1.0 GiB used of 64.0 GiB"),
        (judge_disk(Path("out"), "nfs4", 9 * GIB, 0.1, None), "ok", "9.0 GiB free"),
        (judge_disk(Path("out"), "lustre", 9 * GIB, 9.0, None), "note", "async_save_mode=shm"),
        (judge_disk(Path("out"), "ext4", 9 * GIB, 0.1, None), "note", "not shared"),
        (judge_disk(Path("out"), "nfs", 0, 0.1, "out: Disk quota exceeded"), "wrong", "quota"),
        (
            judge_kernels({"sdpa": None, "sdpa_flash": None, "flex": "CUDA only"}, {"sdpa": None, "sdpa_flash": "no"}),
            "ok",
            "sdpa, sdpa_flash; with data.doc_mask: sdpa ",
        ),
        (judge_slurm({})[0], "note", "not here"),
    ],
)
def test_judgements(finding: Finding, level: str, said: str):
    assert finding.level == level
    assert said in f"{finding.says} {finding.remedy}"
    assert (finding.level != "wrong") or finding.remedy, "what is wrong needs a remedy"


CONFIG = """\
Configuration data as of 2026-01-01T00:00:00
ClusterName             = night
JobRequeue              = 0
JobContainerType        = job_container/tmpfs
KillWait                = 30 sec
PreemptMode             = REQUEUE
ProctrackType           = proctrack/linuxproc
SLURM_VERSION           = 22.05.8
"""


def test_what_a_clusters_settings_mean_for_a_run():
    def ask(words: Sequence[str]) -> str:
        assert list(words) == ["scontrol", "show", "config"]
        return CONFIG

    config = cluster_config(ask)
    found = {finding.part: finding for finding in judge_slurm(config)}
    assert found["slurm"].says == "22.05.8, cluster night"
    assert found["preemption"].says == "REQUEUE; 30 sec from SIGTERM to SIGKILL at the time limit"
    assert {part for part, finding in found.items() if finding.level == "note"} == {
        "requeue",
        "job container",
        "processes",
    }
    good = {"ClusterName": "c", "PreemptMode": "REQUEUE", "JobRequeue": "1", "ProctrackType": "proctrack/cgroup"}
    assert [finding.level for finding in judge_slurm(good)] == ["ok", "ok"]
    assert judge_slurm({**good, "PreemptMode": "CANCEL"})[1].level == "note"


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
    findings = examine(tmp_path / "out")
    parts = [finding.part for finding in findings]
    assert parts[:8] == ["python", "torch", "cuda", "xformers", "attention", "ranks", "compiler", "/dev/shm"]
    assert "sdpa" in next(finding.says for finding in findings if finding.part == "attention")
    assert "gloo" in next(finding.says for finding in findings if finding.part == "ranks")
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_remedies_below_what_they_mend():
    assert table([Finding("a", "ok", "fine"), Finding("long", "wrong", "bad", "mend it")]) == [
        "ok     a     fine",
        "wrong  long  bad",
        "             -> mend it",
    ]
