import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lingua.config.keys.logging import LoggingArgs, TrackioArgs, WandbArgs
from lingua.run import metrics as metrics_module
from lingua.run.metrics import JsonLines, MetricLogger, last_line, read_metrics
from lingua.run.tracking import Tracker


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
    assert "cannot write /dev/full" in caplog.text


def test_a_line_torn_by_a_kill_does_not_swallow_the_next(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"global_step": 1}\n{"global_st')
    JsonLines(path).write({"global_step": 2})
    assert [record["global_step"] for record in read_metrics(path)] == [1, 2]


def test_every_line_says_when_and_in_which_attempt(tmp_path: Path):
    with MetricLogger(tmp_path, LoggingArgs(), attempt=3, run_name="x", config={}, wall_time=lambda: 0.0) as metrics:
        metrics.log({"global_step": 1, "loss/out": 2.5})
        assert metrics.wandb_id is None
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"global_step": 1, "loss/out": 2.5, "incarnation": 3, "created_at": "1970-01-01T00:00:00+00:00"}
    ]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wandb without an account, on a machine that may be busy."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "100")  # its service takes long to start
    for name in ("BEGIN_S", "FINISH_S"):
        monkeypatch.setattr(metrics_module, name, 100.0)


@pytest.mark.soak
def test_wandb_offline_keeps_its_id_over_restarts_and_takes_steps_that_go_back(tmp_path: Path, offline: None):
    args = LoggingArgs(wandb=WandbArgs(project="tests"))
    with MetricLogger(tmp_path, args, attempt=1, run_name="x", config={"a": 1}) as metrics:
        first_id = metrics.wandb_id
        metrics.log({"global_step": 20, "loss/out": 1.0})
        metrics.log({"global_step": 10, "loss/out": 1.5})
    with MetricLogger(tmp_path, args, attempt=2, run_name="x", config={}, wandb_id=first_id) as metrics:
        assert metrics.wandb_id == first_id
    runs = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run")]
    assert runs
    assert all(name.endswith(f"-{first_id}") for name in runs)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"logging\.tensorboard"):
        MetricLogger(tmp_path, LoggingArgs(tensorboard=True), attempt=1, run_name="x", config={})


def test_trackio_gets_each_record_with_its_step_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake, said = ModuleType("trackio"), []

    class Run:
        def log(self, metrics: dict[str, Any], step: int) -> None:
            said.append((step, metrics))

        def finish(self) -> None:
            said.append("finished")

    def init(**settings: Any) -> Run:
        said.append(settings)
        return Run()

    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    config = {"seed": 1, "env": {"WANDB_API_KEY": "hush"}}
    args = LoggingArgs(trackio=TrackioArgs(project="p"))
    with MetricLogger(tmp_path, args, attempt=1, run_name="x", config=config) as metrics:
        metrics.log({"global_step": 2, "loss/out": 2.5})
        metrics.log_validation({"global_step": 1, "a/bpb": 3.0})  # of a step that comes again after a rollback
    begun, *records = said
    assert (begun["project"], begun["name"], begun["resume"]) == ("p", "x", "allow")
    assert begun["config"] == {"seed": 1, "env": {"WANDB_API_KEY": "***"}}
    assert records == [(2, {"loss/out": 2.5}), (1, {"validation/a/bpb": 3.0}), "finished"]


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_trackio_that_is_not_installed_is_named_before_the_run():
    assert [key for key, _ in LoggingArgs(trackio=TrackioArgs()).conflicts(None)] == ["logging.trackio"]


class FakeWandb(ModuleType):
    """The package wandb. A call of one of the names in `failing` raises."""

    def __init__(self, folder: Path) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.sent: list[Any] = []
        self.failing: set[str] = set()
        self.dir = str(folder / "wandb" / "offline-run-1" / "files")

    def _call(self, name: str) -> None:
        if name in self.failing:
            raise ConnectionError("no route to host")

    def init(self, **settings: Any) -> "FakeWandb":
        self.inits.append(settings)
        self._call(f"init {settings.get('mode')}")
        return self

    def define_metric(self, name: str, **how: str) -> None: ...

    def log(self, record: dict[str, Any]) -> None:
        self._call("log")
        self.sent.append(record)

    def finish(self, exit_code: int) -> None:
        self._call("finish")
        self.sent.append(f"finished {exit_code}")

    def teardown(self) -> None:
        self._call("teardown")


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return fake


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


def test_the_evaluations_run_begins_with_the_first_evaluation(tmp_path: Path, wandb: FakeWandb) -> None:
    tracker = metrics_module.EvaluationTracker(WandbArgs(), tmp_path, "x", {}, lambda step: f"of{step}")
    assert wandb.inits == []
    for step in (2, 4, 1):
        tracker.log({"global_step": step})
    tracker.close()
    assert [init["id"] for init in wandb.inits] == ["of2_eval"]
    assert wandb.sent == [{"global_step": 2}, {"global_step": 4}, {"global_step": 1}, "finished 0"]
    off = metrics_module.EvaluationTracker(None, tmp_path, "x", {}, lambda step: None)
    off.log({"global_step": 2})
    off.close()
    assert len(wandb.inits) == 1


# -- trackers that fail --------------------------------------------------------------------------------------------


