"""The tasks of lm-evaluation-harness that a config names, loaded with their data.

Promise: importing this module needs no lm-eval and no torch; what is missing of lm-eval, or of a task's data, is a
ConfigError before anything of a model is loaded.
Cost: lm-eval takes seconds to import, and seconds more to read the index of its own tasks, where one of them is named.
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
    """A module of lm-eval. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.harness.tasks needs the package lm-eval; `uv sync --extra harness` or `pip install '.[harness]'` "
            "gets it; or set eval.harness=null"
        )
    return importlib.import_module(f"lm_eval{module}")


def cleaned(tasks: Sequence[str | Mapping[str, Any]]) -> list[Any]:
    """Tasks as harness takes them today: `trust_remote_code` is gone, since its data sets execute no code any more."""
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


def _need_index(tasks: Sequence[Any]) -> bool:
    """Whether harness's own task files are asked for: a task that is written out in the config needs none."""
    return not all(isinstance(task, dict) and "dataset_path" in task for task in tasks)


def task_manager(args: HarnessArgs) -> Any:
    """Harness's `TaskManager` for these tasks."""
    return _manager(args.include_path, _need_index(args.tasks))


@functools.cache
def _manager(include_path: str | None, with_index: bool) -> Any:
    return lm_eval(".tasks").TaskManager(include_path=include_path, include_defaults=with_index)


def load_tasks(args: HarnessArgs) -> list[str]:
    """Load each task with its data, which takes it from the network where that is allowed; returns their names.

    Raises ConfigError that names what cannot be had.
    """
    problems, tasks = [], cleaned(args.tasks)
    manager = task_manager(args)
    for task in tasks:
        try:
            manager.load([task])
        except Exception as error:  # of harness, of a task's own code, of the network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problems.append(
                f"eval.harness.tasks: {task_name(task)} cannot be loaded here ({type(error).__name__}: {reason}); "
                "where there is a network, run `lingua eval prefetch CONFIG`, or take it out"
            )
    if problems:
        raise ConfigError(problems)
    return [task_name(task) for task in args.tasks]


def be_offline() -> None:
    """From here on data sets are taken from the cache alone, unless the environment says otherwise."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
