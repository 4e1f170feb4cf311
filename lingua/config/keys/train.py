"""Keys of a whole run. An app subclasses `TrainArgs` and chooses its model. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from lingua.config.base import Args, Part, Text, part_of, parts, show
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.config.keys.data import DEFAULT_SEED, DataArgs
from lingua.config.keys.distributed import DistributedArgs, EnvironmentArgs
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs, LauncherArgs, SlurmArgs
from lingua.config.keys.logging import LoggingArgs
from lingua.config.keys.model import CrossEntropyArgs, LlamaArgs, LossArgs, ModelArgs
from lingua.config.keys.optim import AdamWArgs, OptimArgs
from lingua.config.keys.phases import PhaseArgs
from lingua.config.keys.profiling import ProfilerArgs
from lingua.config.keys.watchdog import WatchdogArgs
from lingua.config.trust import DEFAULT_APP


class ValidationArgs(Args):
    """Held-out loss during training."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations. 0: never."""
    at_ends: bool = False
    """Also validate before the first and after the last step."""
    max_rows: Annotated[int, Field(ge=1)] = 64
    """Rows per source, taken from the start of its `*.val.jsonl`."""


SignalName = Literal["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"]
Action = Literal["stop", "save", "profile"]


class SignalsArgs(Args):
    """What a signal does. stop: end after the current step, with a checkpoint; save: save a checkpoint after the next
    step and go on; profile: open a light and a heavy window. Null: as stop_signals and profiling.signal say."""

    SIGINT: Action | None = None
    """Ctrl-C."""
    SIGTERM: Action | None = None
    """scancel, preemption, `kill`."""
    SIGUSR1: Action | None = None
    """Free for the user."""
    SIGUSR2: Action | None = None
    """What Slurm sends before the time limit to a job of `lingua launch`."""
    SIGHUP: Action | None = None
    """Closed terminal. Null: stop, unless profiling.signal is SIGHUP. Ignored under `nohup`."""


