"""Open the run folder for a checked config: ownership, the frozen config, metrics, and the first log lines.

`config.yaml` is the current config, and `config.<attempt>.yaml` the one before a change. Only rank 0 writes; its errors
are raised on all ranks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingua.checkpoint.layout import done_steps
from lingua.config.base import ConfigError
from lingua.config.command_line import DEFAULT_APP
from lingua.config.compose import code_named
from lingua.config.frozen import CONFIG_FILE, ORIGIN_FILE, dump_yaml, public_yaml
from lingua.config.keys.model import DecoderArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.trust import note_run
from lingua.console import command_lines, lingua_command
from lingua.data.corpus import SOURCE_NAME
from lingua.data.sources import with_default_sources
from lingua.distributed.parallelize import DTYPES, recomputed
from lingua.distributed.process_group import World, from_main
from lingua.distributed.same_config import code_of
from lingua.files import DiskError, read_bytes, write_whole
from lingua.logger import log_to_folder
from lingua.model.attention import resolve_attn_impl
from lingua.model.kernels import kernels_in_use
from lingua.optim.schedule import rates_of_longer
from lingua.run.folder import archive_exit_records, describe_start, reserve_last_words
from lingua.run.lock import RunLock, this_process
from lingua.run.metrics import MetricLogger
from lingua.run.provenance import record_run
from lingua.run.throughput import Meter, find_peak
from lingua.scheduler import this_job
from lingua.train.check import Checked
from lingua.train.learner import Run
from lingua.train.sizes import Resolved

log = logging.getLogger(__name__)

_SAMPLE_CORPUS = "the source of Python's standard library (python_stdlib)"


@dataclass
class RunFolder:
    """An open run folder. `lock` is rank 0's; `is_new`: this attempt created the folder."""

    path: Path
    attempt: int
    is_new: bool
    lock: RunLock | None


@contextmanager
def open_run_folder(
    checked: Checked, words: Sequence[str], world: World, refused: Callable[[], bool] = lambda: False
) -> Iterator[RunFolder]:
    """Lock the folder, write the facts of this attempt, and log into it. Collective.

    At the end, remove the folder if the attempt that created it was `refused`.
    """
    path = Path(checked.args.dump_dir)
    lock = RunLock(path, this_process(*this_job(os.environ))) if world.is_main else None

    def begin() -> tuple[int, bool]:
        assert lock is not None
        is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"dump_dir {path} cannot be made: {error.strerror}; choose another with dump_dir="
            raise DiskError.of(error, text) from error
        attempt = lock.acquire()
        reserve_last_words(path)
        if not checked.waived:
            _freeze_config(path, checked, attempt)
        # After the config, since the last attempt's exit record may be why this config may differ.
        archive_exit_records(path, attempt - 1)
        note_run(path, code_named(checked.frozen), checked.composed.configs)
        command = ["-m", f"{checked.args.app}.train", *words]
        describe_start(path, command)
        record_run(path, attempt, [sys.executable, *command], _code_folder(checked.args.app), **_facts(checked, world))
        return attempt, is_new

    try:
        attempt, is_new = from_main(begin)
        handler = log_to_folder(path, world.rank_info.rank)
        try:
            yield RunFolder(path, attempt, is_new, lock)
        except Exception as error:
            _note_failure(handler, error)
            raise
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()
    finally:
        if lock is not None:
            lock.release(remove=refused())


def _code_folder(app: str) -> Path:
    """Return the folder from which the app is imported."""
    spec = importlib.util.find_spec(app)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).parents[app.count(".")] if places else Path.cwd()


