"""Whether it will fit: the numbers, before step 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.checkpoint.capacity import RESERVE_BYTES, DiskRoom, MemoryRoom, memory_limit, private_shm, read_cgroup

GB = 10**9
ROOT = Path("run/checkpoints")
NO_LIMIT_V1 = "9223372036854771712\n"


# -- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "held", "at_once", "budget", "expected"),
    [
        (30, 0, 3, None, None),
        (29, 0, 3, None, "has 27.0 GiB free and 0 B in checkpoints"),
        (10, 20, 3, None, None),  # what is published already gives way
        (9, 20, 3, None, "checkpoints take 3 x 9.3 GiB = 27.9 GiB"),
        (100, 0, 3, 30, None),
        (100, 0, 3, 29, "but checkpoint.disk_budget_gb allows 27.0 GiB"),
        (10, 0, None, None, None),  # all are kept: one has to fit
        (9, 0, None, None, "has 8.4 GiB free"),
        (9, 0, None, 5, "disk_budget_gb allows"),
    ],
)
def test_disk(free: int, held: int, at_once: int | None, budget: int | None, expected: str | None) -> None:
    room = DiskRoom(free * GB, held * GB, 10 * GB, at_once, None if budget is None else budget * GB)
    problem = room.problem(ROOT)
    if expected is None:
        assert problem is None
    else:
        assert problem is not None
        assert expected in problem
        assert "lower checkpoint.dump.keep" in problem


def test_all_checkpoints_are_kept() -> None:
    assert DiskRoom(35 * GB, 0, 10 * GB, None).warning(ROOT, ["checkpoint.eval"]) == (
        "all checkpoints of checkpoint.eval are kept; run/checkpoints has room for 3 of them"
    )
    assert DiskRoom(35 * GB, 0, 10 * GB, 2).warning(ROOT, []) is None
    assert DiskRoom(35 * GB, 0, 0, None).warning(ROOT, ["checkpoint.eval"]) is None


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shm_free", "limit", "used", "wanted", "expected"),
    [
        (100, None, 0, 2, 2),
        (25, None, 0, 3, 2),
        (20, None, 0, 2, 1),  # the reserve
        (10, None, 0, 2, 0),
        (0, None, 0, 2, 0),
        (100, 64, 40, 2, 2),
        (100, 64, 45, 2, 1),
        (100, 64, 60, 2, 0),
        (100, 64, 70, 2, 0),  # above the limit already
        (5, 64, 0, 2, 0),
    ],
)
def test_slots_that_fit(shm_free: int, limit: int | None, used: int, wanted: int, expected: int) -> None:
    room = MemoryRoom(shm_free * GB, None if limit is None else limit * GB, used * GB, 10 * GB)
    assert room.slots(wanted) == expected


def test_the_reserve_is_left_alone() -> None:
    assert MemoryRoom(RESERVE_BYTES + 10, None, 0, 10).slots(1) == 1
    assert MemoryRoom(RESERVE_BYTES + 9, None, 0, 10).slots(1) == 0
    assert MemoryRoom(1 << 40, RESERVE_BYTES + 12, 2, 10).slots(1) == 1
    assert MemoryRoom(1 << 40, RESERVE_BYTES + 12, 3, 10).slots(1) == 0


def test_sentences() -> None:
    assert MemoryRoom(5 << 30, None, 0, 3 << 30).sentence(2) == (
        "2 slots take 2 x 3.0 GiB of this node's memory; /dev/shm has 5.0 GiB free"
    )
    assert (
        MemoryRoom(5 << 30, 8 << 30, 1 << 30, 3 << 30)
        .sentence(2)
        .endswith("5.0 GiB free, the job's memory limit 8.0 GiB with 1.0 GiB in use")
    )


@pytest.mark.parametrize(
    ("proc_cgroup", "tree", "expected"),
    [
        ("", {}, (None, 0)),
        ("0::/\n", {}, (None, 0)),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "100\n", "a/memory.current": "30\n"}, (100, 30)),
        ("0::/\n", {"memory.max": "50\n", "memory.current": "20\n"}, (50, 20)),  # in a container
        (  # the one with the least left counts, not the smallest
            "0::/job/step\n",
            {
                "job/memory.max": "100",
                "job/memory.current": "95",
                "job/step/memory.max": "50",
                "job/step/memory.current": "10",
            },
            (100, 95),
        ),
        (  # files that were read do not take memory from a slot
            "0::/job\n",
            {
                "job/memory.max": "100",
                "job/memory.current": "95",
                "job/memory.stat": "anon 10\nfile 85\ninactive_file 60\nactive_file 20\nshmem 5\n",
            },
            (100, 35),
        ),
        (
            "5:cpu:/x\n4:memory:/slurm/job\n0::/\n",
            {
                "memory/slurm/job/memory.limit_in_bytes": "70\n",
                "memory/slurm/job/memory.usage_in_bytes": "40\n",
                "memory/slurm/job/memory.stat": "inactive_file 1\ntotal_inactive_file 10\n",
                "memory/memory.limit_in_bytes": NO_LIMIT_V1,
            },
            (70, 30),
        ),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": NO_LIMIT_V1}, (None, 0)),
    ],
)
def test_memory_limit(proc_cgroup: str, tree: dict[str, str], expected: tuple[int | None, int]) -> None:
    assert memory_limit(proc_cgroup, tree.get) == expected


def test_memory_limit_of_this_very_process() -> None:
    limit, used = memory_limit(Path("/proc/self/cgroup").read_text())
    assert used >= 0
    assert limit is None or limit > 0
    assert read_cgroup("no/such/file") is None


# -- what kind of /dev/shm -----------------------------------------------------------------------------------------

HOST = "22 1 0:21 / /dev/shm rw,nosuid - tmpfs tmpfs rw"
OF_THE_JOB = "99 1 0:77 / /dev/shm rw - tmpfs tmpfs rw"
BOUND = "99 1 8:1 /local/job_123/.shm /dev/shm rw - ext4 /dev/sda1 rw"


@pytest.mark.parametrize(
    ("mounts", "of_init", "env", "expected"),
    [
        (HOST, HOST, {}, None),
        (HOST, None, {}, None),  # process 1 belongs to root
        (f"{HOST}\n{OF_THE_JOB}", HOST, {}, "it is a mount of this job's own"),
        (f"{HOST}\n{BOUND}", None, {}, "it is /local/job_123/.shm of another file system"),
        (HOST, None, {"APPTAINER_CONTAINER": "/x.sif"}, "this is a container"),
        (HOST, None, {"container": ""}, None),
        ("", None, {}, None),
        ("garbage\n", "more", {}, None),
    ],
)
def test_private_shm(mounts: str, of_init: str | None, env: dict[str, str], expected: str | None) -> None:
    why = private_shm(mounts, of_init, env)
    assert why is None if expected is None else why is not None
    assert expected is None or expected in (why or "")


def test_private_shm_at_another_place() -> None:
    mounts = HOST + "\n" + OF_THE_JOB.replace("/dev/shm", "/fast")
    assert private_shm(mounts, HOST, {}, "/fast") is None
    assert private_shm(mounts, HOST + "\n" + HOST.replace("/dev/shm", "/fast"), {}, "/fast") is not None
