"""The process group, the mesh, and the collectives and reductions that a run needs.

Every collective runs on the main thread. An error on one rank is raised on all, so that no rank waits forever.

Data-parallel order on the mesh (dp_replicate, dp_shard, tp): dp_rank = replicate * shard_size + shard.
"""

from __future__ import annotations

import os
import pickle
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lingua.config.base import ConfigError
from lingua.config.keys.distributed import DistributedArgs, EnvironmentArgs
from lingua.distributed.meeting import listen, meet
from lingua.distributed.peers import Peers
from lingua.distributed.place import RankInfo
from lingua.files import DiskError, RunError
from lingua.run.failure import RankError, carried, classify, mark_known

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def pick_device(wanted: Literal["auto", "cpu", "cuda"], place: RankInfo) -> torch.device:
    """Return the device of this rank. Raises RankError if a GPU is requested and there is none for this rank."""
    n_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and n_gpus == 0):
        return torch.device("cpu")
    if n_gpus == 0:
        raise RankError("device: cuda, but torch sees no CUDA device here; use device=auto or device=cpu", "device")
    if place.local_rank >= n_gpus and n_gpus != 1:  # one visible GPU per task is a common binding
        text = f"local rank {place.local_rank} has no GPU: this node shows {n_gpus}; start fewer ranks"
        raise RankError(text, "device")
    return torch.device("cuda", place.local_rank if n_gpus > 1 else 0)


def set_environment(args: EnvironmentArgs, place: RankInfo, on_gpu: bool, unset: Collection[str] = ()) -> None:
    """Set variables that are neither set in the user's shell nor in `launcher.env.unset`, and torch's CPU threads.

    Raises ConfigError for an invalid number of threads.
    """
    threads = 1 if on_gpu else max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    for name, value in args.model_dump().items():
        if value is not None and name not in unset:
            os.environ.setdefault(name, str(threads) if value == "auto" else value)
    given = os.environ.get("OMP_NUM_THREADS", "")
    outermost = given.partition(",")[0].strip() or str(threads)  # "4,2": 4, and 2 in regions inside regions
    if not re.fullmatch(r"0*[1-9]\d{0,5}", outermost, re.ASCII):
        raise ConfigError(
            f"environment: OMP_NUM_THREADS is {given!r}, which is not a number of threads; unset it, or write {threads}"
        )
    torch.set_num_threads(int(outermost))


@dataclass(frozen=True)
class World:
    """A started run's processes."""

    rank_info: RankInfo
    device: torch.device
    mesh: DeviceMesh | None
    """Axes dp_replicate, dp_shard, tp; None for one process."""
    dp_rank: int = 0
    dp_size: int = 1
    peers: Peers | None = None
    """The other ranks; None for one process."""
    tp_rank: int = 0
    """Rank among those that share the rows of one dp_rank, each with a part of the model."""

    @property
    def is_main(self) -> bool:
        return self.rank_info.is_main


