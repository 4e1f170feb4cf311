"""`lingua doctor`: what this machine can do for training, and what is wrong with it.

Promise: every finding that is wrong comes with its remedy. `examine` gathers facts and changes nothing but a probe file
on the disk asked about; the judgements are pure functions of the facts. What a login node lacks (a GPU) is no fault.
Cost: imports torch; a few seconds.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lingua.checkpoint.capacity import memory_limit, private_shm
from lingua.files import human_bytes
from lingua.selfcheck.node_check import SHM, check_folder
from lingua.slurm import ask_slurm, cluster_config

Level = Literal["ok", "note", "wrong"]
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "panfs", "afs")
_SMALL_SHM_BYTES = 2 << 30
_SLOW_FSYNC_S = 0.5


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    part: str
    level: Level
    says: str
    remedy: str = ""


# -- judgements ----------------------------------------------------------------------------------------------------


def judge_torch(version: str, python: tuple[int, int]) -> list[Finding]:
    found = ".".join(map(str, python))
    fits = python >= (3, 11)
    findings = [Finding("python", "ok" if fits else "wrong", found, "" if fits else "use Python 3.11 or newer")]
    if version.startswith(("2.10.", "2.11.")):
        return [*findings, Finding("torch", "ok", version)]
    return [*findings, Finding("torch", "wrong", version, "lingua is tried with torch 2.10: uv sync")]


def judge_gpus(names: list[str], built_for: str | None, driver_there: bool) -> Finding:
    """`built_for`: the CUDA version of this torch."""
    if names:
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Finding("cuda", "ok", f"{counted}; torch is built for CUDA {built_for}")
    if built_for is None:
        return Finding("cuda", "wrong", "this torch is built without CUDA", "uv sync installs one with it")
    if driver_there:
        remedy = f"see nvidia-smi; torch needs a driver for CUDA {built_for}; under Slurm, ask for a GPU"
        return Finding("cuda", "wrong", "there is a GPU driver, but torch sees no GPU", remedy)
    return Finding("cuda", "note", "no GPU here, as on a login node; training runs on the CPU")


def judge_shm(kind: str | None, size: int, free: int, private: str | None) -> Finding:
    says = f"{kind or 'no file system'}, {human_bytes(free)} of {human_bytes(size)} free"
    if kind not in ("tmpfs", "ramfs"):
        remedy = "it is no memory; set checkpoint.async_save_mode=null, or ask for a /dev/shm of tmpfs"
        return Finding("/dev/shm", "wrong", says, remedy)
    if size < _SMALL_SHM_BYTES:
        remedy = "checkpoints cannot be staged there; in a container: --shm-size or --ipc=host"
        return Finding("/dev/shm", "wrong", says, remedy)
    if private is not None:
        remedy = "what is staged there dies with the job; a run waits for its last save"
        return Finding("/dev/shm", "note", f"{says}; {private}", remedy)
    return Finding("/dev/shm", "ok", says)


def judge_memory(limit: int | None, used: int) -> Finding:
    if limit is None:
        return Finding("memory", "ok", "no limit but the machine's")
    return Finding("memory", "ok", f"{human_bytes(used)} used of {human_bytes(limit)}; /dev/shm counts")


def judge_disk(folder: Path, kind: str | None, free: int, seconds: float, problem: str | None) -> Finding:
    """`seconds`: to write, flush and read back node_check's probe."""
    part = f"disk {folder}"
    if problem is not None:
        return Finding(part, "wrong", problem, "choose another folder, or mend its permissions or quota")
    says = f"{kind or 'unknown'}, {human_bytes(free)} free, 16 MiB there and back in {seconds:.2f} s"
    if kind is not None and not kind.startswith(_SHARED):
        return Finding(part, "note", f"{says}; not shared", "fine on one machine; several nodes need a shared folder")
    if seconds > 16 * _SLOW_FSYNC_S:
        return Finding(part, "note", says, "slow: use checkpoint.async_save_mode=shm")
    return Finding(part, "ok", says)