class TrainArgs(Args):
    """The config of a run."""

    name: Text = "lingua"
    """Name of the run."""
    dump_dir: Text = ""
    """Run folder. Empty: <dump_base>/<name>."""
    dump_base: Text = "out"
    """Folder that holds run folders."""
    app: Text = DEFAULT_APP
    """Package of the app that trains the run."""
    plugins: list[Text] = []
    """Modules imported before the config is checked; they register models, optimizers, schedules, losses."""
    seed: int = DEFAULT_SEED
    """Seed of all randomness in training; model.seed, data.seed and loss.seed follow it unless they are set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the run in optimizer steps. Null: from epochs or total_flops, otherwise 1000."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the sources."""
    total_flops: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in floating-point operations of forward and backward."""
    grad_acc_steps: Annotated[int, Field(ge=1)] | None = None
    """Micro steps per optimizer step. Null: from global_batch_size, otherwise 1."""
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    """G: rows per optimizer step over all ranks. Null: batch_size * grad_acc_steps * data-parallel ranks."""
    global_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """The same in tokens: G = global_batch_tokens / data.seq_len. Null: global_batch_size applies."""
    phases: list[PhaseArgs] = []
    """Consecutive parts of the run, each with its own keys. Empty: the config holds for the whole run."""
    gc_collect_freq: Annotated[int, Field(ge=1)] = 1000
    """Steps between garbage collections; Python's automatic collection is off in the loop."""
    probe_freq: Annotated[int, Field(ge=1)] | None = None
    """Steps between probes: statistics of activations, weights, gradients and attention (probe.jsonl). Null: none."""
    deterministic: bool = False
    """Make runs reproducible bit for bit, resumed ones too; costs speed."""
    signals: SignalsArgs = SignalsArgs()
    stop_signals: list[SignalName] = ["SIGINT", "SIGTERM", "SIGUSR2"]
    """Signals that stop the run, unless `signals` says otherwise."""
    sample_prompt: Text | None = None
    """Prompt that the model continues at the end of the run, for people to read (samples.jsonl). Null: none."""
    sample_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between such samples during training. Rank 0 then holds another copy of the whole model, in bf16 on a GPU.
    Null: only the one at the end."""
    data: DataArgs = DataArgs()
    optim: Annotated[SerializeAsAny[OptimArgs], part_of("optim", AdamWArgs)] = AdamWArgs()
    loss: Annotated[SerializeAsAny[Part], part_of("loss", CrossEntropyArgs)] = CrossEntropyArgs()
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", LlamaArgs)] = LlamaArgs(n_heads=8)
    distributed: DistributedArgs = DistributedArgs()
    env: EnvironmentArgs = EnvironmentArgs()
    checkpoint: CheckpointArgs = CheckpointArgs()
    watchdog: WatchdogArgs | None = WatchdogArgs()
    """When a run counts as hung. Null: never."""
    validation: ValidationArgs = ValidationArgs()
    profiling: ProfilerArgs = ProfilerArgs()
    logging: LoggingArgs = LoggingArgs()
    eval: EvalArgs | None = None
    """What to measure of each checkpoint of checkpoint.eval. Null: nothing."""
    async_eval_gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of an evaluation outside of the training process: a Slurm job per checkpoint if the run is a Slurm job,
    otherwise a process beside it. 0: on CPU. Null: evaluate in the training process, which pauses training."""
    launcher: LauncherArgs = LauncherArgs()
    slurm: SlurmArgs | None = None
    """Resources of an evaluation job, in Meta Lingua's keys. eval.launcher takes precedence."""

    @property
    def objective(self) -> LossArgs:
        """The loss as an objective; a plugin's that derives from Part alone predicts the next token."""
        return self.loss if isinstance(self.loss, LossArgs) else LossArgs(type=self.loss.type)

    def held_out_sizes(self) -> dict[str, int]:
        """Return the sizes of packed rows of held-out text (lingua/data/held_out.py)."""
        data, scored = self.data, self.objective.scored_tokens(self.data.seq_len)
        step = scored if data.row_step == data.seq_len else data.row_step
        return {"max_rows": self.validation.max_rows, "seq_len": scored, "row_step": step}

    def evaluation_job(self) -> JobArgs:
        """Return the resources of an evaluation's Slurm job."""
        slurm = self.slurm or SlurmArgs()
        n_gpus = slurm.ngpu if self.async_eval_gpus is None else self.async_eval_gpus
        return ((self.eval and self.eval.launcher) or slurm.as_job()).of_evaluation(n_gpus)

    def signals_that(self, action: Action) -> list[str]:
        """Return the signals with this action: `signals` overrides stop_signals, which overrides profiling.signal."""
        does: dict[str, str] = {"SIGHUP": "stop"}
        if self.profiling.signal is not None:
            does[self.profiling.signal] = "profile"
        does |= dict.fromkeys(self.stop_signals, "stop")
        does |= {name: chosen for name, chosen in self.signals if chosen is not None}
        return sorted(name for name, chosen in does.items() if chosen == action)

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.sample_every is not None and self.sample_prompt is None:
            text = f"sample_every is {self.sample_every}, but there is no prompt to continue"
            yield "sample_every", f"{text}; set sample_prompt or drop it"

    @model_validator(mode="before")
    @classmethod
    def _model_type(cls, tree: Any) -> Any:
        """Accept Meta Lingua's spelling of model.type: `model_type: minGRU`."""
        if not isinstance(tree, dict) or not isinstance(name := tree.get("model_type", 0), str | None):
            return tree
        others = {key: value for key, value in tree.items() if key != "model_type"}
        if name is None:  # frozen by an app that had the key
            return others
        if name.lower() not in (known := parts("model")):
            raise ValueError(f"model_type is {show(name)}; use one of {', '.join(sorted(known))}, as model.type")
        model = tree.get("model") or {}
        if isinstance(model, dict) and model.get("type", name.lower()) != name.lower():
            raise ValueError(f"model_type is {name}, but model.type is {model['type']}; remove model_type")
        return others | ({"model": {"type": name.lower(), **model}} if isinstance(model, dict) else {})

    @model_validator(mode="after")
    def _profiling_signal(self) -> Self:
        """Let `signals` take a signal from profiling.signal's default, so that a frozen config has no conflict."""
        name = self.profiling.signal
        if name and getattr(self.signals, name) and "signal" not in self.profiling.model_fields_set:
            object.__setattr__(self, "profiling", self.profiling.model_copy(update={"signal": None}))
        return self

    @model_validator(mode="after")
    def _eval_checkpoints(self) -> Self:
        """Save no checkpoints for evaluation without a section `eval`, unless the config sets checkpoint.eval."""
        if self.eval is None and "eval" not in self.checkpoint.model_fields_set:
            never = self.checkpoint.eval.model_copy(update={"every": 0})
            object.__setattr__(self, "checkpoint", self.checkpoint.model_copy(update={"eval": never}))
        return self

    @model_validator(mode="after")
    def _run_folder(self) -> Self:
        """Set the run folder from the config alone: a commit between two attempts must not lose the run."""
        written = "dump_dir" if self.dump_dir else "name"
        if not self.dump_dir:
            if not self.name:
                raise ValueError("name and dump_dir are both empty; set name, and the run folder is <dump_base>/<name>")
            if re.search(r"\$[\w{]", self.name):  # the frozen dump_dir would be expanded, as every path is
                raise ValueError(f"name is {self.name!r}; a run folder cannot hold a $, so remove it or set dump_dir")
            path = PurePath(self.name)
            if not path.parts or path.is_absolute() or ".." in path.parts:
                text = f"name is {self.name!r}, which is not a folder below dump_base"
                raise ValueError(f"{text}; choose a plain name, or set dump_dir")
            object.__setattr__(self, "dump_dir", f"{self.dump_base}/{self.name}")  # an assignment validates again
        for key, path in ((written, getattr(self, written)), ("checkpoint.path", self.checkpoint.path or "")):
            if any(len(os.fsencode(part)) > 255 for part in PurePath(path).parts):
                raise ValueError(f"{key} is {show(path)}; file systems take 255 bytes between slashes")
        return self

    @model_validator(mode="after")
    def _objective(self) -> Self:
        """Set what the objective needs of the model, unless the config says otherwise (then `conflicts` complains)."""
        stated = self.model.model_fields_set
        fields = type(self.model).model_fields
        if asked := {k: v for k, v in self.objective.asks_of_model.items() if k in fields and k not in stated}:
            object.__setattr__(self, "model", self.model.model_copy(update=asked))
        return self

    @model_validator(mode="after")
    def _seeds(self) -> Self:
        """Set the seeds that follow `seed`, so that a frozen config holds numbers."""
        for name in ("model", "data", "loss"):
            section = getattr(self, name)
            if getattr(section, "seed", self.seed) is None:
                object.__setattr__(self, name, section.model_copy(update={"seed": self.seed}))
        return self
