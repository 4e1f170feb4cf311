"""`lingua ckpt ...` from its words to its exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lingua.checkpoint import layout, publish
from lingua.files import write_json
from lingua.run.lock import RunLock
from tests.checkpoints import damage, make_run, names_under, publish_step, write_part
from tests.cli import Lingua
from tests.no_torch import said_without_torch
from tests.trainer import TINY, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(name="lingua")
def _lingua(capsys: pytest.CaptureFixture[str]) -> Lingua:
    return Lingua(capsys, "ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two steps, both kept."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    result = train([*TINY, "steps=2", "checkpoint.dump={every: 1, keep: 0}", f"dump_dir={run_dir}"])
    assert result.exit_code == 0, result.output
    return run_dir


# -- looking -------------------------------------------------------------------------------------------------------


def test_ls(hostile_dir: Path, lingua: Lingua) -> None:
    root = make_run(hostile_dir / "run", 1, 2, 3)
    publish.set_aside(hostile_dir / "run", root, 3, "later")
    publish.pin(root, 1, "eval-17", 1e12)
    write_part(root, 4)
    (layout.folder(root, 2) / layout.METADATA).unlink()
    before = names_under(hostile_dir)
    code, out, _ = lingua("ls", hostile_dir / "run")
    assert code == 0
    assert names_under(hostile_dir) == before
    lines = out.removeprefix(str(hostile_dir)).splitlines()
    assert lines[0].startswith("/run/checkpoints: 2 published")
    assert lines[1].split() == ["step", "kind", "size", "age", "saved", "by", "took", "files", "pinned", "by"]
    assert lines[2].split()[-2:] == ["ok", "eval-17"]
    assert lines[3].split()[-2:] == ["DAMAGED", "-"]
    assert lines[4] == "step 2: .metadata is missing or not a plain file"
    assert lines[5].startswith("being written: incarnation-1/0000000004, ")
    assert "set aside as later: 0000000003.later-1, " in out
    facts = lingua.record("ls", hostile_dir / "run")
    assert [one["step"] for one in facts["published"]] == [1, 2]
    assert facts["published"][0]["pinned_by"] == ["eval-17"]


def test_ls_while_it_is_trained(tmp_path: Path, lingua: Lingua) -> None:
    make_run(tmp_path)
    with RunLock(tmp_path):
        code, out, _ = lingua("ls", tmp_path)
    assert (code, "0 published, 0 B; attempt 2 (process" in out, "is training" in out) == (0, True, True)


def test_verify(tmp_path: Path, lingua: Lingua) -> None:
    root = make_run(tmp_path, 1, 2, 3)
    damage(root, 2)
    assert lingua("verify", tmp_path)[:2] == (0, f"{root}/0000000003: intact\n")
    code, out, _ = lingua("verify", f"{tmp_path}@2")
    assert (code, out.splitlines()) == (
        1,
        [f"{root}/0000000002: DAMAGED", "  model.00000.distcp does not have the content it was written with"],
    )
    found = lingua.record("verify", tmp_path, "--all", code=1)
    assert [(one["step"], bool(one["problems"])) for one in found["checkpoints"]] == [(1, False), (2, True), (3, False)]
    assert found["ok"] is False
    travelled = layout.folder(root, 1).rename(tmp_path / "travelled")
    assert lingua.record("verify", travelled)["ok"] is True


def test_inspect(trained: Path, lingua: Lingua) -> None:
    code, out, _ = lingua("inspect", f"{trained}@1")
    assert code == 0
    assert "total_tokens             64" in out
    assert "model.layers.0.attention.wq.weight" in out
    assert "optim.state" not in out
    assert "of 84 tensors" in out
    assert "none is called x" in lingua("inspect", trained, "--match", "x")[1]
    facts = lingua.record("inspect", trained)
    assert facts["shared"]["step"] == 2
    name = "optim.state.norm.weight.exp_avg"
    assert facts["tensors"][name]["shape"] == [32]
    assert (facts["tensors"][name]["dtype"], facts["tensors"][name]["bytes"]) == ("float32", 128)


def test_diff(trained: Path, lingua: Lingua) -> None:
    assert lingua("diff", trained, f"{trained}@2")[:2] == (0, "the same\n")
    code, out, _ = lingua("diff", f"{trained}@1", f"{trained}@2")
    assert code == 1
    assert "shared.step" in out
    assert "files that differ: model.00000.distcp, optim.00000.distcp, train_state.00000.json" in out
    found = lingua.record("diff", f"{trained}@1", f"{trained}@2", "--values", code=1)
    assert found["tensors"] == []
    assert 0 < found["values"]["model.norm.weight"] < 0.1
    assert found["values"]["optim.state.norm.weight.step"] == 1
    assert lingua.record("diff", trained, f"{trained}@2", "--values")["equal"] is True


# -- clearing away, waiting ----------------------------------------------------------------------------------------


def test_gc(tmp_path: Path, lingua: Lingua) -> None:
    root = make_run(tmp_path, 1, 2, dump={"every": 1, "keep": 1})
    publish.set_aside(tmp_path, root, 2, "broken")
    publish_step(root, 2)
    code, out, _ = lingua("gc", tmp_path)
    assert code == 0
    assert "set aside: broken" in out
    assert "retention" in out
    assert "--yes deletes them" in out
    assert layout.done_steps(root) == [1, 2]
    with RunLock(tmp_path):
        assert "but not now: " in lingua("gc", tmp_path)[1]
        code, _, err = lingua("gc", tmp_path, "--yes")
        assert (code, "is being trained by attempt 2" in err) == (1, True)
    facts = lingua.record("gc", tmp_path, "--yes")
    assert (len(facts["items"]), facts["deleted"], facts["not_now"]) == (3, True, None)
    assert layout.done_steps(root) == [2]
    assert lingua("gc", tmp_path)[:2] == (0, f"{tmp_path}: nothing to delete\n")


def test_wait(tmp_path: Path, lingua: Lingua) -> None:
    root = make_run(tmp_path, 3, dump={"every": 3, "keep": 0})
    assert lingua("wait", f"{tmp_path}@3") == (0, f"{root}/0000000003\n", "")
    code, out, err = lingua("wait", f"{tmp_path}@6", "--timeout", 0)
    assert (code, out, err) == (1, "", f"error: {tmp_path}@6: it is not published after 0 s; the run has 3\n")
    code, _, err = lingua("wait", f"{tmp_path}@2")
    assert (code, "is in no period of" in err, "has published later steps" in err) == (1, True, True)
    write_json(tmp_path / "stop.json", {"reason": "finished", "exit_code": 0, "step": 3})
    os.utime(tmp_path / "stop.json", (0, 0))
    assert "the run has ended (finished, step 3)" in lingua("wait", f"{tmp_path}@6")[2]
    assert lingua("wait", tmp_path)[::2] == (2, f"error: {tmp_path} names no step; write {tmp_path}@STEP\n")


# -- taking along --------------------------------------------------------------------------------------------------


def test_a_copy_does_wherever_a_run_does(trained: Path, tmp_path: Path, lingua: Lingua) -> None:
    before = names_under(trained)
    assert lingua("copy", f"{trained}@1", tmp_path / "copy")[:2] == (
        0,
        f"{tmp_path}/copy/checkpoints/0000000001\n",
    )
    assert {name for name in names_under(trained) ^ before if not name.endswith("/pins")} == set()
    assert lingua.record("verify", tmp_path / "copy")["ok"] is True
    words = [*TINY, "steps=3", f"dump_dir={tmp_path / 'new'}", f"checkpoint.init_ckpt_path={tmp_path / 'copy'}"]
    result = train([*words, "checkpoint.continue_training_from_init=true"])
    assert result.exit_code == 0, result.output
    assert lingua.record("diff", f"{tmp_path / 'new'}@3", f"{trained}@2", code=1)["tensors"] == []


def test_consolidated_weights_are_taken_by_training_and_generate(trained: Path, tmp_path: Path, lingua: Lingua) -> None:
    out = tmp_path / "out"
    facts = lingua.record("consolidate", f"{trained}@2", out)
    assert facts["file"] == str(out / "consolidated.pth")
    weights = torch.load(out / "consolidated.pth", weights_only=True)["model"]
    assert facts["bytes"] == (out / "consolidated.pth").stat().st_size
    assert "layers.1.feed_forward.w2.weight" in weights
    words = ["prompt=a", "max_gen_len=2", "device=cpu", "dtype=fp32"]
    code, _, err = Lingua(lingua.capsys)("generate", out, *words)
    assert (code, f"torch file {out}/consolidated.pth" in err) == (0, True)
    file = tmp_path / "weights.pth"
    assert lingua("consolidate", trained, file)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights.pth"]


# -- the command itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["ls", "absent"], 2, "absent does not exist"),
        (["ls", "run@99"], 2, "@99 is not a run; leave out the step: run"),
        (["verify", "run@7"], 2, "no published checkpoint of step 7; it has 1"),
        (["verify", "run@1", "--all"], 2, "give the run without a step, or the step without --all"),
        (["inspect", "."], 2, ". is a folder of runs, not a run; name one: run"),
        (["copy", "run", "run"], 1, "is a run that was trained in that folder"),
        (["wait", "absent@1"], 2, "absent does not exist"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_an_exit_code(
    tmp_path: Path,
    lingua: Lingua,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    sentence: str,
) -> None:
    make_run(tmp_path / "run", 1)
    (tmp_path / "run" / "run.sh").write_text("")
    monkeypatch.chdir(tmp_path)
    found, _, err = lingua(*words)
    assert (found, sentence in err) == (code, True), err
    assert "Traceback" not in err


def test_no_torch_and_help(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    words = (["ls", "run"], ["verify", "run"], ["gc", "run", "--yes"], ["wait", "run@1"], ["copy", "run", "copy"])
    said = said_without_torch(tmp_path, *(["ckpt", *each] for each in (*words, ["--help"])))
    for name in ("ls", "verify", "inspect", "diff", "gc", "wait", "copy", "consolidate"):
        assert name in said
