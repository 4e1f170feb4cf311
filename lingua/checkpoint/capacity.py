"""Decide whether checkpoints fit on the disk and in memory, and whether /dev/shm outlives the job. Torch-free.

A file system's free space ignores quotas; `checkpoint.disk_budget_gb` stands in for one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lingua.files import free_bytes, human_bytes

PRIVATE_SHM = "may not outlive this job"
"""Logged if the memory file system is private to this job; `lingua drill` looks for it."""
RESERVE_BYTES = 256 << 20
"""Left free in /dev/shm and below the memory limit for others, such as NCCL's buffers."""


@dataclass(frozen=True)
class DiskRoom:
    """Disk space that a run's checkpoints need, and what is available."""

    free_bytes: int
    held_bytes: int
    """Size of this run's published checkpoints."""
    checkpoint_bytes: int
    at_once: int | None
    """Checkpoints at the worst moment, including the one being written; None if all are kept."""
    budget_bytes: int | None = None

    def problem(self, root: Path) -> str | None:
        """Return why the checkpoints do not fit, in one sentence, or None."""
        wanted = self.checkpoint_bytes * (self.at_once or 1)
        offered = self.free_bytes + self.held_bytes
        size = human_bytes(self.checkpoint_bytes)
        remedy = "lower checkpoint.dump.keep or checkpoint.eval.keep, or choose another disk with checkpoint.path"
        if self.budget_bytes is not None and wanted > self.budget_bytes:
            return (
                f"checkpoints take {self.at_once or 1} x {size} = {human_bytes(wanted)}, but checkpoint.disk_budget_gb "
                f"allows {human_bytes(self.budget_bytes)}; {remedy}"
            )
        if wanted > offered:
            return (
                f"checkpoints take {self.at_once or 1} x {size} = {human_bytes(wanted)}, but {root} has "
                f"{human_bytes(self.free_bytes)} free and {human_bytes(self.held_bytes)} in checkpoints of this run; "
                f"make room, {remedy}"
            )
        return None

    def warning(self, root: Path, kept_for_good: Sequence[str]) -> str | None:
        """Return how many checkpoints fit if all of some periods (their keys) are kept, or None without periods."""
        if not kept_for_good or not self.checkpoint_bytes:
            return None
        n_fit = self.free_bytes // self.checkpoint_bytes
        return f"all checkpoints of {' and '.join(kept_for_good)} are kept; {root} has room for {n_fit} of them"


@dataclass(frozen=True)
class MemoryRoom:
    """A node's memory for slots. Pages of existing slots count as free."""

    shm_free_bytes: int
    limit_bytes: int | None
    """Limit of the job's cgroup, which includes /dev/shm; None if there is none."""
    used_bytes: int
    slot_bytes: int
    """Size of one slot, for all ranks of the node."""
    copy_bytes: int = 0
    """Size of a copy of another node's slot."""

    def slots(self, wanted: int) -> int:
        """Return how many slots fit, at most `wanted`."""
        offered = self.shm_free_bytes - RESERVE_BYTES
        if self.limit_bytes is not None:
            offered = min(offered, self.limit_bytes - self.used_bytes - RESERVE_BYTES)
        return max(0, min(wanted, offered // max(1, self.slot_bytes)))

    def sentence(self, wanted: int) -> str:
        limit = "" if self.limit_bytes is None else f", the job's memory limit {human_bytes(self.limit_bytes)} with "
        limit += "" if self.limit_bytes is None else f"{human_bytes(self.used_bytes)} in use"
        return (
            f"{wanted} slots take {wanted} x {human_bytes(self.slot_bytes)} of this node's memory; /dev/shm has "
            f"{human_bytes(self.shm_free_bytes)} free{limit}"
        )


def why_no_copies(nodes: Sequence[MemoryRoom], n_slots: int, n_nodes: int) -> str | None:
    """Return why the nodes cannot hold a copy of each slot of another node, or None."""
    if n_nodes == 1:
        return "this run has one node"
    rooms = [replace(room, slot_bytes=room.slot_bytes + room.copy_bytes) for room in nodes]
    tightest = min(rooms, key=lambda room: room.slots(n_slots))
    return None if tightest.slots(n_slots) == n_slots else f"with as many copies, {tightest.sentence(n_slots)}"


def room_here(shm: Path, held: Iterable[Path], slot_bytes: int, copy_bytes: int) -> MemoryRoom:
    """Return this node's room on a memory file system; the files in the folders `held` count as free."""
    held_bytes = sum(path.lstat().st_blocks * 512 for folder in held for path in folder.iterdir())
    limit, used = memory_limit(Path("/proc/self/cgroup").read_text())
    return MemoryRoom(free_bytes(shm) + held_bytes, limit, max(0, used - held_bytes), slot_bytes, copy_bytes)


def read_cgroup(name: str) -> str | None:
    """Read a file below /sys/fs/cgroup, or return None if it is missing or unreadable."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text()
    except OSError:
        return None


def memory_limit(proc_cgroup: str, read: Callable[[str], str | None] = read_cgroup) -> tuple[int | None, int]:
    """Return (limit or None, use) of this process's memory cgroup, in bytes.

    `proc_cgroup`: text of /proc/self/cgroup. Version 2 has `memory.max`, version 1 `memory.limit_in_bytes`
    (cgroups(7)); any parent group may set the limit. The kernel counts the page cache as use; the part that it can drop
    (`inactive_file`, cgroup-v2.rst of the kernel) is subtracted here.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for line in proc_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, limit_name, used_name, cached_name = (
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("", "memory.max", "memory.current", "inactive_file")
        )
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = "/".join([*([top] if top else []), *parts[:depth]])
            limit = (read(f"{folder}/{limit_name}".lstrip("/")) or "max").strip()
            if not limit.isdigit() or int(limit) >= 1 << 60:  # version 1 writes "no limit" as a huge number
                continue
            used = int(read(f"{folder}/{used_name}".lstrip("/")) or 0)
            facts = (read(f"{folder}/memory.stat".lstrip("/")) or "").split()
            used -= int(dict(zip(facts[::2], facts[1::2], strict=False)).get(cached_name, 0))
            if tightest[0] is None or int(limit) - used < tightest[0] - tightest[1]:
                tightest = (int(limit), used)
    return tightest


def private_shm(mounts: str, mounts_of_init: str | None, env: Mapping[str, str], shm: str = "/dev/shm") -> str | None:
    """Return in a few words why the content of /dev/shm may not outlive the job, or None.

    `mounts`: text of /proc/self/mountinfo (proc(5)); `mounts_of_init`: that of process 1, if readable.
    """
    ours, theirs = _mount_of(mounts, shm), _mount_of(mounts_of_init or "", shm)
    if ours is not None and theirs is not None and ours != theirs:
        return "it is a mount of this job's own"
    if ours is not None and ours[1] != "/":
        return f"it is {ours[1]} of another file system, as containers and job_container/tmpfs make it"
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "KUBERNETES_SERVICE_HOST", "container"):
        if env.get(name):
            return "this is a container"
    return None


def private_shm_here(shm: str = "/dev/shm") -> str | None:
    """Return `private_shm` of this process."""
    try:
        of_init = Path("/proc/1/mountinfo").read_text()
    except OSError:
        of_init = None
    return private_shm(Path("/proc/self/mountinfo").read_text(), of_init, os.environ, shm)


def _mount_of(mounts: str, point: str) -> tuple[str, str] | None:
    """Return (device, root within it) of the last mount at `point`, or None."""
    found = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 4 and fields[4] == point:
            found = (fields[2], fields[3])
    return found
