import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import pytest

from lingua import metrics as metrics_module
from lingua.metrics import JsonLines, LoggingArgs, MetricLogger, WandbArgs, read_metrics


class FullDisk(JsonLines):
    """A disk that refuses writes until there is room again."""

    room = False

    def _flush(self) -> None:
        if not self.room:
            raise OSError(28, "No space left on device")
        super()._flush()


def test_lines_held_by_a_full_disk_are_written_when_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lines = FullDisk(tmp_path / "metrics.jsonl")
    for step in range(3):
        lines.write({"global_step": step})
    assert caplog.text.count("No space left on device") == 1  # said once, not at every step
    lines.room = True
    lines.write({"global_step": 3})
    assert [record["global_step"] for record in read_metrics(lines.path)] == [0, 1, 2, 3]


def test_a_disk_that_is_really_full_does_not_raise(caplog: pytest.LogCaptureFixture):
    JsonLines(Path("/dev/full")).write({"global_step": 1})
    assert "the run goes on" in caplog.text


def test_a_line_torn_by_a_kill_does_not_swallow_the_next(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"global_step": 1}\n{"global_st')
    JsonLines(path).write({"global_step": 2})
    assert [record["global_step"] for record in read_metrics(path)] == [1, 2]


def test_every_line_says_when_and_in_which_incarnation(tmp_path: Path):
    with MetricLogger(
        tmp_path, LoggingArgs(), incarnation=3, run_name="x", config={}, wall_time=lambda: 0.0
    ) as metrics:
        metrics.log({"global_step": 1, "loss/out": 2.5})
        assert metrics.wandb_id is None
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"global_step": 1, "loss/out": 2.5, "incarnation": 3, "created_at": "1970-01-01T00:00:00+00:00"}
    ]


def test_wandb_offline_keeps_its_id_over_restarts_and_takes_steps_that_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "100")  # its service takes long to start on a busy machine
    args = LoggingArgs(wandb=WandbArgs(project="tests"))
    with MetricLogger(tmp_path, args, incarnation=1, run_name="x", config={"a": 1}) as metrics:
        first_id = metrics.wandb_id
        metrics.log({"global_step": 20, "loss/out": 1.0})
        metrics.log({"global_step": 10, "loss/out": 1.5})
    with MetricLogger(tmp_path, args, incarnation=2, run_name="x", config={}, wandb_id=first_id) as metrics:
        assert metrics.wandb_id == first_id
    runs = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run")]
    assert runs
    assert all(name.endswith(f"-{first_id}") for name in runs)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"logging\.tensorboard"):
        MetricLogger(tmp_path, LoggingArgs(tensorboard=True), incarnation=1, run_name="x", config={})


def test_metrics_are_one_json_object_per_line(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"global_step": 1, "a": 1.5})
    lines.write({"global_step": 2, "a": 2.5})
    assert [orjson.loads(line)["a"] for line in lines.path.read_bytes().splitlines()] == [1.5, 2.5]


# -- evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "training_id", "expected"),
    [
        (WandbArgs(), "ab12", ("ab12_eval", "x_eval", "x")),
        (WandbArgs(), None, ("x_eval", "x_eval", "x")),
        (
            WandbArgs(name="mine", group="all", id="ab12", resume_from="y?_step=3"),
            "ab12",
            ("ab12_eval", "mine_eval", "all"),
        ),
    ],
)
def test_evaluations_are_a_wandb_run_of_their_own_in_the_same_group(
    args: WandbArgs, training_id: str | None, expected: tuple[str, str, str]
) -> None:
    own = metrics_module.evaluation_wandb(args, "x", training_id)
    assert (own.id, own.name, own.group) == expected
    assert own.resume_from is None


def test_the_tracker_begins_with_the_first_evaluation_and_outlives_what_wandb_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []

    class Run:
        def log(self, record: dict[str, Any]) -> None:
            if record["global_step"] == 4:
                raise ConnectionError("no route to host")
            sent.append(record)

        def finish(self) -> None:
            sent.append("finished")

    def start(args: WandbArgs, *rest: Any) -> Run:
        sent.append(args.id)
        return Run()

    monkeypatch.setattr(metrics_module, "_start_wandb", start)
    tracker = metrics_module.EvaluationTracker(WandbArgs(), tmp_path, "x", {}, lambda step: f"of{step}")
    assert sent == []
    for step in (2, 4, 1):
        tracker.log({"global_step": step})
    tracker.close()
    assert sent == ["of2_eval", {"global_step": 2}, {"global_step": 1}, "finished"]
    assert "wandb does not take the evaluation of step 4: no route to host" in caplog.text
    off = metrics_module.EvaluationTracker(None, tmp_path, "x", {}, lambda step: None)
    off.log({"global_step": 2})
    off.close()
    assert len(sent) == 4
