"""`lingua push`: a folder with a card filled from the run, given to a hub on loopback by the hub's own client."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from apps.cli.export import Format, make_export
from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.files import write_json
from lingua.optim.ema import begin_ema
from lingua.report.card import telling
from tests.apps.cli.test_export import TINY, assert_equal, make_run, theirs, weights
from tests.cli import Lingua
from tests.hub import ModelHub

SECRET = "hf_" + "x" * 30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoint 1 and a history up to step 3, which says things that are nobody's business."""
    folder = tmp_path / "run"
    make_run(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"steps": 3, "launcher": {"account": "acct42", "setup": [f"export HF_TOKEN={SECRET}"]}}
    config["data"] |= {"sources": {"wiki": 1.0, "co|de": 2.0}, "root_dir": "/home/me/data"}
    config["optim"] = {"type": "adamw", "lr": 0.001, "scheduler": "cosine", "ema": 0.9}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"commit": "abc123", "dirty": True, "ranks": 2, "device": "NVIDIA H200", "torch": "2.10", "host": "node7"}
    write_json(folder / "run.json", facts)

    def lines(name: str, *records: dict[str, object]) -> None:
        (folder / name).write_text("".join(json.dumps({"incarnation": 1, **each}) + "\n" for each in records))

    lines("metrics.jsonl", *({"global_step": n, "loss/out": 6.0 - n, "optim/total_tokens": 64 * n} for n in (1, 2, 3)))
    lines("metrics.validation.jsonl", *({"global_step": n, "wiki/bpb": 9.0 - n} for n in (1, 3)))
    lines(
        "metrics.eval.jsonl",
        {"global_step": 1, "eval/arc/acc": 0.25, "eval/arc/n": 1200},
        {"global_step": 3, "eval/arc/acc": 0.75},
    )
    text = f"a token: {SECRET}\n```\n\x1b[31m"
    lines("samples.jsonl", {"global_step": 1, "prompt": "def ", "text": text})
    return folder


def test_a_dry_run_writes_the_folder_with_a_card_that_tells_no_secret(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    lingua = Lingua(capsys, "push")
    found = lingua.record(f"{run}@1", "me/tiny", "--dry-run")
    folder = run.parent / "tiny-step1"
    assert (found["folder"], found["revision"], found["step"]) == (str(folder), "step1", 1)
    assert list(Path.cwd().iterdir()) == []
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lingua", "llama"]}
    n_params = sum(parameter.numel() for parameter in theirs(folder).parameters())
    for part in (
        f"{n_params:,} parameters", "step 1 of 3", 'from_pretrained("me/tiny", revision="step1")', "| tokens | 64 |",
        "| eval/arc/acc | 0.2500 |", "| eval/arc/n | 1,200 |", "| wiki/bpb | 8.0000 |", "| co\\|de | 2.0 |", "abc123",
        "not committed",
        "2 x NVIDIA H200", "adamw 0.001 cosine", "n_layers: 2", "![Training loss](pictures/loss.png)", "\\x1b[31m",
    ):  # fmt: skip
        assert part in card, part
    for hidden in (SECRET, "acct42", "/home/me", "node7", "0.7500", str(tmp_path)):
        assert hidden not in card, hidden
    assert (folder / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    make_export(f"{run}@1", tmp_path / "plain", Format.hf)
    for file in (tmp_path / "plain").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    code, _, err = lingua(f"{run}@1", "me/tiny", "--dry-run")
    assert code != 0
    assert "tiny-step1" in err


@pytest.mark.filterwarnings("ignore")  # of the hub's client
def test_steps_become_branches_and_what_was_there_goes(
    tmp_path: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    caplog.set_level(logging.INFO)
    lingua, said = Lingua(capsys, "push"), ""
    with ModelHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for place, more in ((run, ["--private"]), (f"{run}@1", ["--format", "safetensors"]), (run, [])):
            code, out, err = lingua(place, "me/tiny", *more)
            assert code == 0, err
            said += out + err
    assert hub.visibility == {"me/tiny": "private"}
    main, step = hub.models["me/tiny"]["main"], hub.models["me/tiny"]["step1"]
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json", "pictures/loss.png"} <= main.keys()
    assert {"model.safetensors", "config.yaml", "README.md"} <= step.keys()
    assert "config.json" not in step  # the branch began as a copy of main
    assert b'lingua.load(snapshot_download("me/tiny", revision="step1"))' in step["README.md"]
    make_export(str(run), tmp_path / "plain", Format.hf)
    assert main["model.safetensors"] == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert hub.keys - {""} == {f"Bearer {SECRET}"}  # the places for large files are signed instead
    assert f"{hub.url}/me/tiny/tree/step1 has step 1" in said
    assert SECRET not in said + caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_average_of_the_weights_is_pushed_as_such(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = LMTransformer(LMTransformerArgs.model_validate({**TINY, "vocab_size": 258}))
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters())
    begin_ema(optimizer)
    averages = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    manager = CheckpointManager(CheckpointArgs(), run)
    manager.save(2, TrainState(model, optimizer))
    manager.close()
    lingua = Lingua(capsys, "push")
    for place, revision in ((f"{run}@2:ema", "step2-ema"), (f"{run}:ema", "main")):
        found = lingua.record(place, "me/tiny", "--dry-run", "--format", "safetensors")
        folder = tmp_path / "tiny-step2-ema"
        assert (found["folder"], found["revision"], found["is_average"]) == (str(folder), revision, True)
        assert_equal(weights(folder), {name: averages[name] for name in weights(folder)})
        assert "The weights are a moving average (decay 0.9)" in (folder / "README.md").read_text()
        shutil.rmtree(folder)
    code, _, err = lingua(f"{run}@1:ema", "me/tiny", "--dry-run")
    assert code != 0
    assert "holds no average of the weights" in err


def test_what_cannot_be_pushed_is_said_in_a_sentence(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    lingua = Lingua(capsys, "push")
    for words, part in (
        ((run, "tiny"), "write USER/NAME"),
        ((run, "me/tiny", "--format", "torch"), "use hf or safetensors"),
        ((run, "me/tiny", "--out", tmp_path / "x"), "goes with --dry-run"),
        ((f"{run}@7", "me/tiny", "--dry-run"), "7"),
        ((run, "me/tiny"), "cannot be reached"),
    ):
        code, _, err = lingua(*words)
        assert code != 0
        assert part in err, err
        assert "Traceback" not in err


def test_folders_of_the_machine_are_no_part_of_a_config_that_travels() -> None:
    tree = {
        "name": "x",
        "dump_dir": "/a",
        "data": {"root_dir": "/b", "seq_len": 8, "sources": [{"path": "/c", "w": 1}]},
    }
    assert telling(tree) == {"data": {"seq_len": 8, "sources": [{"w": 1}]}}
