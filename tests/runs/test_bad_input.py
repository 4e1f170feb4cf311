"""What a person got wrong is answered by one sentence with the remedy, no traceback, and nothing is lost."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import apps.main.loop
from apps.cli.main import app
from lingua.config.command_line import run_main
from lingua.files import Files
from lingua.train.learner import Run
from tests.cli import Lingua
from tests.trainer import TINY, Hook, Trainer, at_step, kill_self, published, train

WORDS = [*TINY, "steps=4"]


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["apps/main/configs/debu.yaml"], 2, "debug.yaml"),
        ([], 2, "config"),
        ([*WORDS, "optim.lrr=1"], 2, "optim.lr"),
        ([*WORDS, "optim.lr=fast"], 2, "optim.lr"),
        ([*WORDS, "optim.lr=fast", "model.dimm=3"], 2, "model.dim"),
        ([*WORDS, "data.root_dir={dir}", "data.sources={{nothing: 1}}"], 2, "nothing"),
        ([*WORDS, "data.tokenizer.name=sp", "data.tokenizer.path={dir}/no.model"], 2, "no.model"),
        ([*WORDS, "dump_dir={dir}/file/run"], 2, "dump_dir"),
        ([*WORDS, "device=cuda"], 1, "device=cpu"),
        ([*WORDS, "data.batch_size=5", "global_batch_size=12"], 2, "10 or 15"),
        ([*WORDS, "checkpoint.init_ckpt_path={dir}/nowhere"], 2, "nowhere"),
        ([*WORDS, "--frobnicate"], 2, "--frobnicate"),
    ],
)
def test_one_sentence_and_an_exit_code(tmp_path: Path, words: list[str], exit_code: int, said: str):
    (tmp_path / "file").write_text("")
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    filled = [word.format(dir=tmp_path) for word in words]
    if filled and not any(word.startswith("dump_dir") for word in filled):
        filled.append(f"dump_dir={tmp_path / 'run'}")
    result = train(filled)
    assert result.exit_code == exit_code, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_bad_yaml_is_named_with_its_line(tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nsteps: [1, 2\noptim: {}\n")
    result = train([str(bad)])
    assert result.exit_code == 2
    assert "bad.yaml:" in result.output


def test_a_traceback_is_there_for_who_asks(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path}", "device=cuda", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.output


def test_all_mistakes_are_said_at_once_and_no_folder_is_touched(tmp_path: Path):
    run_dir = tmp_path / "run"
    result = train([*WORDS, f"dump_dir={run_dir}", "optim.lr=-1", "model.dim=33", "nmae=x", "optim.scheduler=cosin"])
    assert result.exit_code == 2
    for key in ("optim.lr", "model", "nmae", "optim.scheduler"):
        assert key in result.output
    assert not run_dir.exists()


def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2"]
    assert train(words).exit_code == 0
    victim = max((tmp_path / "checkpoints" / "0000000004").glob("model*.distcp"))
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        file.write(b"\xff\x00\xff")
    result = train(words)
    assert result.exit_code == 0, result.output
    assert "0000000004" in result.output
    assert published(tmp_path) == [2, 4]  # trained again from 2


def test_when_no_checkpoint_verifies_nothing_is_trained_over_them(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    assert train(words).exit_code == 0
    for file in (tmp_path / "checkpoints" / "0000000004").glob("*.distcp"):
        os.truncate(file, 10)
    result = train(words)
    assert result.exit_code == 1
    assert "none of the checkpoints" in result.output


def fill_disk_at(step: int) -> Hook:
    """Hook: after update `step` every write of a checkpoint fails as on a full disk."""

    def hook(rank: int) -> None:
        def fail(self: Files, descriptor: int, data: object) -> None:
            raise OSError(28, "No space left on device")

        def fill() -> None:
            setattr(Files, "write", fail)  # noqa: B010

        at_step(step, fill)(rank)

    return hook


def test_a_disk_that_fills_up_costs_that_checkpoint_and_not_the_run(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=1", "checkpoint.dump.keep=-1"]

    def full_for_one_step(rank: int) -> None:
        write = Files.write
        fill_disk_at(2)(rank)
        at_step(3, lambda: setattr(Files, "write", write))(rank)

    result = train(words, hook=full_for_one_step)
    assert result.exit_code == 0, result.output
    assert "the disk is full" in result.output
    assert published(tmp_path) == [1, 3, 4]


def test_a_full_disk_at_the_last_save_is_an_error_and_older_checkpoints_stay(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2"]
    result = train(words, hook=fill_disk_at(4))
    assert result.exit_code == 1
    assert "the disk is full" in result.output
    assert published(tmp_path) == [2]
    assert train(words).exit_code == 0  # there is room again


@pytest.mark.soak
def test_a_finished_run_says_so_and_goes_on_when_steps_are_raised(tmp_path: Path):
    words = [*TINY, f"dump_dir={tmp_path}"]
    assert train([*words, "steps=2"]).exit_code == 0
    again = train([*words, "steps=2"])
    assert again.exit_code == 0
    assert "finished" in again.output
    assert train([*words, "steps=4"]).exit_code == 0
    assert published(tmp_path) == [2, 4]


def test_a_bare_python_in_a_big_allocation_waits_for_nobody(tmp_path: Path):
    def in_allocation(rank: int) -> None:
        os.environ.update(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")

    assert train([*WORDS, f"dump_dir={tmp_path}"], hook=in_allocation).exit_code == 0


def test_a_second_trainer_of_the_same_folder_is_refused(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    reached, reached_here = os.pipe()
    go_on_here, go_on = os.pipe()

    def wait_in_the_middle(rank: int) -> None:
        def pause() -> None:
            os.write(reached_here, b".")
            os.read(go_on_here, 1)

        at_step(2, pause)(rank)

    with Trainer(words, hook=wait_in_the_middle) as first:
        os.close(reached_here)  # the trainer has the other end: its death ends the wait
        assert os.read(reached, 1) == b"."
        second = train(words)
        os.write(go_on, b".")
        assert first.wait().exit_code == 0
    assert second.exit_code == 1
    assert f"process {first.pids[0]}" in second.output
    assert "Traceback" not in second.output
    for descriptor in (reached, go_on_here, go_on):
        os.close(descriptor)


def test_a_run_folder_may_have_any_name(hostile_dir: Path):
    words = [*WORDS, f"dump_dir={hostile_dir / 'run'}"]
    result = train(words)
    assert result.exit_code == 0, result.output
    assert train([*words, "steps=5", "--accept-change"]).exit_code == 0
    assert published(hostile_dir / "run") == [4, 5]


@pytest.mark.soak
def test_the_model_cannot_change_within_a_run(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    assert train(words).exit_code == 0
    result = train([*words, "steps=6", "model.n_layers=3"])
    assert result.exit_code == 2
    assert "model.n_layers" in result.output
    accepted = train([*words, "steps=6", "optim.lr=1e-3"])
    assert accepted.exit_code == 2
    assert "--accept-change" in accepted.output
    assert train([*words, "steps=6", "optim.lr=1e-3", "--accept-change"]).exit_code == 0
    assert train([*words, "steps=6", "optim.lr=1e-3"]).exit_code == 0  # accepted once
    longer = train([*words, "steps=12", "optim.lr=1e-3"])
    assert longer.exit_code == 2
    assert "steps: 6 -> 12 raises the learning rate of step 7 from 5e-05 to 0." in longer.output


@pytest.mark.parametrize(
    "mistake",
    [
        ["data.sources=[{path: nope}]"],
        ["data.sources=[{path: gone/nope}]"],
        ["checkpoint.init_ckpt_path=gone/nope"],
        pytest.param(["eval={validation: {root_dir: ., sources: [nope]}}"], marks=pytest.mark.soak),
    ],
    ids=" ".join,
)
def test_a_refused_first_start_leaves_nothing(tmp_path: Path, mistake: list[str]):
    failed = train([*WORDS, f"dump_dir={tmp_path / 'run'}", *mistake])
    assert (failed.exit_code, "nope" in failed.output) == (2, True), failed.output
    assert list(tmp_path.iterdir()) == []


def test_a_first_start_that_fails_does_not_freeze_its_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mistake = ["data.batch_size=3", "eval={validation: {root_dir: ., sources: [nope]}}"]
    (tmp_path / "run").mkdir()  # as a job does

    def lingua(*words: object) -> str:
        assert run_main(lambda given: app(given, standalone_mode=False), list(map(str, words))) == 0
        return capsys.readouterr().out

    words = [*WORDS, f"dump_dir={tmp_path / 'run'}"]
    failed = train([*words, *mistake])
    assert failed.exit_code != 0
    assert "nope" in failed.output
    assert "nope" in lingua("why", tmp_path / "run")
    assert lingua("runs", tmp_path) == f"no runs in {tmp_path}\n"
    again = train(words)
    assert again.exit_code == 0, again.output
    assert published(tmp_path / "run") == [4]
    assert str(tmp_path / "run") in lingua("runs", tmp_path)


def test_a_model_that_fits_nowhere_is_a_sentence_and_why_advises_no_smaller_batch(tmp_path: Path, lingua: Lingua):
    # More than a process can address; `deterministic` would fill what still fits.
    huge = ["model.dim=20000000", "model.n_heads=1000", "deterministic=false"]
    failed = train([*WORDS, *huge, f"dump_dir={tmp_path / 'run'}"])
    assert failed.exit_code == 1
    assert "parameters does not fit into the memory; take a smaller model" in failed.output
    assert "Traceback" not in failed.output
    said = lingua("why", tmp_path / "run")[1]
    assert "take a smaller model" in said
    assert "batch_size" not in said


@pytest.mark.soak
def test_a_checkpoint_that_turns_up_late_binds_the_config(tmp_path: Path):
    """It was in another machine's memory when the config was checked, and is on the disk when the run is built."""
    words = [*WORDS, f"dump_dir={tmp_path / 'run'}", "checkpoint.dump.every=2"]
    assert train(words, hook=at_step(3, kill_self)).exit_codes == [-9]
    before, away = (tmp_path / "run" / "config.yaml").read_bytes(), tmp_path / "away"
    (mark,) = (tmp_path / "run" / "checkpoints").glob("*.done")
    mark.rename(away)

    def publish_late(rank: int) -> None:
        build_run = apps.main.loop.build_run

        def late(*args: Any) -> Run:
            away.rename(mark)
            return build_run(*args)

        setattr(apps.main.loop, "build_run", late)  # noqa: B010

    refused = train([*words, "optim.lr=1e-4"], hook=publish_late)
    assert refused.exit_code == 2
    assert "checkpoint 2 of an earlier attempt was saved only now, and optim.lr" in refused.output
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert train(words).exit_code == 0