@contextmanager
def start_world(
    args: DistributedArgs, place: RankInfo, device: torch.device, config: Mapping[str, Any]
) -> Iterator[World]:
    """Join the process group and lay out the mesh; leave the group on the way out.

    `config`: must be equal on all ranks. Raises as `meet`, and RunError if ranks do not come.
    """
    replicate, shard, tp = args.degrees(place.world_size)
    if place.master is None:
        yield World(place, device, mesh=None)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = place.master
    timeout = timedelta(seconds=args.timeout_s)
    try:
        store = meet(place, args.timeout_s, config)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"rank {place.rank} of {place.world_size} did not meet the others at {host}:{port} within "
            f"{args.timeout_s} s ({reason}); see whether they all started, and why not in their logs"
        ) from error
    try:
        mesh = init_device_mesh(device.type, (replicate, shard, tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        for group in mesh.get_all_groups():  # torch gives gloo's groups 30 minutes, whatever the default group has
            _set_pg_timeout(timeout, group)
        dp_rank = mesh.get_local_rank("dp_replicate") * shard + mesh.get_local_rank("dp_shard")
        secret = from_main(lambda: secrets.token_bytes(32))  # not sent through the store
        peers = Peers(store, place.rank, place.world_size, secret)
        if place.is_main:
            peers.watch(listen(place, port=0))
        else:
            peers.let_watch(host)
        yield World(place, device, mesh, dp_rank, replicate * shard, peers, mesh.get_local_rank("tp"))
    finally:
        dist.destroy_process_group()


@contextmanager
def patient(timeout_s: float, usual_s: float) -> Iterator[None]:
    """Let ranks wait for each other for up to `timeout_s` inside the block, for work whose duration differs by rank."""
    if not dist.is_initialized():
        yield
        return
    _set_pg_timeout(timedelta(seconds=timeout_s), dist.group.WORLD)
    try:
        yield
    finally:
        _set_pg_timeout(timedelta(seconds=usual_s), dist.group.WORLD)


# -- agreement ---------------------------------------------------------------------------------------------------


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's (picklable) value, by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `act` on rank 0 and return its (picklable) result, or raise its error, on every rank. Collective.

    An OSError is raised as a DiskError.
    """
    outcome: list[Any] = [None, None]
    own: BaseException | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except BaseException as error:  # the others must not wait for us
            own = _without_os_error(error)
            outcome[1] = _portable(own)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    if own is not None and not isinstance(own, Exception):
        raise own
    if (error := own or outcome[1]) is not None:
        raise mark_known(error)
    return outcome[0]


def on_each(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `act` on all ranks and return the (picklable) results by rank; if any fails, all raise. Collective.

    A RunError or OSError of the first rank that failed is raised on all, so that all take the same branch.
    """
    value, error = _attempt(act)
    answers = gather((value, None if error is None else _sendable(error)), group)
    _raise_first(error, [failure for _, failure in answers])
    return [value for value, _ in answers]  # pyright: ignore[reportReturnType] - without an error there is one


def on_every_rank(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `act` on all ranks and return this rank's result without sending it; if any fails, all raise. Collective."""
    value, error = _attempt(act)
    _raise_first(error, gather(None if error is None else _sendable(error), group))
    return value  # pyright: ignore[reportReturnType] - without an error there is one


def first_given(value: T | None) -> T | None:
    """Return the value of the lowest rank that has one. Collective."""
    return next((given for given in gather(value) if given is not None), None)


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, _without_os_error(error)


def _raise_first(own: Exception | None, errors: list[RunError | None]) -> None:
    """Raise the error of the lowest rank that failed; a rank with a bug raises its own error."""
    found = next(((rank, error) for rank, error in enumerate(errors) if error is not None), None)
    if found is None:
        return
    if own is not None and not isinstance(own, RunError):
        raise mark_known(own)
    rank, error = found
    raise mark_known(error if own is not None else carried(error, f"rank {rank}: {error}"))


def _without_os_error(error: E) -> E | DiskError:
    if not isinstance(error, OSError):
        return error
    failure = DiskError.of(error)
    failure.__cause__ = error
    return failure


def _sendable(error: Exception) -> RunError:
    """Return the error for other ranks to raise; a RunError keeps its message."""
    return carried(error, None if isinstance(error, RunError) else f"{type(error).__name__}: {error}")


def _portable(error: BaseException) -> Exception:
    """Return the error itself if it can be pickled, else a RankError with its message."""
    if not isinstance(error, Exception):
        return RankError("rank 0 failed, see its log", classify(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"{type(error).__name__}: {error}", classify(error))
    return error


class StepReduce(Generic[T]):
    """An asynchronous all-reduce of a few named numbers per step, read one step late, so that no rank waits.

    ```
    reduce.submit(facts_of_step_1, {"loss": loss, "stop": stop})    # starts the sums; None
    reduce.submit(facts_of_step_2, {"loss": loss, "stop": stop})    # (facts_of_step_1, sums of step 1)
    reduce.result()                                                 # (facts_of_step_2, sums of step 2), waits for them
    ```
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[T, list[str], torch.Tensor, Callable[[], object]] | None = None

    def submit(self, facts: T, numbers: Mapping[str, torch.Tensor | float]) -> tuple[T, dict[str, float]] | None:
        """Start the sums over ranks of this step's `numbers`; return `result` of the previous step.

        Collective: all ranks give the same names in the same order.
        """
        sums = torch.stack([self._on_device(number) for number in numbers.values()])  # (n_numbers,) fp32
        before = self.result()
        if self._device.type == "cuda":
            if dist.is_initialized():
                dist.all_reduce(sums)
            sums = sums.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            wait = arrived.synchronize
        else:
            work = dist.all_reduce(sums, async_op=True) if dist.is_initialized() else None
            wait = work.wait if work is not None else lambda: None
        self._pending = (facts, list(numbers), sums, wait)
        return before

    def _on_device(self, number: torch.Tensor | float) -> torch.Tensor:
        if isinstance(number, torch.Tensor):
            return number.detach().float()
        return torch.full((), number, dtype=torch.float32, device=self._device)  # filled there: no copy, no wait

    def result(self) -> tuple[T, dict[str, float]] | None:
        """Wait for the newest step; return (facts, sums by name), or None if they were read already."""
        if self._pending is None:
            return None
        facts, names, sums, wait = self._pending
        self._pending = None
        wait()
        return facts, dict(zip(names, sums.tolist(), strict=True))


SLOWEST_DISK = timedelta(hours=4)
"""How long ranks wait for the slowest one to write, read or verify."""


class Ranks:
    """All ranks of the run, over a separate process group that waits for the slowest disk."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._group: dist.ProcessGroup | None = None
        if self.size > 1:
            group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def gather(self, value: T) -> list[T]:
        return gather(value, self._group)

    def from_main(self, act: Callable[[], T]) -> T:
        return from_main(act, self._group)

    def on_each(self, act: Callable[[], T]) -> list[T]:
        return on_each(act, self._group)
