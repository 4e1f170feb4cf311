"""Keys of `logging:`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from lingua.config.base import Args, Text

NO_TENSORBOARD = (
    "logging.tensorboard is true, but the package tensorboard is missing; `uv sync --extra tensorboard` or "
    "`pip install '.[tensorboard]'` installs it; or set logging.tensorboard=false"
)

NO_TRACKIO = (
    "logging.trackio is set, but the package trackio is missing; `uv pip install trackio` installs it (it is no extra, "
    "since it holds other packages back); or set logging.trackio=null"
)


class TrackioArgs(Args):
    """A trackio run, which needs no account; keys are those of `trackio.init`. `trackio show` displays it."""

    project: Text | None = None
    """Project. Null: the run's name."""
    name: Text | None = None
    """Name, under which a restart continues. Null: the run's name."""
    group: Text | None = None
    """Group of runs."""
    space_id: Text | None = None
    """Hugging Face Space to log to. Null: a folder on this machine (TRACKIO_DIR)."""
    server_url: Text | None = None
    """Self-hosted server to log to."""
    private: bool | None = None
    """Make a new Space private."""


class WandbArgs(Args):
    """Weights & Biases run; keys are those of `wandb.init`."""

    project: Text | None = None
    """Project."""
    entity: Text | None = None
    """Team or user. Null: the account's default."""
    name: Text | None = None
    """Display name. Null: the run's name."""
    group: Text | None = None
    """Group of the run and its evaluations. Null: the run's name."""
    tags: list[Text] | None = None
    """Tags."""
    notes: Text | None = None
    """Notes."""
    job_type: Text | None = None
    """Kind of job."""
    dir: Text | None = None
    """Folder for wandb's files. Null: <dump_dir>/wandb."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Null: online if there is an API key, otherwise offline."""
    id: Text | None = None
    """Run id. Null: chosen by the first attempt and kept across restarts."""
    config_exclude_keys: list[Text] | None = None
    """Config keys that are not sent."""
    config_include_keys: list[Text] | None = None
    """Only these config keys are sent."""
    anonymous: Text | None = None
    """Anonymous mode."""
    allow_val_change: bool | None = None
    """Let config values change on resume."""
    resume: bool | Text | None = None
    """wandb's own resume rule. Null: allow."""
    force: bool | None = None
    """Fail if nobody is logged in."""
    tensorboard: bool | None = None
    """Mirror TensorBoard."""
    sync_tensorboard: bool | None = None
    """Upload TensorBoard files."""
    monitor_gym: bool | None = None
    """wandb's monitor_gym, which Meta Lingua's configs contain."""
    save_code: bool | None = None
    """Upload the main script."""
    fork_from: Text | None = None
    """wandb's fork_from."""
    resume_from: Text | None = None
    """wandb's resume_from."""


class LoggingArgs(Args):
    """How often metrics are reported, and where."""

    freq: Annotated[int, Field(ge=1)] = 10
    """Steps between reports. Each has the mean loss of its steps (`loss/mean`) and that of the last (`loss/out`)."""
    wandb: WandbArgs | None = None
    """Null: no wandb."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs the extra `tensorboard`)."""
    trackio: TrackioArgs | None = None
    """Null: no trackio (needs the package `trackio`)."""

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            yield "logging.tensorboard", NO_TENSORBOARD
        if self.trackio is not None and importlib.util.find_spec("trackio") is None:
            yield "logging.trackio", NO_TRACKIO
