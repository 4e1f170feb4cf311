"""The command `eval`. Imports torch only if this process evaluates a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from lingua.checkpoint import layout
from lingua.checkpoint.lookup import Checkpoint, run_root
from lingua.config.base import MOVED, ConfigError, unknown_key
from lingua.config.command_line import CommandLine, app_module, app_schema, choose_app, parse_command_line, with_ckpt
from lingua.config.compose import compose, ignored_keys
from lingua.config.keys.eval import EvalArgs, HarnessArgs
from lingua.config.keys.phases import PhaseArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.yaml_layers import COMMAND_LINE, stack_layers
from lingua.console import show_json
from lingua.distributed.meeting import told_to_others
from lingua.distributed.place import find_rank_info
from lingua.eval.evaluator import Beat, Evaluator, MeasureCheckpoint, read_results, write_results
from lingua.eval.harness_tasks import load_tasks
from lingua.eval.slurm_jobs import EvalJobs
from lingua.eval.spawn import alone
from lingua.files import RunError, make_folder, read_json
from lingua.logger import start_logging
from lingua.run.find import find_run
from lingua.run.folder import EXIT_FINISHED, end_asked_for
from lingua.run.metrics import EvaluationTracker
from lingua.scheduler import Runner, run_command
from lingua.signals import SignalFlag, StopSignals, noted
from lingua.train.describe import config_of, described, phases_in

log = logging.getLogger(__name__)

OTHER_ROWS = "documents/: each document alone. Training logs another number, of packed rows (validation.context=packed)"
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR2")


def evaluate(words: list[str], app: str, usage: str) -> int:
    """Run the evaluation that a command line asks for; return the exit code. `app`: the package of this command."""
    if words[:1] == ["prefetch"]:
        return prefetch(words[1:])
    line = parse_command_line(with_ckpt(words), ["once", "json", "alone", "slurm"])
    if line.flags.get("help"):
        print(usage)
        return 0
    request = read_command_line(line)
    if request.has("slurm"):
        start_logging(own_packages=("lingua",))
        return follow_by_jobs(request)
    if request.app != app:
        return app_module(request.app, "eval").main(words)
    return evaluate_here(request)


# -- command line --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRequest:
    """The evaluation that a command line asks for."""

    place: str
    """The checkpoint, or the run to follow."""
    follow: bool
    run_config: Path
    """Config of the model."""
    measures: str | None
    """Config of the measures, or None for the run's own."""
    line: CommandLine
    """The command line; its overrides are keys of the section `eval`."""
    app: str
    """Package of the app whose model is evaluated."""

    def has(self, flag: str) -> bool:
        return bool(self.line.flags.get(flag))

    def compose(self) -> tuple[TrainArgs, EvalArgs]:
        """Return (config of the run, section `eval`). Raises ConfigError."""
        if self.measures is not None or self.run_config.suffix == ".json":  # weights of other programs have no `eval`
            run_args = described(self.run_config, self.app)
            args = compose(self.measures, self.line.overlays, self.line.overrides, EvalArgs).args
        else:
            run_args = self._run_args()
            args = run_args.eval or EvalArgs()
        if self.follow and args.dump_dir:
            raise ConfigError(f"eval.dump_dir is {args.dump_dir}: results go to {self.place}/evals; take it out")
        return run_args, args

    def by_phase(self, run_args: TrainArgs) -> list[tuple[int, EvalArgs]]:
        """Return (last step, section `eval`) of each phase of the run; the command line overrides phases."""

        def words(phase: PhaseArgs) -> list[str]:
            changes = {key: value for key, value in phase.changes.items() if key.startswith("eval.")}
            return [f"{key}={orjson.dumps(value).decode()}" for key, value in changes.items()]

        phases = phases_in(run_args) if self.measures is None else []
        if not any(words(phase) for _, phase in phases):
            return []
        return [(last, self._run_args(words(phase)).eval or EvalArgs()) for last, phase in phases]

    def _run_args(self, changes: Sequence[str] = ()) -> TrainArgs:
        overrides = [*changes, *(f"eval.{word}" for word in self.line.overrides)]
        try:
            return compose(str(self.run_config), self.line.overlays, overrides, app_schema(self.app)).args
        except ConfigError as error:
            raise ConfigError([_as_typed(problem) for problem in error.problems]) from None


