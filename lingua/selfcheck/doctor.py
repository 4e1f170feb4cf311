"""`lingua doctor`: what this machine offers for training, and what is wrong with it.

`examine` gathers facts and changes nothing except a probe file on the disk; the judgments are pure functions of facts.
Every row that is wrong has a remedy. Lack of a GPU, as on a login node, is not wrong. Imports torch; takes seconds.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lingua.checkpoint.capacity import memory_limit, private_shm_here
from lingua.files import human_bytes
from lingua.scheduler import describe_cluster
from lingua.selfcheck.node_check import PROBE_BYTES, SHM, check_folder

Level = Literal["ok", "note", "wrong"]
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "panfs", "afs")
_SMALL_SHM_BYTES = 2 << 30
_SLOW_S = 8.0


@dataclass(frozen=True)
class Diagnosis:
    """One row of the table."""

    part: str
    level: Level
    says: str
    remedy: str = ""


# -- judgments -----------------------------------------------------------------------------------------------------


def judge_torch(version: str, python: tuple[int, int]) -> list[Diagnosis]:
    rows = [Diagnosis("python", "ok", ".".join(map(str, python))), Diagnosis("torch", "ok", version)]
    if python < (3, 11):
        rows[0] = replace(rows[0], level="wrong", remedy="use Python 3.11 or newer")
    if not version.startswith(("2.10.", "2.11.")):
        rows[1] = replace(rows[1], level="wrong", remedy="lingua is tested with torch 2.10: uv sync")
    return rows


def judge_gpus(names: list[str], built_for: str | None, driver_there: bool) -> Diagnosis:
    """Judge the GPUs. `built_for`: the CUDA version of this torch."""
    if names:
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Diagnosis("cuda", "ok", f"{counted}; torch is built for CUDA {built_for}")
    if built_for is None:
        return Diagnosis("cuda", "wrong", "this torch is built without CUDA", "uv sync installs one with it")
    if driver_there:
        remedy = f"see nvidia-smi; torch needs a driver for CUDA {built_for}; under Slurm, ask for a GPU"
        return Diagnosis("cuda", "wrong", "there is a GPU driver, but torch sees no GPU", remedy)
    return Diagnosis("cuda", "note", "no GPU here, as on a login node; training runs on the CPU")


def judge_shm(kind: str | None, size: int, free: int, private: str | None) -> Diagnosis:
    row = Diagnosis("/dev/shm", "ok", f"{kind or 'no file system'}, {human_bytes(free)} of {human_bytes(size)} free")
    if kind not in ("tmpfs", "ramfs"):
        remedy = "it is not memory; set checkpoint.async_save_mode=null, or ask for a /dev/shm of tmpfs"
        return replace(row, level="wrong", remedy=remedy)
    if size < _SMALL_SHM_BYTES:
        remedy = "checkpoints cannot be staged there; in a container: --shm-size or --ipc=host"
        return replace(row, level="wrong", remedy=remedy)
    if private is not None:
        remedy = "what is staged there dies with the job; a run waits for its last save"
        return replace(row, level="note", says=f"{row.says}; {private}", remedy=remedy)
    return row


def judge_disk(folder: Path, kind: str | None, free: int, seconds: float, problem: str | None) -> Diagnosis:
    """Judge the disk. `seconds`: time to write, flush and read back node_check's probe."""
    speed = f"{human_bytes(PROBE_BYTES)} there and back in {seconds:.2f} s"
    row = Diagnosis(f"disk {folder}", "ok", f"{kind or 'unknown'}, {human_bytes(free)} free, {speed}")
    if problem is not None:
        return replace(
            row, level="wrong", says=problem, remedy="choose another folder, or fix its permissions or quota"
        )
    if kind is not None and not kind.startswith(_SHARED):
        remedy = "fine on one machine; several nodes need a shared folder"
        return replace(row, level="note", says=f"{row.says}; not shared", remedy=remedy)
    if seconds > _SLOW_S:
        return replace(row, level="note", remedy="slow: use checkpoint.async_save_mode=shm")
    return row


