"""wandb fails or never answers, in a real run: the run ends as without it, and the next start goes on."""

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest

import lingua.run.metrics
from lingua.run.metrics import read_metrics
from tests.trainer import TINY, Hook, published, train

WORDS = [*TINY, "steps=4", "checkpoint.dump.every=2", "logging.wandb={project: tests, mode: online}"]


def with_wandb(bad_call: str, act: Any) -> Hook:
    """Hook: a package wandb whose calls of this name are `act`."""

    def hook(rank: int) -> None:
        run = ModuleType("run")
        package = ModuleType("wandb")
        names = {"dir": "wandb/run-1/files", "log": ignore, "define_metric": ignore, "finish": ignore}
        run.__dict__.update(names)
        package.__dict__.update(init=lambda **settings: run, teardown=ignore)
        (package if bad_call == "init" else run).__dict__[bad_call] = act
        sys.modules["wandb"] = package
        lingua.run.metrics.BEGIN_S = lingua.run.metrics.FINISH_S = 0.1

    return hook


def ignore(*args: Any, **kwargs: Any) -> None:
    pass


def refuse(*args: Any, **kwargs: Any) -> None:
    raise ConnectionResetError("Connection lost")


def block(*args: Any, **kwargs: Any) -> None:
    threading.Event().wait()


@pytest.mark.parametrize(
    ("bad_call", "act", "said"),
    [
        ("log", refuse, "wandb: ConnectionResetError: Connection lost; this attempt is no longer tracked there"),
        pytest.param(
            "init",
            refuse,
            "wandb: ConnectionResetError: Connection lost; this attempt is no longer tracked there",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "init",
            block,
            "wandb: it did not end within 0.1 s; this attempt is no longer tracked there",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "log",
            block,
            "wandb: it did not end within 0.1 s; this attempt is no longer tracked there",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_run_finishes_and_its_files_are_whole(bad_call: str, act: Any, said: str, tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    result = train(words, hook=with_wandb(bad_call, act))
    assert result.exit_code == 0, result.output
    assert result.output.count(said) == 1
    assert [record["global_step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert published(tmp_path) == [2, 4]
    assert orjson.loads((tmp_path / "stop.json").read_bytes())["reason"] == "finished"
    assert not list((tmp_path / "logs").glob("error_*"))

    assert train([*words, "steps=6", "--accept-change"], hook=with_wandb(bad_call, act)).exit_code == 0
    assert published(tmp_path)[-1] == 6
