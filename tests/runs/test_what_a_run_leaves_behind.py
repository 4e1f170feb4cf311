"""The run folder: config with origins, command, metrics, validation, profile; nothing secret."""

import gzip
import logging
import os
from pathlib import Path

import orjson
import pytest
import yaml

import apps.main.loop
from lingua.report.facts import read_run
from lingua.report.history import read_history
from lingua.report.page import write_report
from lingua.report.status import status_of
from lingua.run.lock import this_process
from lingua.run.metrics import read_metrics
from lingua.run.watchdog import Watchdog
from lingua.train.learner import Run
from tests.lingua.test_masking import VARIABLES
from tests.trainer import TINY, at_step, kill_self, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [*TINY, "steps=6", f"dump_dir={folder}", "logging.freq=2", "validation.every=3", "validation.at_ends=true"]
    words += ["profiling.run=true", "profiling.profile_warmup=1", "profiling.profile_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "s3cret-s3cret")
        patch.setenv("HF_TOKEN", "s3cret-s3cret")
        result = train(words)
    assert result.exit_code == 0, result.output
    return folder


def test_metrics_have_the_names_that_plots_expect(run_dir: Path):
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["global_step"] for record in records] == [2, 4, 6]
    assert all("loss/mean" in record for record in records)
    expected = {
        "global_step", "acc_step", "speed/wps", "speed/FLOPS", "speed/curr_iter_time",
        "speed/data_load_time", "optim/grad_norm", "optim/lr", "optim/total_tokens", "loss/out", "created_at",
        "incarnation", "checkpoint/age_of_newest_done_s", "checkpoint/lost_work_at_risk_s", "data/bad_lines",
    }  # fmt: skip
    assert expected <= set(records[-1])
    assert any(key.startswith("memory/") for key in records[-1])
    assert records[-1]["optim/total_tokens"] == 6 * 2 * 32
    assert not {"speed/mfu", "speed/hfu"} & set(records[-1])  # shares of a peak that no data sheet states for a CPU


def test_validation_has_lines_of_its_own_before_between_and_after(run_dir: Path):
    records = read_metrics(run_dir / "metrics.validation.jsonl")
    assert [record["global_step"] for record in records] == [0, 3, 6]
    assert records[-1]["python_stdlib/bpb"] < records[0]["python_stdlib/bpb"]


def test_what_the_start_took_is_logged_and_reported(run_dir: Path):
    facts = read_run(run_dir)
    parts = status_of(facts, this_process()).startup
    assert parts is not None
    assert list(parts) == [
        "s",
        "python",
        "config",
        "torch",
        "ranks",
        "model",
        "weights",
        "data",
        "trackers",
        "first step",
    ]
    assert parts["s"] == pytest.approx(sum(parts.values()) / 2)
    first, *rest = read_metrics(run_dir / "metrics.jsonl")
    assert first["startup/s"] == pytest.approx(parts["s"])
    assert not [record for record in rest if "startup/s" in record]  # once an attempt
    assert f" s: python {parts['python']:.1f}, config " in (run_dir / "train.log").read_text()
    history = read_history(facts, this_process())
    assert history.attempts[0].startup["torch"] == parts["torch"]
    assert history.seconds["starting"] == pytest.approx(parts["s"])


def test_what_became_of_each_checkpoint_has_a_line(run_dir: Path):
    records = read_metrics(run_dir / "metrics.checkpoint.jsonl")
    assert (records[0]["event"], records[0]["global_step"]) == ("begun", 0)
    published = [record["global_step"] for record in records if record["event"] == "published"]
    assert published[-1] == 6
    assert all(record["incarnation"] == 1 and record["created_at"] for record in records)
    validations = read_metrics(run_dir / "metrics.validation.jsonl")
    assert all(record["seconds"] > 0 for record in validations)


def test_the_config_is_kept_with_the_place_of_every_value(run_dir: Path):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    origin = yaml.safe_load((run_dir / "config.origin.yaml").read_text())
    assert config["model"]["dim"] == 32
    assert config["global_batch_size"] == 2
    assert origin["model.dim"] == "command line"
    assert origin["optim.lr"].startswith("apps/main/configs/bytes.yaml:")
    assert origin["optim.beta1"] == "default"


