"""A step computed again is the step that was: spikes, NaN that ended the run, steps that were trained twice."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.cli.data import read_run
from apps.cli.main import app
from lingua.config.command_line import run_main
from lingua.data.audit import rows_of_step
from lingua.run.metrics import read_metrics
from tests.checkpoints import names_under
from tests.corpora import write_source
from tests.ranks import exit_code_of, run_on_ranks
from tests.trainer import TINY, at_step, kill_self, losses, train

WORDS = [
    *TINY, "checkpoint.dump={every: 4, keep: -1}", "grad_acc_steps=2", "optim.scheduler=constant", "data.doc_mask=true",
]  # fmt: skip


def lingua_replay(run: Path, step: int, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `lingua replay`, in a process of its own: it sets torch up for the whole of it."""

    def on_rank(rank: int) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        given = ["replay", str(run), "--step", str(step), *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_main(lambda words: app(words, prog_name="lingua", standalone_mode=False), given)
        return code, out.getvalue(), err.getvalue()

    (result,) = run_on_ranks(on_rank, 1)
    return result


def replay(run: Path, step: int, *words: str) -> dict[str, Any]:
    code, out, err = lingua_replay(run, step, "--json", *words)
    assert code == 0, err
    return json.loads(out)


def reported(run: Path, step: int, start: int) -> dict[str, Any]:
    records = read_metrics(run / "metrics.jsonl")
    return next(r for r in records if (r["global_step"], r["incarnation"]) == (step, start))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trainers of these tests have."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start 1 was killed after step 12; start 2 went back to step 8 with another learning rate."""
    run = tmp_path_factory.mktemp("twice") / "run"
    words = [*WORDS, "steps=12", f"dump_dir={run}"]
    assert train(words, hook=at_step(12, kill_self)).exit_code == -9
    result = train([*words, "optim.lr=1e-2", "--accept-change"])
    assert result.exit_code == 0, result.output
    return run


@pytest.mark.parametrize(
    ("step", "words", "start", "checkpoint", "n_before"),
    [
        pytest.param(1, [], 1, None, 0, marks=pytest.mark.soak),
        pytest.param(7, [], 1, 4, 2, marks=pytest.mark.soak),
        pytest.param(7, ["--from", "0"], 1, None, 6, marks=pytest.mark.soak),
        (10, [], 2, 8, 1),
        (10, ["--start", "1"], 1, 8, 1),
        pytest.param(12, [], 2, 8, 3, marks=pytest.mark.soak),
    ],
)
def test_loss_and_gradient_norm_are_those_of_the_start_that_trained_it_to_the_last_bit(
    twice: Path, step: int, words: list[str], start: int, checkpoint: int | None, n_before: int
):
    if words == ["--start", "1"]:
        assert reported(twice, step, 1)["loss/out"] != reported(twice, step, 2)["loss/out"]
    before = names_under(twice)
    found = replay(twice, step, *words)
    assert names_under(twice) == before  # nothing is written
    assert (found["start"], found["checkpoint"], found["way"]["n_steps"]) == (start, checkpoint, n_before)
    assert found["way"]["n_equal"] == n_before
    record = reported(twice, step, start)
    assert (found["here"]["loss"], found["here"]["grad_norm"]) == (record["loss/out"], record["optim/grad_norm"])
    assert found["here"]["lr"] == record["optim/lr"]
    assert found["is_same"] is True
    # the rows' losses are what the step's loss is made of
    assert sorted(row["row"] for row in found["rows"]) == [4 * (step - 1) + i for i in range(4)]
    assert sum(row["loss"] for row in found["rows"]) / 4 == pytest.approx(record["loss/out"], rel=1e-6)
    assert math.hypot(*found["groups"].values()) == pytest.approx(record["optim/grad_norm"], rel=1e-5)


@pytest.mark.soak
def test_norms_of_layers_are_of_the_step_whose_prompts_are_no_labels(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"why {n}? " * 3, "completion": "so"}) + "\n" for n in range(60))
    )
    words = [f"data.root_dir={tmp_path}", "data.sources={pairs.jsonl: 1.0}", "data.loss_on=completion"]
    run = tmp_path / "run"
    result = train([*WORDS, *words, "steps=2", "validation.every=0", f"dump_dir={run}"])
    assert result.exit_code == 0, result.output
    found = replay(run, 2)
    assert found["is_same"] is True
    assert math.hypot(*found["groups"].values()) == pytest.approx(found["here"]["grad_norm"], rel=1e-5)