def _as_typed(problem: str) -> str:
    """Rewrite a finding about an unknown key as the user typed it: without `eval.`, also in suggestions."""
    found = re.match(rf"{COMMAND_LINE}: unknown key eval\.([\w.]+)", problem)
    if found is None or f"eval.{found[1]}" in MOVED:
        return problem
    key = tuple(int(name) if name.isdigit() else name for name in found[1].split("."))
    return f"{COMMAND_LINE}: {unknown_key(key, EvalArgs)}"


def read_command_line(line: CommandLine) -> EvalRequest:
    """Parse the words of a command line. Raises ConfigError."""
    own, overrides = {}, []
    for word in line.overrides:
        name, _, value = word.partition("=")
        if name in ("ckpt", "ckpt_dir", "follow", "app"):
            own[name] = value
        else:
            overrides.append(word)
    place = own.get("follow") or own.get("ckpt") or own.get("ckpt_dir")
    if not place:
        raise ConfigError("command line: nothing to evaluate; write ckpt=RUN_OR_FOLDER, or follow=RUN")
    if "follow" in own:
        find_run(Path(place))
    is_of_run = line.config is not None and not is_about_measures(line.config)
    run_config = Path(line.config) if is_of_run and line.config else config_of(place)
    return EvalRequest(
        place=place,
        follow="follow" in own,
        run_config=run_config,
        measures=None if is_of_run else line.config,
        line=CommandLine(line.config, line.overlays, overrides, line.flags),
        app=own.get("app") or choose_app(CommandLine(config=str(run_config))),
    )


def is_about_measures(config: str) -> bool:
    """Return whether a config is only a section `eval` and not a whole run."""
    known = EvalArgs.model_fields.keys() | {key[0] for key in ignored_keys(EvalArgs)}
    return stack_layers(config, [], [], EvalArgs).tree.keys() <= known


def prefetch(words: list[str]) -> int:
    """Download the data of a config's harness tasks into Hugging Face's cache, from which jobs read it."""
    line = parse_command_line(words)
    if line.config is None:
        raise ConfigError("command line: no config whose data sets are fetched; write lingua eval prefetch CONFIG")
    if is_about_measures(line.config):
        args = compose(line.config, line.overlays, line.overrides, EvalArgs).args
    else:
        args = compose(line.config, line.overlays, line.overrides, app_schema(choose_app(line))).args.eval or EvalArgs()
    names = [name for one in args.chosen() if isinstance(one, HarnessArgs) for name in load_tasks(one)]
    for name in names:
        print(f"{name}: there")
    if not names:
        print(f"{line.config} names no harness tasks; there is nothing to fetch")
    return 0


# -- one checkpoint, or each of a run ------------------------------------------------------------------------------