def test_what_ran_is_recorded(run_dir: Path):
    record = orjson.loads((run_dir / "run.json").read_bytes())
    assert record["attempt"] == 1
    assert record["command"][1:3] == ["-m", "apps.main.train"]
    assert record["packages"]["torch"] == record["torch"].partition("+")[0]
    assert record["code"].keys() == {"the code of lingua", "the code of apps.main"}
    assert (record["device"], record["ranks"]) == ("CPU", 1)
    assert record["host"]
    assert {"commit", "diff", "untracked"} <= record.keys()


def test_no_secret_is_left_anywhere(run_dir: Path):
    for file in run_dir.rglob("*"):
        if file.is_file():
            assert b"s3cret" not in file.read_bytes(), file


@pytest.mark.soak
def test_forty_spellings_of_secrets_are_in_no_file_of_a_run_and_its_report(tmp_path: Path):
    variables = {f"{prefix}_{name}": f"s3cr3t-{i}" for i, name in enumerate(VARIABLES) for prefix in ("HF", "UV")}
    words = [*TINY, f"dump_dir={tmp_path}", "steps=3", "logging.wandb.mode=offline"]
    words += ["data.root_dir=s3://AKID:s3cr3t-a/b@bucket/x"]
    words += [f"launcher.env.set.{name}=s3cr3t-{i}" for i, name in enumerate(VARIABLES)]
    words += ["launcher.setup=['export HF_PAT=s3cr3t-p', 'pip config --password s3cr3t-q']"]

    def fail() -> None:
        logging.getLogger("lingua").warning("cannot reach https://me:s3cr3t-u@host/x")
        raise RuntimeError(f"{os.environ['HF_MY_KEY']} is refused by s3:/AKID:s3cr3t-a/b@bucket/x")

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setenv("UV_INDEX", "corp=https://dl.cloudsmith.io/s3cr3t-i/simple/")
        failed = train(words, hook=at_step(2, fail))
        assert failed.exit_code == 1
        assert train(words).exit_code == 0
    write_report([read_history(read_run(tmp_path), this_process())], None, tmp_path / "png")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    kinds = {"env.txt", "config.yaml", "run.sh", "report.html", "stop.json", "error_0.0001.json", "train.log"}
    assert kinds <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    assert [file for file in files if b"s3cr3t" in file.read_bytes()] == []
    assert "s3cr3t" not in failed.output
    assert (tmp_path / "env.txt").stat().st_mode & 0o777 == 0o600


def test_the_profile_opens(run_dir: Path):
    (trace,) = (run_dir / "profiling").glob("trace_*.json.gz")
    assert orjson.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_a_killed_run_leaves_no_word_of_the_start_before_and_a_failed_one_says_why(tmp_path: Path):
    words = [*TINY, f"dump_dir={tmp_path}"]
    assert train([*words, "steps=2"]).exit_code == 0
    assert train([*words, "steps=9"], hook=at_step(4, kill_self)).exit_codes == [-9]
    assert not (tmp_path / "stop.json").exists()
    failed = train([*words, "steps=9", "data.sources=[{path: nothing}]", "--accept-change"])
    assert failed.exit_code != 0
    assert "nothing" in (tmp_path / "train.log").read_text() or not (tmp_path / "stop.json").exists()


def test_what_is_left_to_do_after_the_last_checkpoint_is_done_by_the_next_start(tmp_path: Path):
    words = [*TINY, f"dump_dir={tmp_path}", "steps=2", "validation.at_ends=true"]

    def die_instead_of_validating(rank: int) -> None:
        validate = apps.main.loop.validate
        calls: list[int] = []

        def once(run: Run, watchdog: Watchdog) -> dict[str, float] | None:
            calls.append(1)
            if len(calls) == 2:
                kill_self()
            return validate(run, watchdog)

        setattr(apps.main.loop, "validate", once)  # noqa: B010

    assert train(words, hook=die_instead_of_validating).exit_codes == [-9]
    assert "bits per byte" in train(words).output
    assert "is finished" in train(words).output


def test_the_end_says_what_to_type_next(tmp_path: Path):
    words = [*TINY, "steps=2", f"dump_dir={tmp_path}", "validation.at_ends=true", "sample_prompt=import"]
    said = train(words).output
    for expected in (
        "bits per byte",
        "a sample:\n    import",
        "steps=4",
        f"lingua generate {tmp_path} prompt=import\n",
    ):
        assert expected in said
