"""Measure the cost of checkpoints: how long training waits, and the speed of writing and loading.

    uv run python scripts/bench_checkpoint.py [--params 80e6] [--rounds 5] [--json] [--folder DIR] [--only-loads]

One process, one state (fp32 parameters with AdamW: 12 bytes per parameter), all methods in turn each round, medians:

    copy_s                bare copy of all tensors to memory that was written to before
    ours_stall_s          our asynchronous save: how long the caller waits
    ours_direct_s         our synchronous save
    dcp_async_cold_s      torch.distributed.checkpoint.async_save with its defaults
    dcp_async_warm_s      the same with one DefaultStager for all saves
    dcp_save_s            torch.distributed.checkpoint.save
    drain_gb_per_s        our service, from taking a slot to the published checkpoint, including checksums
    cp_gb_per_s           `cp -r` of the same bytes from /dev/shm and `sync`
    load_gb_per_s         our resume from the disk, including checksums, with an empty page cache
    dd_gb_per_s           as many `dd iflag=direct` as blocks that we read in parallel, of the same size and files
    dcp_load_s            torch.distributed.checkpoint.load of the same state, from the disk; nothing is verified
    slowdown_draining     how much longer a step of matrix products takes while the service writes; all cores but one
                          compute; steps with and without alternate
    extra_memory_bytes    memory besides the slots: growth of the process, and all of the service's

Ratios are of values of the same round. The machine should be idle.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bench_common import make_parser, print_figures, timed, work_folder
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lingua.checkpoint import layout
from lingua.checkpoint.dcp_reader import READERS
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.restore import Restorer
from lingua.checkpoint.shm.area import SERVICE_LOCK, area_of
from lingua.checkpoint.state import TrainState, tensors_of
from lingua.checkpoint.verified import CHUNK_BYTES, READ_AHEAD
from lingua.config.command_line import run_main
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.distributed.process_group import Ranks
from lingua.files import DISK

WIDTH = 1024
STEP_S = 0.02


def anonymous_bytes(pid: int | str) -> int:
    """Return the private memory of a process (proc(5): RssAnon, in kB); slots are shared and do not count."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def evict(folder: Path) -> None:
    """Remove the files of a folder from the page cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_with_dd(files: list[Path]) -> None:
    """Read files with parallel processes, READ_AHEAD for each of READERS files, each a stretch of a file."""
    for at_once in (files[at : at + READERS] for at in range(0, len(files), READERS)):
        running = []
        for path in at_once:
            n_blocks = -(-path.stat().st_size // CHUNK_BYTES)
            share = -(-n_blocks // READ_AHEAD)
            for first in range(0, n_blocks, share):
                words = [f"if={path}", "of=/dev/null", f"bs={CHUNK_BYTES}", f"skip={first}", f"count={share}"]
                running.append(subprocess.Popen(["dd", *words, "iflag=direct", "status=none"]))
        assert all(process.wait() == 0 for process in running)


class Bench:
    """All methods of saving one state."""

    def __init__(self, n_params: int, folder: Path) -> None:
        self.folder = folder
        n_layers = max(1, n_params // (WIDTH * WIDTH))
        model = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n_layers)])
        self.state = TrainState(model, torch.optim.AdamW(model.parameters(), fused=True), shared={"step": 0})
        self.tensors = tensors_of(self.state).by_name
        self.size_bytes = sum(t.numel() * t.element_size() for t in self.tensors.values())
        before_bytes = anonymous_bytes("self")
        self.manager = self._manager("ours", "shm")
        self.manager.prepare(self.state)
        self.step = 0
        self._drain_rate = 0.0
        self._ours()  # the first one waits for the allocation
        self._wait_for_service()
        self.grown_bytes = anonymous_bytes("self") - before_bytes
        self.direct = self._manager("direct", None)
        self.direct.prepare(self.state)
        self.copies = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        gpu = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=True, use_async_staging=gpu, use_non_blocking_copy=gpu
            )
        )

    def _manager(self, name: str, mode: Any) -> CheckpointManager:
        keep = SaveEvery(every=1, keep=1)
        args = CheckpointArgs(
            dump=keep, eval=SaveEvery(every=0), async_save_mode=mode, async_cleanup=True, strict=True, linger_s=0
        )
        return CheckpointManager(args, self.folder / name)

    def extra_memory_bytes(self) -> int:
        """Return the growth of this process plus all memory of the service."""
        lock = area_of(self.folder / "ours").lock(SERVICE_LOCK)
        pid = lock.holder()
        lock.close()
        assert pid is not None
        return self.grown_bytes + anonymous_bytes(pid)

    def _ours(self) -> float:
        self.step += 1
        seconds, report = timed(lambda: self.manager.save(self.step, self.state))
        assert report.staged, report.error
        return seconds

    def _ours_direct(self) -> float:
        """Return the seconds of a synchronous save; deletion of the old checkpoint is awaited outside, as for DCP."""
        seconds, report = timed(lambda: self.direct.save(self.step, self.state))
        assert report.error is None, report.error
        root = self.folder / "direct" / layout.CHECKPOINTS
        while len([*root.glob("0*"), *root.glob("incarnation-*/*")]) > 1:
            time.sleep(0.01)
        return seconds

    def _draining(self) -> bool:
        """Return whether the newest save is still on its way."""
        return not (self.folder / "ours" / "checkpoints" / f"checkpoint_{self.step:010d}.done").exists()

    def _wait_for_service(self) -> float:
        """Return the GB/s that the service reports for the newest save, after its publication."""
        before = self._drain_rate
        while self._draining() or self._drain_rate == before:
            time.sleep(0.01)
            self._drain_rate = self.manager.metrics().get("checkpoint/drain_gb_per_s", before)
        return self._drain_rate

    def _stock(self, save: Callable[[str], Any]) -> float:
        """Return the seconds that a DCP save blocks; its end is awaited outside."""
        target = self.folder / "stock"
        shutil.rmtree(target, ignore_errors=True)
        seconds, pending = timed(lambda: save(str(target)))
        if pending is not None and hasattr(pending, "upload_completion"):
            pending.upload_completion.result()
        elif pending is not None and hasattr(pending, "result"):
            pending.result()
        return seconds

    def _copy(self) -> None:
        for name, tensor in self.tensors.items():
            self.copies[name].copy_(tensor)

    def _cp(self) -> float:
        """Return the GB/s of `cp` and `sync` from a slot to the disk."""
        slot, target = area_of(self.folder / "ours").slot(0).folder, self.folder / "cp"
        shutil.rmtree(target, ignore_errors=True)
        script = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
        seconds, _ = timed(lambda: subprocess.run(["sh", "-c", script, "sh", slot, target], check=True))
        return sum(path.stat().st_size for path in target.iterdir()) / 1e9 / seconds

    def loads(self) -> dict[str, float]:
        """Measure our load, dd and DCP's load of checkpoints that this round has written."""
        root = self.folder / "direct" / layout.CHECKPOINTS
        step = layout.done_steps(root)[-1]
        large = sorted(layout.folder(root, step).glob(f"*{layout.TENSORS}"))
        size_bytes = sum(path.stat().st_size for path in large)
        restorer = Restorer(self.folder / "direct", root, Ranks(), DISK, CheckpointArgs())
        evict(layout.folder(root, step))
        load_s, _ = timed(lambda: restorer.load(step, {step}, self.state))
        dd_s, _ = timed(lambda: read_with_dd(large))
        evict(self.folder / "stock")
        nested: dict[str, Any] = {"state": self.tensors}
        dcp_s, _ = timed(lambda: dcp.load(nested, checkpoint_id=str(self.folder / "stock")))
        rates = {"load_gb_per_s": size_bytes / 1e9 / load_s, "dd_gb_per_s": size_bytes / 1e9 / dd_s}
        return {
            **rates,
            "load_s": load_s,
            "dcp_load_s": dcp_s,
            "load_per_dd": dd_s / load_s,
            "dcp_per_load": dcp_s / load_s,
        }

    def load_round(self) -> dict[str, float]:
        self.step += 1
        self._stock(lambda path: dcp.save({"state": self.tensors}, checkpoint_id=path))
        self._ours_direct()
        return self.loads()

    def round(self) -> dict[str, float]:
        nested: dict[str, Any] = {"state": self.tensors}
        found = {"copy_s": timed(self._copy)[0], "ours_stall_s": self._ours()}
        found["drain_gb_per_s"] = self._wait_for_service()
        found["cp_gb_per_s"] = self._cp()
        found["dcp_async_cold_s"] = self._stock(lambda path: dcp.async_save(nested, checkpoint_id=path))
        found["dcp_async_warm_s"] = self._stock(
            lambda path: dcp.async_save(nested, checkpoint_id=path, async_stager=self.stager)
        )
        found["dcp_save_s"] = self._stock(lambda path: dcp.save(nested, checkpoint_id=path))
        found["ours_direct_s"] = self._ours_direct()
        found |= self.loads()
        for name, base in (
            ("copy", "copy_s"),
            ("dcp_async", "dcp_async_cold_s"),
            ("dcp_async_warm", "dcp_async_warm_s"),
        ):
            found[f"stall_per_{name}"] = found["ours_stall_s"] / found[base]
        found["drain_per_cp"] = found["drain_gb_per_s"] / found["cp_gb_per_s"]
        return found

    def slowdown(self, seconds: float) -> dict[str, float]:
        """Measure the median step with the service writing and with it idle, alternating."""
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
        left = torch.randn(WIDTH, WIDTH)
        n_products = max(1, round(STEP_S / max(1e-4, timed(lambda: [left @ left for _ in range(20)])[0] / 20)))

        def step() -> float:
            return timed(lambda: [left @ left for _ in range(n_products)])[0]

        times: dict[bool, list[float]] = {True: [], False: []}
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            self._ours()
            time.sleep(0.1)  # hashing in our own thread is part of the save, not of the drain
            while self._draining():
                times[True].append(step())
            times[False] += [step() for _ in range(20)]
        busy, idle = statistics.median(times[True]), statistics.median(times[False])
        return {"step_idle_s": idle, "step_draining_s": busy, "slowdown_draining": busy / idle - 1}

    def close(self) -> None:
        self.manager.close()
        self.direct.close()
        self.stager.close()


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--params", type=float, default=80e6, help="parameters (default 80e6: 0.96 GB of state)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slowdown-s", type=float, default=20.0, help="seconds spent on slowdown_draining")
    parser.add_argument("--only-loads", action="store_true", help="only load, dd and dcp.load")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args(words)
    warnings.simplefilter("ignore")
    with work_folder(options.folder) as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        bench = Bench(int(options.params), folder)
        take = bench.load_round if options.only_loads else bench.round
        take()  # warms up
        rounds = [take() for _ in range(options.rounds)]
        result: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "state_bytes": bench.size_bytes,
            "rounds": options.rounds,
            **{key: statistics.median(found[key] for found in rounds) for key in rounds[0]},
        }
        if not options.only_loads:
            result["extra_memory_bytes"] = bench.extra_memory_bytes()
            result |= bench.slowdown(options.slowdown_s)
        bench.close()
        dist.destroy_process_group()
        while area_of(bench.folder / "ours").folder.exists():  # the service leaves last
            time.sleep(0.05)
    print_figures(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
