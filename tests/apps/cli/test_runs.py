"""`lingua why | status | runs | diff | stop` from their words to their exit codes, on real runs and without torch."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import orjson
import pytest

from apps.cli.runs import parts_of_steps
from lingua.run import lock
from lingua.run.metrics import read_metrics
from lingua.train import build
from tests.cli import Lingua
from tests.no_torch import said_without_torch
from tests.trainer import TINY, Trainer, at_step, kill_self, losses, published, send_self, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `calm` finished, `killed` not."""
    out = tmp_path_factory.mktemp("out")
    words = [*TINY, "steps=8", "checkpoint.dump.every=4", "validation.every=4"]
    assert train([*words, f"dump_dir={out / 'calm'}"]).exit_code == 0
    killed = [*words, f"dump_dir={out / 'sweep' / 'killed'}", "optim.clip=0.5"]
    assert train(killed, hook=at_step(6, kill_self)).exit_codes == [-9]
    return out


def test_what_ended_it_in_five_lines(lingua: Lingua, folder: Path):
    code, out, _ = lingua("why", folder / "sweep" / "killed")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ended", "cause", "where", "saved", "next"]
    assert "killed, step 5 of 8" in out or "killed, step 4 of 8" in out
    assert "checkpoint 4" in out
    assert lingua.record("why", folder / "calm")["cause"] == "all steps are done"


def test_status(lingua: Lingua, folder: Path):
    calm, killed = lingua.record("status", folder / "calm", folder / "sweep" / "killed")
    assert (calm["state"], calm["step"], calm["n_steps"], calm["checkpoint"]) == ("finished", 8, 8, 8)
    assert (killed["state"], killed["checkpoint"], killed["starts"]) == ("killed", 4, 1)
    assert calm["validated_step"] == 4
    code, out, _ = lingua("status", folder / "calm")
    assert (code, out.splitlines()[0]) == (0, f"{folder / 'calm'}  finished")


def test_runs_below_a_folder(lingua: Lingua, folder: Path):
    code, out, _ = lingua("runs", folder)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        [str(folder / "calm"), "finished"],
        [str(folder / "sweep" / "killed"), "killed"],
    ]
    assert [run["state"] for run in lingua.record("runs", folder)] == ["finished", "killed"]
    (folder / "empty").mkdir()
    assert "no runs" in lingua("runs", folder / "empty")[1]


def test_diff(lingua: Lingua, folder: Path):
    facts = lingua.record("diff", folder / "calm", folder / "sweep" / "killed")
    assert facts["config"] == {"optim.clip": [1.0, 0.5]}
    assert facts["loss"]["steps"][:4] == [1, 2, 3, 4]
    assert facts["loss"]["left"][0] == losses(folder / "calm")[1] == facts["loss"]["right"][0]
    code, out, _ = lingua("diff", folder / "calm", folder / "calm")
    assert code == 0
    assert "the configs are equal" in out
    assert "loss: equal at all 8 common steps" in out
    lines = lingua("diff", folder / "calm", folder / "sweep" / "killed")[1].splitlines()
    assert [line.split(" ")[0] for line in lines[:5]] == ["key", "optim.clip", "", "loss:", "step"]


@pytest.mark.soak
def test_report(lingua: Lingua, folder: Path):
    page = folder / "page.html"
    made = lingua.record("report", folder / "calm", folder / "sweep" / "killed", "--out", page)
    assert (made["html"], made["png"]) == (str(page), [])
    calm, killed = made["runs"]
    assert [(one["number"], one["first_step"], one["end"]) for one in calm["starts"]] == [(1, 0, "finished")]
    assert [(e["kind"], e["step"]) for e in calm["checkpoints"]] == [("published", 4), ("published", 8)]
    assert [one["end"] for one in killed["starts"]] == ["killed"]
    assert [one["step"] for one in calm["validations"]] == [4]
    assert min(calm["seconds"][kind] for kind in ("training", "saving", "validating", "starting")) > 0
    assert sum(calm["seconds"].values()) == pytest.approx(
        calm["starts"][0]["ended_s"] - calm["starts"][0]["began_s"], rel=0.02
    )
    assert "2 runs" in page.read_text()


def test_what_does_not_run_is_a_sentence(lingua: Lingua, folder: Path):
    for command in ("stop", "profile"):
        code, _, err = lingua(command, folder / "calm")
        assert code == 1
        assert "is not running, it is finished" in err


@pytest.mark.soak
@pytest.mark.gate
@pytest.mark.ranks
def test_a_run_is_stopped_from_the_login_node(lingua: Lingua, tmp_path: Path):
    """Both ranks leave after the same step, saved, with the code that is not requeued; the next start goes on."""
    reached, reached_here = os.pipe()

    def hook(rank: int) -> None:
        setattr(lock, "BEAT_S", 0.05)  # noqa: B010
        at_step(3, lambda: os.write(reached_here, b"."), on_rank=0)(rank)

    words = [*TINY, f"dump_dir={tmp_path}", "steps=1000000", "optim.scheduler=constant"]
    with Trainer(words, n_ranks=2, hook=hook) as trainer:
        os.read(reached, 1)
        code, out, err = lingua("stop", tmp_path)
        assert code == 0, err
        assert "asked attempt 1" in out
        result = trainer.wait()
    assert result.exit_code == 130, result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert (stop["reason"], stop["exit_code"], [stop["step"]]) == ("asked", 130, published(tmp_path))
    assert lingua.record("status", tmp_path)[0]["state"] == "stopped"
    for descriptor in (reached, reached_here):
        os.close(descriptor)

    again = train([*words[:-2], f"steps={stop['step'] + 2}", words[-1]], n_ranks=2, hook=hook)
    assert again.exit_code == 0, again.output  # the request was for the start before


