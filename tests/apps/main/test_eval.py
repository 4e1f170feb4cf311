"""`python -m apps.main.eval`: by hand on whatever holds weights, and following a run that was really trained."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.cli.export import Format, make_export
from apps.main.eval import main
from lingua.checkpoint import layout
from lingua.checkpoint.lookup import find_one
from lingua.config.command_line import run_main
from lingua.eval.measures import Measures
from lingua.files import read_json
from lingua.run.metrics import read_metrics
from tests.evaluated import make_data, words_of
from tests.ports import free_port
from tests.ranks import run_on_ranks
from tests.trainer import train

ROOT = Path(__file__).parents[3]
SMALL = ["generator.device=cpu", "validation.max_steps=3", "generator.max_tokens=4000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = words_of(make_data(folder), folder / "run", "eval.automatic=false", "validation.at_ends=true")
    result = train(words)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of the test's own."""
    target = tmp_path / "run"
    shutil.copytree(run, target)
    text = (run / "config.yaml").read_text()
    (target / "config.yaml").write_text(text.replace(str(run), str(target)))
    return target


def by_hand(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["metrics"]


def test_by_hand_on_all_that_holds_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = by_hand(capsys, str(run), *SMALL)
    assert newest.keys() == {
        f"documents/mine/{name}" for name in ("nll", "ppl", "bpb", "n_tokens", "n_bytes", "n_documents", "n_skipped")
    }
    assert newest["documents/mine/n_documents"] == 3
    assert by_hand(capsys, f"ckpt={run}@5") == newest
    assert by_hand(capsys, f"ckpt_dir={layout.folder(run / 'checkpoints', 5)}") == newest
    assert by_hand(capsys, f"{run}@2") != newest
    measures = tmp_path / "measures.yaml"
    measures.write_text("generator: {dtype: fp32}\nvalidation: {max_steps: 3}\nharness: null\n")
    assert by_hand(capsys, f"config={measures}", f"ckpt={run}") == newest
    away = tmp_path / "travelled"
    shutil.copytree(layout.folder(run / "checkpoints", 5), away)
    assert by_hand(capsys, f"config={run}/config.yaml", f"ckpt={away}") == newest
    assert main([str(run), f"dump_dir={tmp_path}/new/folder", "validation.stride=64", "validation.max_steps=1"]) == 0
    assert "documents/mine/bpb" in capsys.readouterr().out
    assert read_json(tmp_path / "new/folder/results.json")["metrics"].keys() == newest.keys()


def test_packed_rows_give_the_number_of_the_training_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = read_metrics(run / "metrics.validation.jsonl")[-1]
    found = by_hand(capsys, str(run), *SMALL, "validation.context=packed", "measures=[{type: held_out}]")
    for name in ("nll", "bpb"):
        assert found[f"validation/mine/{name}"] == pytest.approx(logged[f"mine/{name}"], rel=1e-6)
    assert found["documents/mine/bpb"] != pytest.approx(logged["mine/bpb"], rel=1e-6), "another number, another name"


@pytest.mark.soak
def test_a_measure_of_ones_own_is_one_file(run: Path, tmp_path: Path) -> None:
    """The one in the README."""
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "lingua/eval/README.md").read_text(), re.DOTALL)
    (tmp_path / "answer_length.py").write_text(source)
    words = [str(run.absolute()), *SMALL, "generator.max_gen_len=4", "plugins=[answer_length]", "dump_dir=found"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def evaluate(measures: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "apps.main.eval", *words, f"measures={measures}"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = evaluate("[{type: answer_length, prompts: [a, b]}]")
    assert done.returncode == 0, done.stderr
    metrics = read_json(tmp_path / "found/results.json")["metrics"]
    assert (metrics["documents/mine/n_documents"], metrics["length/mean"] > 0) == (3, True)
    done = evaluate("[{type: answer_length, prompt: a}, {type: answers}]")
    assert done.returncode == 2
    assert "unknown key measures.0.prompt; did you mean measures.0.prompts?" in done.stderr, "as it was typed"
    assert "eval.measures.1.type: unknown measure type 'answers'; known: answer_length, harness" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "nothing to evaluate; write ckpt=RUN_OR_FOLDER, or follow=RUN"),
        (["follow=/no/such/run"], 2, "/no/such/run does not exist"),
        (["{run}", "validation.max_stepps=1"], 2, "did you mean validation.max_steps?"),
        (["{run}", "validation=null"], 2, "nothing is measured"),
        (["{run}", "validation.use_val_from_train_src=false"], 2, "there is no *.val.jsonl beside"),
        (["{run}", "validation.sources=[nowhere]"], 2, "nowhere does not exist"),
        (["{run}@3"], 2, "no published checkpoint of step 3"),
        (["follow={run}", "dump_dir=x"], 2, "results go to"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Path,
    words: list[str],
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words != ["{run}@3"]:
        monkeypatch.setattr(Measures, "measure", lambda *args: pytest.fail("a model was loaded"))
    assert run_main(main, [word.replace("{run}", str(run)) for word in words]) == code
    assert sentence in capsys.readouterr().err


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "follow=RUN" in capsys.readouterr().out


def test_following_gives_what_evaluating_afterwards_gives(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"follow={copy}"]) == 0
    lines = read_metrics(copy / "metrics.eval.jsonl")
    assert [line["global_step"] for line in lines] == [2, 4, 5]  # every second, and the last
    for line in lines:
        step = line["global_step"]
        metrics = read_json(copy / f"evals/{step:010d}/results.json")["metrics"]
        assert metrics == by_hand(capsys, f"{copy}@{step}")
        assert line.items() >= metrics.items()
    assert lines[-1]["documents/mine/nll"] < lines[0]["documents/mine/nll"]
    newest = lines[-1]["documents/mine/bpb"]
    assert main([f"follow={copy}", "--once"]) == 0  # nothing waits any more
    said = capsys.readouterr().out
    assert said.startswith(f"{copy}@5\n")
    assert f"documents/mine/bpb          {newest:,.6g}\n" in said
    assert main([f"follow={copy}", "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ckpt"], found["metrics"]["documents/mine/bpb"]) == (f"{copy}@5", newest)


def test_a_damaged_checkpoint_is_given_up_and_the_others_are_evaluated(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingua.eval.command.StopSignals.wait", lambda self, timeout_s: None)
    weights = layout.folder(copy / "checkpoints", 4) / layout.model_file(0)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main([f"follow={copy}", "backoff_s=0", "max_tries=2"]) == 0
    assert "does not verify" in read_json(copy / "evals/0000000004/failed.json")["reason"]
    assert [line["global_step"] for line in read_metrics(copy / "metrics.eval.jsonl")] == [2, 5]


def test_only_weights_are_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = by_hand(capsys, str(copy))
    for file in find_one(copy).folder.iterdir():
        if not file.name.startswith(("model.", ".metadata", "manifest")):
            file.unlink()
    assert by_hand(capsys, str(copy)) == expected


@pytest.mark.soak
@pytest.mark.ranks
def test_ranks_share_each_evaluation(copy: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = by_hand(capsys, f"{run}@4", "validation.max_steps=null")
    port = free_port()

    def follow(rank: int) -> int:
        logging.disable()
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="3")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return main([f"follow={copy}", "validation.max_steps=null", "generator.max_tokens=600"])

    assert run_alone_on_ranks(follow, 3) == [0, 0, 0]
    found = read_json(copy / "evals/0000000004/results.json")["metrics"]
    assert found == pytest.approx(expected, rel=1e-6)


def run_alone_on_ranks(act: Any, n: int) -> list[Any]:
    """As `run_on_ranks`, for code that makes its own process group."""
    import torch.distributed as dist

    def without_group(rank: int) -> Any:
        dist.barrier()  # gloo fails where one leaves while another still connects
        dist.destroy_process_group()
        result = act(rank)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return result

    return run_on_ranks(without_group, n)


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness_beside_held_out_text(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": f"def f{n}(", "a": n % 2}) + "\n" for n in range(4)))
    measures = tmp_path / "measures.yaml"
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a",
        "doc_to_choice": ["x", "self"],
    }
    harness = {"tasks": [task], "bootstrap_iters": 0}
    settings = {"generator": {"dtype": "fp32"}, "validation": {"max_steps": 1}, "harness": harness}
    measures.write_text(json.dumps(settings | {"core_metrics": {"mine": 2.0}}))
    assert main(["prefetch", str(measures)]) == 0
    assert capsys.readouterr().out.endswith("mine: there\n")
    assert main([f"follow={copy}", f"config={measures}"]) == 0
    line = read_metrics(copy / "metrics.eval.jsonl")[-1]
    assert line["core_eval/overall_avg"] == line["eval/overall_avg"] == line["eval/mine/acc_norm"]
    assert "documents/mine/bpb" in line
    assert len(read_json(copy / "evals/0000000005/samples.json")["mine"]) == 4
    (tmp_path / "q.jsonl").rename(tmp_path / "gone")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another cache"))
    assert run_main(main, [str(copy), f"config={measures}"]) == 2
    assert "eval.harness.tasks: mine cannot be loaded here" in capsys.readouterr().err


def test_an_exported_folder_gives_the_numbers_of_its_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_export(f"{run}@4", tmp_path / "hf", Format.hf)
    file = f"{run.parent}/data/mine/mine.val.jsonl"
    words = [*SMALL, f"validation.sources=[{file}]", "validation.use_val_from_train_src=false"]
    expected = by_hand(capsys, f"{run}@4", *words)
    assert by_hand(capsys, f"{tmp_path}/hf", *words) == pytest.approx(expected, rel=1e-6)