def judge_slurm(config: Mapping[str, str]) -> list[Finding]:
    """`config`: settings of the cluster; empty: no Slurm, or no controller that answers."""
    if not config:
        return [
            Finding("slurm", "note", "not here, or its controller does not answer", "run with --local, or torchrun")
        ]
    version = config.get("SLURM_VERSION", "?")
    findings = [Finding("slurm", "ok", f"{version}, cluster {config.get('ClusterName', '?')}")]
    preempt, kill_wait = config.get("PreemptMode", "OFF"), config.get("KillWait", "?")
    findings.append(Finding("preemption", "ok", f"{preempt}; {kill_wait} from SIGTERM to SIGKILL at the time limit"))
    if "CANCEL" in preempt:
        remedy = "preempted jobs are cancelled, not requeued: submit again, the run goes on"
        findings[-1] = Finding("preemption", "note", preempt, remedy)
    if config.get("JobRequeue") == "0":
        remedy = "submit with --requeue, as lingua's own scripts do"
        findings.append(Finding("requeue", "note", "jobs are not requeued by default", remedy))
    if "tmpfs" in config.get("JobContainerType", ""):
        remedy = "what is staged there dies with the job; the last save is waited for"
        findings.append(Finding("job container", "note", "each job has a /dev/shm of its own", remedy))
    if "cgroup" not in config.get("ProctrackType", "cgroup"):
        findings.append(
            Finding("processes", "note", f"tracked by {config['ProctrackType']}", "strays may outlive a job")
        )
    return findings


def judge_kernels(plain: Mapping[str, str | None], documents: Mapping[str, str | None]) -> Finding:
    """By kernel, why it cannot be used here, without and with data.doc_mask; None: it can."""
    usable, packed = (
        ", ".join(name for name, reason in refusals.items() if reason is None) for refusals in (plain, documents)
    )
    return Finding("attention", "ok", f"{usable}; with data.doc_mask: {packed}")


# -- facts ---------------------------------------------------------------------------------------------------------


def mounted_as(path: Path, mounts: str) -> str | None:
    """Type of the file system that holds `path`. `mounts`: text of /proc/mounts."""
    best: tuple[int, str] | None = None
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # \040 for a blank
        if path.is_relative_to(point) and (best is None or len(point) >= best[0]):
            best = (len(point), kind)
    return best[1] if best is not None else None


def examine(folder: Path) -> list[Finding]:
    """Everything, on this machine; `folder` is where runs are to lie."""
    mounts = Path("/proc/mounts").read_text()
    space, cgroup = shutil.disk_usage(SHM), Path("/proc/self/cgroup").read_text()
    private = private_shm(Path("/proc/self/mountinfo").read_text(), _read("/proc/1/mountinfo"), os.environ)
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()).resolve()
    started_s = time.perf_counter()
    problem = check_folder(place)
    seconds = time.perf_counter() - started_s
    return [
        *_torch_findings(),
        judge_shm(mounted_as(SHM, mounts), space.total, space.free, private),
        judge_memory(*memory_limit(cgroup)),
        judge_disk(folder, mounted_as(place, mounts), shutil.disk_usage(place).free, seconds, problem),
        *judge_slurm(cluster_config(ask_slurm)),
    ]


def _torch_findings() -> list[Finding]:
    import torch
    import torch.distributed as dist
    from torch.cuda.nccl import version as nccl_version

    from lingua.model.attention import ALL_IMPLS, Place, installed, refusal

    on_gpu = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else []
    place = Place(
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
    compiler = shutil.which("g++") or shutil.which("clang++")
    return [
        *judge_torch(torch.__version__, sys.version_info[:2]),
        judge_gpus(names, torch.version.cuda, Path("/proc/driver/nvidia/version").exists()),
        _xformers(importlib.import_module),
        judge_kernels(
            *({name: refusal(name, replace(place, doc_mask=asked)) for name in ALL_IMPLS} for asked in (False, True))
        ),
        Finding("ranks", "ok", ", ".join(backends))
        if gloo and (nccl or not on_gpu)
        else Finding("ranks", "wrong", f"torch has only {backends}", "several ranks need gloo and nccl: uv sync"),
        Finding("compiler", "ok", compiler)
        if compiler
        else Finding("compiler", "note", "no C++ compiler", "torch.compile needs g++ on the CPU: module load gcc"),
    ]


def _xformers(load: Callable[[str], object]) -> Finding:
    try:
        version = getattr(load("xformers"), "__version__", "?")
        load("xformers.ops")
    except ImportError as error:
        return Finding("xformers", "note", f"cannot be imported ({error})", "model.attn_impl=auto does without it")
    return Finding("xformers", "ok", str(version))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def table(findings: list[Finding]) -> list[str]:
    """Aligned lines for people; a remedy stands below what is wrong."""
    width = max(len(finding.part) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5}  {finding.part:<{width}}  {finding.says}")
        if finding.remedy:
            lines.append(f"{'':<5}  {'':<{width}}  -> {finding.remedy}")
    return lines
