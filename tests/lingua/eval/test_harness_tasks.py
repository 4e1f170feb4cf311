"""Which tasks a config names, as harness takes them; loading them is tested in test_harness.py, with harness itself."""

from __future__ import annotations

import pytest

from lingua.config.base import ConfigError
from lingua.config.keys.eval import HarnessArgs
from lingua.eval import harness_tasks
from lingua.eval.harness_tasks import cleaned, load_tasks


def test_settings_that_are_gone_are_taken_out() -> None:
    boolq = {"task": "boolq", "dataset_kwargs": {"trust_remote_code": True}}
    assert cleaned(["piqa", boolq]) == ["piqa", "boolq"]
    assert cleaned([boolq | {"num_fewshot": 2}]) == [{"task": "boolq", "num_fewshot": 2}]
    kept = {"task": "x", "dataset_kwargs": {"data_files": "a"}}
    assert cleaned([kept]) == [kept]


def test_without_the_package_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package lm-eval; `uv sync --extra harness`"):
        load_tasks(HarnessArgs(tasks=["piqa"]))
