"""Check whether every node of a job is fit to train: once per rank, before training starts.

Rank 0 prints one JSON object with the bad nodes; the exit code is 0 if there are none, else 1. A device that hangs, a
disk that does not answer or a missing rank delays that to at most `--within` seconds. It takes an import of torch and a
second: a small matrix product, some MiB written, one all-reduce.

    srun python -m lingua.selfcheck.node_check --dir out/my_run --shm-gib 40
    {"ok": false, "bad_nodes": ["n7"], "problems": {"n7": ["device cuda:3: ..."]}, "n_ranks": 16, "seconds": 4.1}
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from lingua.config.command_line import run_main
from lingua.files import free_bytes, human_bytes, no_follow
from lingua.scheduler import node_of_each_task, this_node_name

if TYPE_CHECKING:
    from lingua.distributed.place import RankInfo

T = TypeVar("T")

SHM = Path("/dev/shm")
PROBE_BYTES = 16 << 20
_MATRIX = 512


@dataclass(frozen=True)
class NodeAnswer:
    """One rank's findings about its node."""

    node: str
    problems: list[str]


@dataclass(frozen=True)
class NodeReport:
    """The findings of all ranks."""

    ok: bool
    bad_nodes: list[str]
    problems: dict[str, list[str]]
    """Problems by node; those between nodes are under "network"."""
    n_ranks: int
    seconds: float

    def print(self) -> None:
        print(orjson.dumps(asdict(self)).decode(), flush=True)


# -- one node ------------------------------------------------------------------------------------------------------


def local_problems(devices: Sequence[Any], folder: Path | None, shm_bytes: int, shm: Path = SHM) -> list[str]:
    """Return the problems of this node, one sentence each."""
    checks: list[Callable[[], str | None]] = [lambda device=device: check_device(device) for device in devices]
    checks.append(lambda: check_room(shm, max(shm_bytes, PROBE_BYTES)) or check_folder(shm))
    if folder is not None:
        checks.append(lambda: check_folder(next(p for p in (folder, *folder.absolute().parents) if p.exists())))
    return [problem for check in checks if (problem := check()) is not None]


