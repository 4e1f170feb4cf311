"""Which published checkpoints still need an evaluation. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lingua.args import Args, Text
from lingua.metrics import LoggingArgs, WandbArgs
from lingua.schema import GeneratorArgs


class HarnessArgs(Args):
    """lm-evaluation-harness; keys are those of its `simple_evaluate`."""

    tasks: list[Text | dict[str, Any]] = []
    """Task names, or mappings with `task` and its settings."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question. Null: the task's own."""
    device: Text | None = None
    """Kept for lingua's configs; generator.device decides."""
    use_cache: Text | None = None
    """File of cached answers."""
    cache_requests: bool = False
    """Cache built requests."""
    rewrite_requests_cache: bool = False
    """Build that cache anew."""
    delete_requests_cache: bool = False
    """Delete that cache."""
    limit: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    """Questions per task (a fraction: share of them). Null: all."""
    bootstrap_iters: Annotated[int, Field(ge=0)] = 100000
    """Resamples for standard errors."""
    check_integrity: bool = False
    """Run the tasks' own checks."""
    write_out: bool = False
    """Print the first prompts."""
    log_samples: bool = True
    """Keep every question and answer."""
    system_instruction: str | None = None
    """System text before every prompt."""
    apply_chat_template: bool | Text = False
    """Wrap prompts in the chat template."""
    fewshot_as_multiturn: bool = False
    """Examples as turns of a conversation."""
    gen_kwargs: Text | dict[str, Any] | None = None
    """Overrides for generation tasks."""
    verbosity: Text = "INFO"
    """Log level of the harness."""
    predict_only: bool = False
    """Answers without scores."""
    random_seed: int = 0
    """Seed of python's random."""
    numpy_random_seed: int = 1234
    """Seed of numpy."""
    torch_random_seed: int = 1234
    """Seed of torch."""
    fewshot_random_seed: int = 1234
    """Seed of the examples' choice."""


class EvalValidationArgs(Args):
    """Held-out loss at evaluation."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Documents per source and rank, at most. Null: all."""
    use_val_from_train_src: bool = True
    """Use the `*.val.jsonl` beside the training sources."""
    root_dir: str = ""
    """Folder of further held-out sources."""
    sources: list[Text] | dict[str, Any] = []
    """Further held-out sources under root_dir."""


class EvalArgs(Args):
    """What an evaluation measures."""

    name: Text = "evals"
    """Name of the evaluation."""
    dump_dir: str | None = None
    """Where results go. Null: <run>/evals."""
    metric_log_dir: str | None = None
    """Where metrics.eval.jsonl is. Null: the run folder."""
    ckpt_dir: str = ""
    """Checkpoint to evaluate."""
    generator: GeneratorArgs = GeneratorArgs()
    """Sampling and scoring."""
    harness: HarnessArgs | None = HarnessArgs()
    """lm-evaluation-harness. Null: not run."""
    validation: EvalValidationArgs | None = EvalValidationArgs()
    """Held-out loss. Null: not measured."""
    wandb: WandbArgs | None = None
    """wandb run of a hand-started evaluation."""
    logging: LoggingArgs | None = None
    """Logging of a hand-started evaluation."""
    core_metrics: dict[str, float] | None = None
    """Weight of each metric in `core_eval/overall_avg`."""
    terminal_eval_wandb: bool = False
    """After the last evaluation, one wandb run with training and evaluation metrics joined."""
    wipe_ckpt: bool = False
    """Give a checkpoint up to retention as soon as it is evaluated."""
    global_step: int | None = None
    """Step the checkpoint belongs to. Null: from its name."""