def evaluate_here(request: EvalRequest) -> int:
    """Evaluate in this process, with the other ranks if there are any; return the exit code."""
    with told_to_others(find_rank_info()):
        run_args, args = request.compose()
        phases = request.by_phase(run_args)
    from lingua.eval.measures import Together, started  # loads torch: errors in the config come first

    with started(run_args, args, request.app, phases) as measures:
        if not request.follow:
            found = measures.measure(request.place, lambda: None)
            if measures.world.is_main:
                show(request.place, found, args.dump_dir, as_json=request.has("json"))
            return EXIT_FINISHED
        ranks = Together(measures.measure)
        with heard() as signals:  # all ranks get signals, and rank 0 decides

            def measure(checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
                return ranks.measure(f"{checkpoint.run_dir}@{checkpoint.step}", beat)

            def sleep(seconds: float) -> None:
                ranks.keep_waiting()
                signals.wait(seconds)

            exit_code = ranks.led_by_main(lambda: follow(request, run_args, args, measure, signals, sleep))
        return EXIT_FINISHED if exit_code is None else exit_code


@contextmanager
def heard() -> Iterator[StopSignals]:
    """Handle the signals that end an evaluator, and ignore SIGUSR1: `scancel --signal=USR1` is meant for the ranks."""
    with StopSignals(SIGNALS) as signals, noted(["SIGUSR1"], SignalFlag()):
        yield signals


def follow_by_jobs(request: EvalRequest, run: Runner = run_command) -> int:
    """Follow a run with one Slurm job per evaluation; return the exit code. Raises ConfigError."""
    if not request.follow:
        raise ConfigError("command line: --slurm makes a job for each checkpoint of a run; write follow=RUN with it")
    if request.line.config or request.line.overlays:
        raise ConfigError(
            "with --slurm what is measured is the section eval of the run's config; change it by KEY=VALUE"
        )
    run_args, args = request.compose()
    with heard() as signals:
        jobs = EvalJobs(
            Path(request.place).absolute(), request.app, request.line.overrides,
            run_args.evaluation_job(), Path.cwd(), poll_s=args.poll_s, run=run, sleep=signals.wait,
        )  # fmt: skip
        return follow(request, run_args, args, jobs.measure, signals, signals.wait)


def follow(
    request: EvalRequest,
    run_args: TrainArgs,
    args: EvalArgs,
    measure: MeasureCheckpoint,
    signals: StopSignals,
    sleep: Callable[[float], None],
) -> int:
    """Evaluate the run's checkpoints as they appear; return the exit code.

    With `--alone`, return at once if the run has started an evaluator already.
    """
    run_dir = Path(request.place)
    with ExitStack() as stack:
        if request.has("alone") and not stack.enter_context(alone(run_dir)):
            return EXIT_FINISHED
        config = run_args.model_dump(mode="json")
        id_at = partial(training_id, run_dir)
        tracker = EvaluationTracker(run_args.logging.wandb, run_dir, run_args.name, config, id_at)
        stack.callback(lambda: tracker.close(hurry=signals.received is not None))
        evaluator = Evaluator(
            run_dir,
            args,
            measure,
            on_record=tracker.log,
            stopping=lambda: signals.received is not None,
            sleep=sleep,
        )
        log.info("evaluating the checkpoints of %s", run_dir)
        log.info("the evaluator of %s ends: %s", run_dir, evaluator.follow(once=request.has("once")))
    if signals.received is not None:
        return end_asked_for(signals.received)[1]
    if request.has("once") or request.has("json"):
        show_newest(run_dir, as_json=request.has("json"))
    return EXIT_FINISHED


def show_newest(run_dir: Path, *, as_json: bool) -> None:
    """Print the results of the newest evaluated checkpoint, if there is one."""
    for step in layout.evaluated_steps(run_dir)[-1:]:
        if (there := read_results(layout.evaluation(run_dir, step))) is not None:  # unless the run went back meanwhile
            print("" if as_json else f"{run_dir}@{step}\n", end="")
            show(f"{run_dir}@{step}", there[1], None, as_json=as_json)


def training_id(run_dir: Path, step: int) -> str | None:
    """Return the tracking id in a published checkpoint, or None if it has none or is gone."""
    try:
        state = read_json(layout.folder(run_root(run_dir), step) / layout.train_state_file(0))
        return state["shared"].get("tracking_id")
    except (OSError, RunError, KeyError, TypeError, AttributeError):
        return None


def show(ckpt: str, found: Mapping[str, Any], dump_dir: str | None, *, as_json: bool) -> None:
    """Print results, and write them to `dump_dir` if given."""
    if dump_dir:
        write_results(make_folder(Path(dump_dir), "eval.dump_dir"), {"ckpt": ckpt}, found)
    metrics = {name: value for name, value in found.items() if name not in ("details", "samples")}
    if as_json:
        show_json({"ckpt": ckpt, "details": found.get("details", {}), "metrics": metrics})
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:,.6g}")
    if any(name.startswith("documents/") for name in metrics):
        print(OTHER_ROWS)