def judge_kernels(plain: Mapping[str, str | None], documents: Mapping[str, str | None]) -> Diagnosis:
    """List the attention kernels. Takes, by kernel, why it cannot be used here, without and with data.doc_mask."""
    usable, packed = (
        ", ".join(name for name, reason in refusals.items() if reason is None) for refusals in (plain, documents)
    )
    return Diagnosis("attention", "ok", f"{usable}; with data.doc_mask: {packed}")


# -- facts ---------------------------------------------------------------------------------------------------------


def mounted_as(path: Path, mounts: str) -> str | None:
    """Return the type of the file system that holds `path`. `mounts`: text of /proc/mounts."""
    best: tuple[int, str] | None = None
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # \040 stands for a space
        if path.is_relative_to(point) and (best is None or len(point) >= best[0]):
            best = (len(point), kind)
    return best[1] if best is not None else None


def examine(folder: Path) -> list[Diagnosis]:
    """Examine this machine; `folder` is the place for run folders."""
    mounts, space = Path("/proc/mounts").read_text(), shutil.disk_usage(SHM)
    limit, used = memory_limit(Path("/proc/self/cgroup").read_text())
    memory = "no limit but the machine's"
    if limit is not None:
        memory = f"{human_bytes(used)} used of {human_bytes(limit)}; /dev/shm counts"
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()).resolve()
    started_s = time.perf_counter()
    problem = check_folder(place)
    seconds = time.perf_counter() - started_s
    return [
        *_torch_rows(),
        judge_shm(mounted_as(SHM, mounts), space.total, space.free, private_shm_here()),
        Diagnosis("memory", "ok", memory),
        judge_disk(folder, mounted_as(place, mounts), shutil.disk_usage(place).free, seconds, problem),
        *(Diagnosis(part, "note" if remedy else "ok", says, remedy) for part, says, remedy in describe_cluster()),
    ]


def _torch_rows() -> list[Diagnosis]:
    import torch
    import torch.distributed as dist
    from torch.cuda.nccl import version as nccl_version

    from lingua.model.attention import ALL_IMPLS, KernelConditions, installed, refusal

    on_gpu = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else []
    place = KernelConditions(
        device_type="cuda" if on_gpu else "cpu",
        capability=torch.cuda.get_device_capability() if on_gpu else (0, 0),
        dtype=torch.bfloat16,
        head_dim=128,
        doc_mask=False,
        window=False,
        installed=installed(),
    )
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    backends = [name for name, there in (("gloo", gloo), ("nccl", nccl)) if there]
    if nccl and on_gpu:
        backends[-1] = "nccl " + ".".join(map(str, nccl_version()))
    xformers = Diagnosis("xformers", "ok", "")
    try:
        xformers = replace(xformers, says=getattr(importlib.import_module("xformers"), "__version__", "?"))
        importlib.import_module("xformers.ops")
    except ImportError as error:
        says = f"cannot be imported ({error})"
        xformers = replace(xformers, level="note", says=says, remedy="model.attn_impl=auto does without it")
    compiler = shutil.which("g++") or shutil.which("clang++")
    return [
        *judge_torch(torch.__version__, sys.version_info[:2]),
        judge_gpus(names, torch.version.cuda, Path("/proc/driver/nvidia/version").exists()),
        xformers,
        judge_kernels(
            *({name: refusal(name, replace(place, doc_mask=asked)) for name in ALL_IMPLS} for asked in (False, True))
        ),
        Diagnosis("ranks", "ok", ", ".join(backends))
        if gloo and (nccl or not on_gpu)
        else Diagnosis("ranks", "wrong", f"torch has only {backends}", "several ranks need gloo and nccl: uv sync"),
        Diagnosis("compiler", "ok", compiler)
        if compiler
        else Diagnosis("compiler", "note", "no C++ compiler", "torch.compile needs g++ on the CPU: module load gcc"),
    ]