@pytest.mark.soak
@pytest.mark.ranks
def test_a_running_run_is_profiled_by_signal_and_from_the_login_node(lingua: Lingua, tmp_path: Path):
    """A signal that one rank gets, then `lingua profile`: both ranks time the same steps, rank 0 alone traces."""
    reached, reached_here = os.pipe()

    def hook(rank: int) -> None:
        setattr(lock, "BEAT_S", 0.05)  # noqa: B010
        at_step(3, send_self("SIGUSR1"), on_rank=1)(rank)
        at_step(8, lambda: os.write(reached_here, b"."), on_rank=0)(rank)

    words = [*TINY, f"dump_dir={tmp_path}", "steps=1000000", "optim.scheduler=constant", "profiling.profile_steps=1"]
    with Trainer(words, n_ranks=2, hook=hook) as trainer:
        os.read(reached, 1)
        code, out, err = lingua("profile", tmp_path, "--steps", 2, "--heavy", "--wait")
        assert code == 0, err
        assert lingua("stop", tmp_path)[0] == 0
        result = trainer.wait()
    assert result.exit_code == 130, result.output
    for descriptor in (reached, reached_here):
        os.close(descriptor)

    folder = tmp_path / "profiling"
    light = {path.name: read_metrics(path) for path in sorted(folder.glob("light_*"))}
    steps = {name: [record["global_step"] for record in records] for name, records in light.items()}
    first, asked = steps["light_0000000005_rank0.jsonl"], out.splitlines()[1:3]
    assert first == steps["light_0000000005_rank1.jsonl"] == [5]  # asked at 3, voted at 4 at the latest
    begin = Path(asked[0]).name[6:16]
    assert out.splitlines()[3].split() == ["part", "of", "a", "step", "ms", "share"]
    assert asked == [str(folder / f"light_{begin}_rank0.jsonl"), str(folder / f"trace_{begin}_rank0.json.gz")]
    assert steps[f"light_{begin}_rank0.jsonl"] == steps[f"light_{begin}_rank1.jsonl"] == [int(begin), int(begin) + 1]
    assert len(light) == 4
    assert len(list(folder.glob("trace_*"))) == 2
    for record in (record for records in light.values() for record in records):
        parts = sum(record[f"time/{phase}_s"] for phase in ("data", "forward", "backward", "optimizer", "rest"))
        assert parts == pytest.approx(record["time/step_s"], abs=1e-4)
        assert min(record["time/forward_s"], record["time/backward_s"]) > 0


def test_a_copy_of_a_living_run_is_not_asked_to_stop(lingua: Lingua, folder: Path, tmp_path: Path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(folder / "sweep" / "killed", run)
    with lock.RunLock(run):
        shutil.copytree(run, copy)
        code, out, err = lingua("stop", copy)
        assert (code, out) == (1, "")
        assert f"{copy} is a copy of {run} and is not running itself" in err
        why = lingua.record("why", copy)
        assert f"this folder is a copy: attempt 2 (process {os.getpid()}" in why["cause"]
        assert f"the same command with dump_dir={copy} " in why["next"]
        assert lingua.record("status", copy)[0]["state"] == "killed"
        assert not list((copy / "incarnations").glob("*.stop"))
        assert lingua("stop", run)[0] == 0
        run.rename(tmp_path / "renamed")
        code, out, err = lingua("stop", tmp_path / "renamed")
        assert (code, out) == (1, "")
        assert f"was {run} when attempt 2" in err
        assert "rename it back first" in err
        (tmp_path / "renamed").rename(run)


@pytest.mark.soak
def test_a_start_is_stopped_too(tmp_path: Path):
    def hook(rank: int) -> None:
        setattr(lock, "BEAT_S", 0.05)  # noqa: B010

        def ask_and_hang(args: object) -> None:
            lock.ask_to_stop(tmp_path, 1)
            threading.Event().wait()

        setattr(build, "build_tokenizer", ask_and_hang)  # noqa: B010

    assert train([*TINY, "steps=3", f"dump_dir={tmp_path}"], hook=hook).exit_code == 130
    assert train([*TINY, "steps=3", f"dump_dir={tmp_path}"]).exit_code == 0


def test_no_torch_is_needed(folder: Path):
    report = ["report", "calm", "--out", "page.html"]
    said_without_torch(folder, ["why", "calm"], ["status", "calm"], ["runs", "."], ["diff", "calm", "calm"], report)


def test_a_profile_is_told_as_a_table_of_where_the_time_went():
    steps = [{"step": n, "time/step_s": 0.1, "time/forward_s": 0.02 * n, "time/data_s": 0.01} for n in (1, 2)]
    assert parts_of_steps(steps) == [("forward", "30.0", "30%"), ("data", "10.0", "10%")]
    assert parts_of_steps([]) == []