def _facts(checked: Checked, world: World) -> dict[str, Any]:
    on_gpu = world.device.type == "cuda"
    return {
        "code": code_of(["lingua", checked.args.app, *checked.args.plugins]),
        "ranks": world.rank_info.world_size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def settle_config(run: Run, checked: Checked, attempt: int) -> None:
    """Freeze a config that is allowed only without a checkpoint, once it is certain that there is none. Collective.

    Call after the run was built: a checkpoint that was only in the memory of other machines when the config was checked
    is on disk by now. If there is one, raises ConfigError and keeps the config of the earlier attempt.
    """

    def settle() -> None:
        if not checked.waived:
            return
        steps = done_steps(run.manager.root) or ([run.step] if run.manager.owes(run.step) else [])
        if steps:
            what = f"{run.run_dir / CONFIG_FILE}: checkpoint {steps[-1]} of an earlier attempt was saved only now"
            raise ConfigError([f"{what}, and {difference}" for difference in checked.waived])
        _freeze_config(run.run_dir, checked, attempt)

    from_main(settle)


def _note_failure(log_file: logging.Handler, error: Exception) -> None:
    """Write the error to this rank's log file; the exit prints it on the terminal."""
    text, trace = f"ended by {type(error).__name__}: {error}", (type(error), error, error.__traceback__)
    log_file.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), trace))


def _freeze_config(path: Path, checked: Checked, attempt: int) -> None:
    text, file = public_yaml(checked.frozen).encode(), path / CONFIG_FILE
    if file.is_file() and read_bytes(file) != text:
        write_whole(path / f"config.{attempt - 1:04d}.yaml", file.read_bytes())
    write_whole(file, text)
    write_whole(path / ORIGIN_FILE, dump_yaml(checked.composed.origins()).encode())


def use_embedded_corpus(*configs: TrainArgs) -> None:
    """Train on the sample corpus if the config, or that of a phase, names no source."""
    for args in configs:
        args.data = with_default_sources(args.data)


def start_metrics(run: Run, attempt: int, stack: ExitStack) -> MetricLogger | None:
    """Return the metric logger of rank 0, None elsewhere; its tracking id is kept with the run. Collective."""
    started: list[MetricLogger] = []

    def start() -> str | None:
        metrics = MetricLogger(
            run.run_dir,
            run.args.logging,
            attempt=attempt,
            run_name=run.args.name,
            config=run.args.model_dump(mode="json"),
            wandb_id=run.shared["tracking_id"],
        )
        started.append(stack.enter_context(metrics))
        return metrics.wandb_id

    run.shared["tracking_id"] = from_main(start)
    return started[0] if started else None


