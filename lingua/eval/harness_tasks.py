"""Load the tasks of lm-evaluation-harness that a config names, with their data.

Importing this module needs neither lm-eval nor torch. If lm-eval or the data of a task is missing, a ConfigError is
raised before a model is loaded. lm-eval takes seconds to import, and more to read the index of its own tasks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.keys.eval import HarnessArgs


def lm_eval(module: str = "") -> Any:
    """Return a module of lm-eval, with sandboxed templates. Raises ConfigError if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.harness.tasks needs the package lm-eval; `uv sync --extra harness` or `pip install '.[harness]'` "
            "installs it; or set eval.harness=null"
        )
    _sandbox()
    return importlib.import_module(f"lm_eval{module}")


@functools.cache
def _sandbox() -> None:
    """Restrict the templates of task definitions, so that they cannot reach anything in this process."""
    from jinja2.sandbox import SandboxedEnvironment

    utils = importlib.import_module("lm_eval.utils")
    sandboxed = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandboxed.filters.update(utils.env.filters)
    setattr(utils, "env", sandboxed)  # noqa: B010


def cleaned(tasks: Sequence[str | Mapping[str, Any]]) -> list[Any]:
    """Return tasks without `trust_remote_code`, which today's harness refuses, since data sets no longer run code."""
    found: list[Any] = []
    for task in tasks:
        if isinstance(task, str):
            found.append(task)
            continue
        settings = dict(task)
        kwargs = {k: v for k, v in (settings.pop("dataset_kwargs", None) or {}).items() if k != "trust_remote_code"}
        if kwargs:
            settings["dataset_kwargs"] = kwargs
        found.append(settings["task"] if settings.keys() == {"task"} else settings)
    return found


def task_name(task: str | Mapping[str, Any]) -> str:
    return task if isinstance(task, str) else str(task.get("task", task))


def task_manager(args: HarnessArgs) -> Any:
    """Return harness's `TaskManager`; tasks that are defined in the config do not need its index."""
    written_out = all(isinstance(task, dict) and "dataset_path" in task for task in args.tasks)
    return _manager(args.include_path, not written_out)


@functools.cache
def _manager(include_path: str | None, with_index: bool) -> Any:
    return lm_eval(".tasks").TaskManager(include_path=include_path, include_defaults=with_index)


def load_tasks(args: HarnessArgs) -> list[str]:
    """Load each task with its data, from the network if that is allowed; return their names.

    Raises ConfigError that names what cannot be loaded.
    """
    problems, tasks = [], cleaned(args.tasks)
    manager = task_manager(args)
    for task in tasks:
        try:
            manager.load([task])
        except Exception as error:  # from harness, a task's own code, or the network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problems.append(
                f"eval.harness.tasks: {task_name(task)} cannot be loaded here ({type(error).__name__}: {reason}); "
                "run `lingua eval prefetch CONFIG` on a machine with a network, or remove the task"
            )
    if problems:
        raise ConfigError(problems)
    return [task_name(task) for task in args.tasks]


def be_offline() -> None:
    """Read data sets only from the cache from now on, unless the environment says otherwise."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
