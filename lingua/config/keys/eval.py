"""Keys of `eval:`: what to measure of each checkpoint, and when to give up. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from lingua.config.base import Anything, Args, Part, Text, part_of, register
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.launch import JobArgs
from lingua.config.keys.logging import LoggingArgs, WandbArgs


class MeasureArgs(Part):
    """A measure of each checkpoint. User code adds its own with `@register("measure", name)`.

    The builder takes (these args, the run's args, the section eval) and returns a `Measure` (lingua/eval/measures.py).
    It raises ConfigError if anything is missing.
    """


@register("measure", "harness")
class HarnessArgs(MeasureArgs):
    """lm-evaluation-harness; keys are those of its `simple_evaluate`."""

    builder: ClassVar[str] = "lingua.eval.harness:build_harness"

    type: Literal["harness"] = "harness"
    tasks: list[Text | dict[str, Anything]] = []
    """Task names, or mappings with `task` and its settings."""
    include_path: Text | None = None
    """Folder of additional task files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question. Null: the task's own."""
    use_cache: Text | None = None
    """File that caches answers."""
    cache_requests: bool = False
    """Cache built requests."""
    rewrite_requests_cache: bool = False
    """Rebuild that cache."""
    delete_requests_cache: bool = False
    """Delete that cache."""
    limit: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] | None = None
    """Questions per task (a fraction: share of them). Null: all."""
    bootstrap_iters: Annotated[int, Field(ge=0)] = 100000
    """Resamples for standard errors."""
    check_integrity: bool = False
    """Run the tasks' own checks."""
    write_out: bool = False
    """Print the first prompts."""
    log_samples: bool = True
    """Save every question and answer in evals/<step>/samples.json."""
    system_instruction: Text | None = None
    """System text before every prompt."""
    apply_chat_template: bool | Text = False
    """Wrap prompts in the chat template."""
    fewshot_as_multiturn: bool = False
    """Present examples as turns of a conversation."""
    gen_kwargs: Text | dict[str, Anything] | None = None
    """Overrides for generation tasks."""
    verbosity: Text = "INFO"
    """Log level of the harness."""
    predict_only: bool = False
    """Generate answers without scoring them."""
    random_seed: int = 0
    """Seed of Python's random."""
    numpy_random_seed: int = 1234
    """Seed of numpy."""
    torch_random_seed: int = 1234
    """Seed of torch."""
    fewshot_random_seed: int = 1234
    """Seed of the choice of examples."""


@register("measure", "held_out")
class HeldOutArgs(MeasureArgs):
    """Held-out loss at evaluation."""

    builder: ClassVar[str] = "lingua.eval.measures:build_held_out"

    type: Literal["held_out"] = "held_out"
    context: Literal["document", "packed"] = "document"
    """What precedes a token. document: only its own document; logged as documents/<source>/*. packed: the row that
    training packs, so the loss equals training's for the same validation.max_rows; logged as validation/<source>/*."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Maximum documents per source. Null: all. For context: document."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which the window advances in a document longer than max_seqlen. Each token is scored once, with at
    least max_seqlen - stride tokens before it; a smaller stride costs more. Null: half of max_seqlen. For context:
    document."""
    use_val_from_train_src: bool = True
    """Use the `*.val.jsonl` beside the training sources."""
    root_dir: Text = ""
    """Folder of additional held-out sources."""
    sources: list[Text] | dict[str, Anything] = []
    """Additional held-out sources under root_dir."""


class EvalArgs(Args):
    """What to measure of checkpoints, and how."""

    name: Text = "evals"
    """Name of the evaluation."""
    dump_dir: Text | None = None
    """Folder of the results. Null: <run>/evals."""
    metric_log_dir: Text | None = None
    """Folder of metrics.eval.jsonl. Null: the run folder."""
    ckpt_dir: Text = ""
    """Checkpoint to evaluate."""
    ema: bool = False
    """Evaluate the moving average that optim.ema keeps instead of the weights."""
    generator: GeneratorArgs = GeneratorArgs()
    """Sampling and scoring."""
    harness: HarnessArgs | None = HarnessArgs()
    """lm-evaluation-harness. Null: not run."""
    validation: HeldOutArgs | None = HeldOutArgs()
    """Held-out loss. Null: not measured."""
    measures: list[Annotated[SerializeAsAny[MeasureArgs], part_of("measure")]] = []
    """Additional measures, each chosen by its `type`: held_out, harness, or a plugin's."""
    plugins: list[Text] = []
    """Modules imported before the config is checked, in addition to the run's; they register measures."""
    wandb: WandbArgs | None = None
    """wandb run of an evaluation started by hand."""
    logging: LoggingArgs | None = None
    """Logging of an evaluation started by hand."""
    core_metrics: dict[str, float] | None = None
    """Weight of each metric (<task>/<metric>, or a task for its first metric) in `core_eval/overall_avg`."""
    global_step: int | None = None
    """Step of the checkpoint. Null: from its name."""
    newest_first: bool = False
    """Evaluate the newest waiting checkpoint first. false: in order."""
    launcher: JobArgs | None = None
    """Resources of each evaluation's Slurm job. Null: those of the section `slurm`."""
    automatic: bool = True
    """true: the run evaluates its checkpoints, in its own processes or with an evaluator that it starts (see
    async_eval_gpus). false: only `lingua eval` does."""
    poll_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between checks for new checkpoints."""
    max_tries: Annotated[int, Field(ge=1)] = 3
    """Failures after which the evaluator gives up on a checkpoint; the reason is in evals/<step>/failed.json."""
    backoff_s: Annotated[float, Field(ge=0)] = 60.0
    """Pause after the first failure of a checkpoint; doubles after each further one."""
    timeout_hours: Annotated[float, Field(gt=0)] = 12.0
    """An evaluation that takes longer counts as failed. With --slurm, time in the queue counts too."""
    max_pinned_hours: Annotated[float, Field(gt=0)] = 24.0
    """How long retention keeps a checkpoint for its evaluation; after that it may be deleted, with an error in the
    log."""
    idle_hours: Annotated[float, Field(gt=0)] = 24.0
    """An idle evaluator ends when its run has been silent this long."""

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.ema and args.optim.ema is None:
            yield "eval.ema", "eval.ema is true, but the run keeps no average of its weights; set optim.ema"

    def chosen(self) -> list[MeasureArgs]:
        """Return the measures, in order."""
        harness = self.harness if self.harness is not None and self.harness.tasks else None
        return [one for one in (self.validation, harness, *self.measures) if one is not None]