def make_meter(args: TrainArgs, size: Resolved, world: World) -> Meter:
    """Make the run's throughput meter. A CPU has no data-sheet peak, so it has no MFU."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    peak = None if name is None else find_peak(name)
    if name is not None and peak is None and world.is_main:
        log.warning("no mfu: lingua/run/throughput.py knows no peak of a device named %s", name)
    return Meter(
        n_steps=size.n_steps,
        tokens_per_step=size.tokens_per_step,
        flops_per_token=size.flops_per_token,
        n_devices=world.rank_info.world_size,
        peak_flops=None if peak is None else peak.flops_per_s,
        recomputed_flops_per_token=_recomputed_flops(args, world),
    )


def _recomputed_flops(args: TrainArgs, world: World) -> float | None:
    if args.distributed.activation_memory_budget is not None:
        return None  # known to the compiler only
    impl = "sdpa"
    if (attention := args.model.attention) is not None:
        dtype = DTYPES[args.distributed.model_dtype]
        impl = resolve_attn_impl(attention, world.device.type, dtype, args.data.doc_mask)
    blocks, attention = recomputed(args.distributed, impl)
    return args.model.recomputed_flops_per_token(args.data.seq_len, blocks, attention)


# -- messages to the user ---------------------------------------------------------------------------------------


def say_hello(run: Run, checked: Checked, meter: Meter, attempt: int) -> None:
    """Log what runs, where, and what differs from the first attempt."""
    if not run.world.is_main:
        return
    size, device = run.size, run.world.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    log.info("%s: attempt %d in %s on %d x %s", run.args.name, attempt, run.run_dir, size.world_size, where)
    for warning in checked.warnings:
        log.warning("%s", warning)
    for difference in checked.differences:
        log.info("config changed: %s", difference.change)
    names = [source.name for source in run.args.data.read_sources()]
    learnt = ", ".join(_SAMPLE_CORPUS if name == SOURCE_NAME else str(name) for name in names)
    log.info("a %s of %s parameters learns %s", run.args.model.type, f"{size.n_params:,}", learnt)
    n_tokens = run.shared["total_tokens"] + run.tokens_left()
    per_step = f"{size.tokens_per_step:,} tokens ({size.rows_per_step} rows of {size.seq_len})"
    log.info("%s steps of %s, %s tokens in all", f"{size.n_steps:,}", per_step, f"{n_tokens:,}")
    for phase in run.phases if run.phase.written else ():
        sources = ", ".join(f"{s.name} {s.weight:g}" for s in phase.args.data.read_sources() if s.weight)
        log.info(
            "phase %s: steps %d to %d, %d rows of %d, %s",
            phase.name, phase.first + 1, phase.last, phase.size.rows_per_step, phase.size.seq_len, sources,
        )  # fmt: skip
    if run.floor is not None:
        log.info("no model has a loss below %s nats per token on this data (loss/above_floor)", run.floor)
    if (formula := meter.formula()) is not None:
        log.info("%s", formula)
    if isinstance(run.args.model, DecoderArgs):
        for kernel in dict.fromkeys(kernels_in_use(run.args.model, device.type, run.args.data.doc_mask)):
            log.info("recurrence of %s (model.kernel)", kernel)


def say_finished_already(run: Run) -> None:
    if run.world.is_main:
        log.info(
            "%s is finished: all %d steps are done. To go on, raise the number: %s",
            run.run_dir, run.size.n_steps, _twice_as_long(run),
        )  # fmt: skip


def _twice_as_long(run: Run) -> str:
    """Return the command-line words that continue a finished run."""
    if run.phase.written is not None:
        return "--accept-change  (with one more phase in the config)"
    n_steps, begin = run.size.n_steps, run.shared.get("schedule_begin", 0)
    rises = rates_of_longer(run.args.optim, n_steps - begin, n_steps - begin, 2 * n_steps - begin)
    return f"steps={2 * n_steps}" + (" --accept-change" if rises else "")


def say_goodbye(run: Run, words: Sequence[str], before: dict[str, float], after: dict[str, float]) -> None:
    """Log the result and what to type next."""
    if not run.world.is_main:
        return
    from lingua.report.watch import Losses, bars

    folder = shlex.quote(str(run.run_dir))
    log.info(
        "finished: %d steps, %s tokens; everything is in %s", run.step, f"{run.shared['total_tokens']:,}", run.run_dir
    )
    losses = Losses(run.run_dir)
    losses.read()
    if len(values := losses.values) > 1:
        log.info("loss %.2f %s %.2f", values[0], bars(values, 50), values[-1])
    for source in run.held_out:
        key = f"{source.name}/bpb"
        if key in before and key in after:
            log.info("held-out bits per byte of %s: %.3f before, %.3f after", source.name, before[key], after[key])
    more, command = _twice_as_long(run), lingua_command()
    given = [word for word in words if not word.startswith("steps=") and word not in more.split()]
    if run.args.app != DEFAULT_APP and not any(word.startswith("app=") for word in given):
        given.append(f"app={run.args.app}")
    sample = run.args.sample_prompt
    prompt = "" if sample is None else " " + shlex.quote(f"prompt={sample}")  # without one, generate asks
    log.info(
        "next:\n  let it write\n    %s generate %s%s\n"
        "  train twice as long\n%s\n  look at the curves\n    %s report %s",
        command, folder, prompt, command_lines(f"{command} train", [*map(shlex.quote, given), more]), command, folder,
    )  # fmt: skip


def make_page(run_dir: Path) -> None:
    """Make the report page of a run that has ended, and log its path."""
    from lingua.report.facts import read_run  # pictures take seconds to import
    from lingua.report.history import read_history
    from lingua.report.page import write_report

    try:
        page, _ = write_report([read_history(read_run(run_dir), this_process())], None, None)
    except OSError as error:  # the run is finished all the same
        log.warning("no page of this run: %s; lingua report %s makes it later", error, run_dir)
    else:
        log.info("curves and config of this run, for a browser: %s", page.resolve())