def check_device(device: Any) -> str | None:
    """Multiply matrices of small integers, which every correct device does exactly, even in TF32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 4, (2, _MATRIX, _MATRIX), generator=generator).float()
    try:
        product = (a.to(device) @ b.to(device)).cpu()
    except RuntimeError as error:
        return f"device {device}: {_first_line(error)}"
    expected = (a.to(torch.int64).numpy() @ b.to(torch.int64).numpy()).astype("float32")
    n_wrong = int((product.numpy() != expected).sum())
    return f"device {device}: {n_wrong} of {expected.size} numbers of a matrix product are wrong" if n_wrong else None


def check_room(folder: Path, n_bytes: int) -> str | None:
    try:
        free = free_bytes(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if free >= n_bytes:
        return None
    return f"{folder}: {human_bytes(free)} free, {human_bytes(n_bytes)} needed; see who left files there"


def check_folder(folder: Path, n_bytes: int = PROBE_BYTES) -> str | None:
    """Write a probe file, flush it and read it back."""
    probe, content = folder / f".node_check-{os.uname().nodename}-{os.getpid()}", os.urandom(n_bytes)
    try:
        with open(probe, "wb", opener=no_follow) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        same = probe.read_bytes() == content
        probe.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return None if same else f"{folder}: it does not return what was written"


# -- all nodes -----------------------------------------------------------------------------------------------------


def judge(
    answers: Mapping[int, NodeAnswer], network: Mapping[int, str], nodes: Sequence[str], seconds: float
) -> NodeReport:
    """Decide which nodes are bad. `network`: why the sum failed, by rank; `nodes`: the expected node of each rank.

    If the sum failed on only some ranks, their nodes are bad; if it failed on all, none is.
    """
    problems: dict[str, list[str]] = {}
    for rank, node in enumerate(nodes):
        answer = answers.get(rank, NodeAnswer(node, [f"rank {rank} did not answer in time"]))
        if answer.problems:
            problems.setdefault(answer.node, []).extend(answer.problems)
    bad = set(problems)
    for rank, problem in network.items():
        where = answers[rank].node if len(network) < len(nodes) else "network"
        problems.setdefault(where, []).append(f"rank {rank}: {problem}")
        bad |= {where} - {"network"}
    return NodeReport(not problems, sorted(bad), problems, len(nodes), round(seconds, 2))


def nodes_of_ranks(of_tasks: Sequence[str], n_ranks: int) -> list[str]:
    """Return the node of each rank if each task of the step started the same number, otherwise made-up names."""
    if not of_tasks or n_ranks % len(of_tasks):
        return [f"the node of rank {rank}" for rank in range(n_ranks)]
    return [node for node in of_tasks for _ in range(n_ranks // len(of_tasks))]


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout, which is for the report, since gloo prints to it."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def check_together(
    place: RankInfo, answer: NodeAnswer, device: Any, nodes: Sequence[str], within_s: float
) -> NodeReport | None:
    """Share the answers over a store on rank 0 and do an all-reduce; return the report on rank 0, None elsewhere.

    Raises RankError or torch's DistError if rank 0 cannot be reached.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from lingua.distributed.meeting import open_store

    started_s, limit = time.monotonic(), timedelta(seconds=within_s)
    store = open_store(place, within_s)
    store.set(f"answer/{place.rank}", orjson.dumps(asdict(answer)).decode())

    def collect(what: str, kind: type[T], until_s: float) -> dict[int, T]:
        missing = set(range(place.world_size))
        found: dict[int, T] = {}
        while missing and time.monotonic() < until_s:
            for rank in missing:
                with contextlib.suppress(ValidationError):  # what a stranger may have left there
                    if store.check([key := f"{what}/{rank}"]):
                        found[rank] = TypeAdapter(kind).validate_json(store.get(key))
            missing -= set(found)
            time.sleep(0.05)
        return found

    def sum_up() -> None:
        """Do an all-reduce of all ranks and send the problem, or an empty text."""
        backend, problem = "nccl" if device.type == "cuda" else "gloo", ""
        with stdout_to_stderr():
            try:
                meeting = dist.PrefixStore("sum", store)
                dist.init_process_group(
                    backend, store=meeting, rank=place.rank, world_size=place.world_size, timeout=limit / 3
                )
                total = torch.full((1024,), place.rank + 1.0, device=device)
                dist.all_reduce(total)
                expected = place.world_size * (place.world_size + 1) / 2
                if not bool((total == expected).all()):
                    problem = f"an all-reduce gave {total[0].item()}, not {expected}"
            except RuntimeError as error:
                problem = f"{backend}: {_first_line(error)}"
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        store.set(f"sum/{place.rank}", orjson.dumps(problem).decode())

    if not place.is_main:
        if store.get("go") == b"1":
            sum_up()
        store.get("done")
        return None
    answers = collect("answer", NodeAnswer, started_s + within_s / 2)
    everybody = len(answers) == place.world_size and not any(each.problems for each in answers.values())
    store.set("go", "1" if everybody else "0")
    network: dict[int, str] = {}
    if everybody:
        sum_up()
        sums = collect("sum", str, started_s + within_s)
        network = {rank: sums.get(rank, "no answer") for rank in range(place.world_size)}
    report = judge(answers, {k: v for k, v in network.items() if v}, nodes, time.monotonic() - started_s)
    store.set("done", "1")
    time.sleep(0.2)  # the other ranks read it from this process
    return report


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# -- command -------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lingua.selfcheck.node_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--dir", type=Path, help="a folder that must be writable; the run folder, say")
    parser.add_argument("--shm-gib", type=float, default=1.0, help="room needed in /dev/shm")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what is checked")
    parser.add_argument("--within", type=float, default=120.0, help="seconds until the answer, at most")
    given = parser.parse_args(words)
    node = this_node_name(os.environ)

    def give_up() -> None:
        NodeReport(False, [node], {node: [f"no answer within {given.within:g} s"]}, 1, given.within).print()
        os._exit(1)

    timer = threading.Timer(given.within + 5, give_up)  # rank 0 has reported on this rank by then
    timer.daemon = True
    timer.start()

    import torch

    from lingua.distributed.place import find_rank_info
    from lingua.distributed.process_group import pick_device

    started_s, place = time.monotonic(), find_rank_info()
    try:
        device = pick_device(given.device, place)
        alone = place.master is None and device.type == "cuda"
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if alone else [device]
        problems = local_problems(devices, given.dir, int(given.shm_gib * 2**30))
    except (RuntimeError, ValueError) as error:
        device, problems = torch.device("cpu"), [_first_line(error)]
    answer = NodeAnswer(node, problems)
    if place.master is None:
        report = judge({0: answer}, {}, [node], time.monotonic() - started_s)
    else:
        nodes = nodes_of_ranks(node_of_each_task(os.environ), place.world_size)
        try:
            report = check_together(place, answer, device, nodes, given.within)
        except RuntimeError as error:  # RankError, torch's DistError
            problem = f"rank 0 cannot be reached from {node}: {_first_line(error)}"
            report = NodeReport(False, [nodes[0]], {nodes[0]: [problem]}, 1, 0.0)
    timer.cancel()
    if report is not None:
        report.print()
    return int(bool(problems) if report is None else not report.ok)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