def log_a_run(folder: Path, args: LoggingArgs, wandb_id: str | None = None) -> str | None:
    """Three records of training through a MetricLogger; returns the id to go on with."""
    with MetricLogger(folder, args, attempt=1, run_name="x", config={}, wandb_id=wandb_id) as metrics:
        for step in (1, 2, 3):
            metrics.log({"global_step": step})
    assert [record["global_step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    return metrics.wandb_id


def test_a_server_that_cannot_be_reached_means_offline(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
):
    wandb.failing = {"init None", "teardown"}
    run_id = log_a_run(tmp_path, LoggingArgs(wandb=WandbArgs()), "ab12")
    assert [(init["id"], init.get("mode")) for init in wandb.inits] == [("ab12", None), ("ab12", "offline")]
    assert run_id == "ab12"
    assert wandb.inits[0]["settings"] == {"init_timeout": metrics_module.WANDB_INIT_S}
    assert wandb.sent == [{"global_step": 1}, {"global_step": 2}, {"global_step": 3}, "finished 0"]
    assert "wandb: ConnectionError: no route to host; tracking offline from now on; upload what" in caplog.text
    assert f"`wandb sync {tmp_path}/wandb/offline-run-1`" in caplog.text


@pytest.mark.parametrize("failing", [{"init None", "init offline"}, {"log"}, {"finish"}, {"teardown"}])
def test_whatever_wandb_refuses_the_files_go_on(failing: set[str], tmp_path: Path, wandb: FakeWandb):
    wandb.failing = failing
    assert log_a_run(tmp_path, LoggingArgs(wandb=WandbArgs())) == wandb.inits[0]["id"]


@pytest.mark.parametrize(
    ("args", "wandb_id", "expected"),
    [
        ({}, None, {"resume": "allow"}),
        ({"fork_from": "y?_step=3"}, None, {"fork_from": "y?_step=3"}),
        ({"resume_from": "y?_step=3"}, None, {"resume_from": "y?_step=3", "id": "y"}),
        ({"fork_from": "y?_step=3"}, "ab12", {"resume": "allow", "id": "ab12"}),  # forked by the first start
        ({"resume_from": "y?_step=3"}, "y", {"resume": "allow", "id": "y"}),
        ({"resume": "must", "id": "z"}, "ab12", {"resume": "must", "id": "z"}),
    ],
)
def test_wandb_is_asked_for_one_way_of_going_on(args: dict[str, str], wandb_id: str | None, expected: dict[str, str]):
    settings = metrics_module.wandb_settings(WandbArgs.model_validate(args), Path("run"), "x", wandb_id)
    chosen = {key: settings[key] for key in ("resume", "fork_from", "resume_from") if key in settings}
    assert chosen == {key: value for key, value in expected.items() if key != "id"}
    assert settings["id"] == expected.get("id", settings["id"])


def test_a_stopped_run_and_one_that_failed_do_not_wait_long_for_their_trackers(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
):
    closed: list[tuple[int, float]] = []
    monkeypatch.setattr(Tracker, "close", lambda tracker, exit_code, within_s: closed.append((exit_code, within_s)))
    args = LoggingArgs(wandb=WandbArgs())
    with MetricLogger(tmp_path, args, attempt=1, run_name="x", config={}):
        pass
    with MetricLogger(tmp_path, args, attempt=2, run_name="x", config={}) as metrics:
        metrics.hurry()
    with pytest.raises(KeyError), MetricLogger(tmp_path, args, attempt=3, run_name="x", config={}):
        raise KeyError
    assert closed == [(0, metrics_module.FINISH_S)] + [(code, metrics_module.HURRIED_FINISH_S) for code in (0, 1)]


def test_a_tensorboard_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class FullWriter:
        def __init__(self, folder: str) -> None: ...

        def add_scalar(self, key: str, value: float, step: int) -> None:
            raise OSError(28, "No space left on device")

    package = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(package, "SummaryWriter", FullWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    log_a_run(tmp_path, LoggingArgs(tensorboard=True))
    assert (
        "tensorboard: OSError: [Errno 28] No space left on device; this attempt is no longer tracked there"
        in caplog.text
    )


def helpers_of_wandb() -> list[int]:
    """Processes of wandb below this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent, name = (folder / "stat").read_text().rpartition(")")[2].split()[1], (folder / "comm").read_text()
        except OSError:
            continue
        if int(parent) == os.getpid() and name.startswith("wandb"):
            found.append(int(folder.name))
    return found


@pytest.mark.soak
def test_wandbs_helper_process_is_killed_and_the_run_goes_on(
    tmp_path: Path, offline: None, caplog: pytest.LogCaptureFixture
):
    args, step = LoggingArgs(wandb=WandbArgs(project="tests")), 0
    with MetricLogger(tmp_path, args, attempt=1, run_name="x", config={}) as metrics:
        (helper,) = helpers_of_wandb()
        os.kill(helper, signal.SIGKILL)
        os.waitpid(helper, 0)
        while "tracking offline from now on" not in caplog.text:  # it is noticed at one of the next lines
            step += 1
            metrics.log({"global_step": step, "loss/out": 1.0})
            time.sleep(0.01)
        metrics.log({"global_step": step + 1, "loss/out": 1.0})
    assert [record["global_step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 2))
    runs = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run")]
    assert {name.split("-")[3] for name in runs} == {metrics.wandb_id}  # a folder of the same second gets one part more
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(str(tmp_path / "wandb" / name) in warning for name in runs)
    assert helpers_of_wandb() == []


def test_the_last_line_of_a_long_file(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"global_step": {i}, "pad": "{"x" * 100}"}}\n' for i in range(5000)))
    found = last_line(file)
    assert found is not None
    assert found["global_step"] == 4999
    file.write_text("")
    assert last_line(file) is None
    assert last_line(tmp_path / "nothing") is None