@pytest.mark.gate
@pytest.mark.soak
def test_what_is_told_to_people(twice: Path):
    code, out, err = lingua_replay(twice, 7, "--rows", "2", "--chars", "9", "--gradients")
    assert code == 0, err
    assert "to the last bit" in out
    assert "2 steps on the way, 2 reported: losses equal to the last bit" in out
    assert "... and 2 rows with smaller losses" in out
    assert "layers.1 " in out
    assert " -  " not in out.partition("row ")[2].partition("...")[0]  # every row has its gradient norm
    assert "training 2 steps to get to step 7" in err


@pytest.mark.soak
def test_another_config_is_told_as_such(twice: Path):
    found = replay(twice, 7, "data.batch_size=1", "device=cpu")
    assert found["changes"] == ["data.batch_size=1", "device=cpu"]
    assert found["micro_steps"] == 4
    assert found["here"]["loss"] == pytest.approx(reported(twice, 7, 1)["loss/out"], rel=1e-6)


@pytest.mark.parametrize(
    ("step", "words", "sentence"),
    [
        (13, [], "has 12 steps; choose one of them"),
        (7, ["--from", "3"], "there are 0 and [4]"),
        (7, ["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr"),
        (7, ["--start", "3"], "has 2 attempts"),
    ],
)
def test_what_cannot_be_replayed_is_told(twice: Path, step: int, words: list[str], sentence: str):
    code, _, err = lingua_replay(twice, step, *words)
    assert (code, sentence in err) == (2, True), err


@pytest.mark.soak
def test_without_a_checkpoint_before_the_step_it_is_said_what_there_is(twice: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(twice, run)
    for step in (4, 8):  # as retention removes them
        shutil.rmtree(run / "checkpoints" / f"{step:010d}")
        (run / "checkpoints" / f"checkpoint_{step:010d}.done").unlink()
    code, _, err = lingua_replay(run, 7)
    assert code == 2
    assert "which has 12" in err
    assert "checkpoint.keep_every" in err
    assert replay(run, 3)["is_same"] is True  # none was due before it
    assert replay(run, 7, "--from", "0")["is_same"] is True


@pytest.mark.soak
def test_a_damaged_checkpoint_is_passed_over(twice: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(twice, run)
    (run / "checkpoints" / "0000000008" / "train_state.00000.json").write_bytes(b"{}")
    code, out, err = lingua_replay(run, 9, "--start", "1", "--json")
    assert code == 0, err
    assert "checkpoint 8 does not verify and is passed over" in err
    assert (json.loads(out)["checkpoint"], json.loads(out)["is_same"]) == (4, True)


# -- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_row_behind_a_spike_is_the_first(tmp_path: Path):
    odd = "".join(map(chr, random.Random(0).choices(range(48, 91), k=300)))
    source = write_source(tmp_path, "calm", ["ab" * 100] * 30 + [odd] * 2 + ["ab" * 100] * 30, n_files=1)
    words = [f"data.root_dir={tmp_path}", "data.sources={calm: 1.0}", "optim.lr=1e-2", "steps=40", "data.lanes=4"]
    run = tmp_path / "run"
    assert train([*WORDS, *words, f"dump_dir={run}"]).exit_code == 0
    (part,), n_lanes, states = read_run(run)
    seen = {s: dict(rows_of_step(part.args, n_lanes, part.rows_per_step, states, s)) for s in range(10, 41)}
    (step, *_) = [
        s
        for s, rows in seen.items()
        if any(len(p.text) > 5 and p.text[5:] in odd for row in rows.values() for p in row)
    ]
    found = replay(run, step, "--gradients")
    assert found["is_same"] is True
    worst, second = found["rows"][:2]
    assert worst["loss"] > 2 * second["loss"]
    assert all(row["grad_norm"] > 0 for row in found["rows"])
    (document, *_) = [document for document in worst["documents"] if document["text"] in odd]
    chunk = source / "calm.chunk.00.jsonl"
    assert document["file"] == str(chunk)
    assert odd.encode() in chunk.read_bytes()[document["offset"] :].partition(b"\n")[0]


@pytest.mark.soak
def test_a_step_that_ended_the_run_can_be_looked_at(tmp_path: Path):
    run = tmp_path / "run"
    result = train([*WORDS, "steps=12", f"dump_dir={run}", "optim.lr=1e18", "optim.warmup=0", "logging.freq=10"])
    assert result.exit_code == 1
    assert "is not finite" in result.output
    step = int(result.output.partition("error: step ")[2].split()[0])
    assert read_metrics(run / "metrics.jsonl") == [] if (run / "metrics.jsonl").exists() else True
    found = replay(run, step)
    assert found["finite"] is False
    assert (found["here"]["loss"], found["reported"]) == (None, None)
    assert found["first_bad_micro_step"] == 0
    assert found["bad_parameters"] == []
    assert f"step {step} (rows" in found["last_words"]
    assert all(row["first_nonfinite"].startswith(("layers.0", "tok_embeddings")) for row in found["rows"])
    code, out, _ = lingua_replay(run, step)
    assert code == 0
    assert "loss not finite here; the run reported nothing of this step" in out
    assert "(4 of 4 rows)" in out
    assert "the run's own words: step" in out
    code, _, err = lingua_replay(run, step + 1)
    assert code == 1
    assert f"step {step}, on the way, is not finite here: look at that one with --step {step}" in err


@pytest.mark.soak
def test_a_skipped_step_is_not_finite_here_either_and_steps_behind_it_are_the_same(tmp_path: Path):
    """The embedding of one token is spoilt in the weights that the run starts from, so only rows with it are."""
    root = tmp_path / "data"
    write_source(root, "s", ["ab" * 40] * 8 + ["ab" * 20 + "Q"] + ["ab" * 40] * 8, n_files=1)
    words = [*WORDS, f"data.root_dir={root}", "data.sources={s: 1.0}", "data.lanes=4"]
    assert train([*words, "steps=1", f"dump_dir={tmp_path / 'first'}"]).exit_code == 0

    def export() -> None:
        given = ["export", str(tmp_path / "first"), str(tmp_path / "weights"), "--format", "safetensors"]
        assert run_main(lambda w: app(w, prog_name="lingua", standalone_mode=False), given) == 0

    assert exit_code_of(export) == 0
    (file,) = (tmp_path / "weights").glob("*.safetensors")
    weights = load_file(file)
    weights["tok_embeddings.weight"][ord("Q")] = torch.inf
    save_file(weights, file)
    run = tmp_path / "run"
    start = [f"checkpoint.init_ckpt_path={tmp_path / 'weights'}", "optim.on_nonfinite=skip", "steps=20"]
    result = train([*words, *start, f"dump_dir={run}"])
    assert result.exit_code == 0, result.output
    skipped = sorted(set(range(1, 21)) - set(losses(run)))
    assert skipped
    found = replay(run, skipped[0])
    assert (found["finite"], found["is_same"]) == (False, True)
    assert found["bad_parameters"] == ["tok_embeddings.weight"]
    bad = [row for row in found["rows"] if row["first_nonfinite"]]
    assert 0 < len(bad) < 4
    assert found["rows"][: len(bad)] == bad
    assert all(row["first_nonfinite"] == "tok_embeddings (Embedding): its output" for row in bad)
    assert all("Q" in "".join(part["text"] for part in row["documents"]) for row in bad)
    assert replay(run, skipped[0] + 1)["is_same"] is True


@pytest.mark.soak
@pytest.mark.ranks
def test_a_step_of_several_ranks_is_equal_within_rounding(tmp_path: Path):
    run = tmp_path / "run"
    words = ["steps=7", "distributed.fsdp_type=full_shard", f"dump_dir={run}"]
    assert train([*WORDS, *words], n_ranks=2).exit_code == 0
    found = replay(run, 7)
    assert found["micro_steps"] == 4  # the eight rows of both ranks, two at a time
    record = reported(run, 7, 1)
    assert found["here"]["loss"] == pytest.approx(record["loss/out"], rel=2e-5)
    assert found["here"]["grad_norm"] == pytest.approx(record["optim/grad_norm"], rel=2e-4)
    assert found["way"]["n_compared"] == 2


@pytest.mark.soak
def test_data_that_has_changed_is_refused(tmp_path: Path):
    source = write_source(tmp_path, "s", ["some text " * 20] * 30, n_files=1)
    run = tmp_path / "run"
    assert (
        train([*WORDS, f"data.root_dir={tmp_path}", "data.sources={s: 1.0}", "steps=5", f"dump_dir={run}"]).exit_code
        == 0
    )
    with (source / "s.chunk.00.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    code, _, err = lingua_replay(run, 5)
    assert code == 2
    assert "are not those the run began with" in err
    assert "replay needs the very data that the run has read" in err
