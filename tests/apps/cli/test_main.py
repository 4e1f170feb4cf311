from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DEBUG = "apps/main/configs/debug.yaml"
# What `lingua` does, and what it has imported at the end.
PROGRAM = """
import sys
from apps.cli.main import main
try:
    main()
finally:
    heavy = sorted({"torch", "numpy", "pydantic", "transformers", "wandb"} & set(sys.modules))
    print("imported:", heavy, file=sys.stderr)
"""


def lingua(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    environment.pop("LINGUA_DEBUG", None)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=cwd, env={**environment, **env}, capture_output=True, text=True
    )


def test_check_prints_config_origins_and_figures_without_torch(tmp_path: Path) -> None:
    done = lingua("check", str(ROOT / DEBUG), "optim.lr=1e-3", "+debug", "--all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "imported: ['pydantic']" in done.stderr
    for line in (
        "  lr: 0.001  # command line",
        f"name: debug  # {ROOT / DEBUG}:4",
        f"  load_async: false  # {ROOT / 'apps/main/configs/overlays/debug.yaml'}:8",
        "seed: 777  # ",
        "deterministic: false  # default",
    ):
        assert line in done.stdout
    for figure in ("parameters non embedding", "tokens per step", "checkpoint bytes", "memory bytes", "hours"):
        assert figure in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_prints_the_figures_one_plans_with_and_what_is_set(tmp_path: Path) -> None:
    shown = lingua("check", str(ROOT / DEBUG), "optim.lr=1e-3", cwd=tmp_path).stdout.splitlines()
    assert len(shown) < 25
    assert any(line.startswith("optim: type=muon lr=0.001 scheduler=linear") for line in shown)
    assert any(line.split()[:2] == ["parameters", "1,574,016"] for line in shown)
    assert "name=debug" in "\n".join(shown).replace("sample", "\n")


def test_check_as_json(tmp_path: Path) -> None:
    done = lingua("check", f"config={ROOT / DEBUG}", "--json", "--world-size", "4", "--gpu", "h100", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert record["facts"]["ranks"] == 4
    assert record["config"]["name"] == "debug"
    assert record["origins"]["optim.clip"] == "default"
    assert set(record["facts"]) == set(record["formulas"])


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["check", DEBUG, "optim.lrr=1"], 2, "error: command line: unknown key optim.lrr; did you mean optim.lr?"),
        (["check", "apps/main/configs/debgu.yaml"], 2, "did you mean apps/main/configs/debug.yaml"),
        (["check", DEBUG, "--gpu", "tpu"], 2, "--gpu tpu is not in the table"),
        (["check", DEBUG, "--mfu", "40"], 2, "--mfu 40.0 is no share"),
        (["check", DEBUG, "--world"], 2, "No such option"),
        (["chek"], 2, "No such command 'chek'"),
        (["schema", "app=apps.nope"], 2, "no module apps.nope.args"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_an_exit_code(words: list[str], code: int, sentence: str) -> None:
    done = lingua(*words)
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in lingua("check", "nothing.yaml", "--debug").stderr
    assert "Traceback" in lingua("check", "nothing.yaml", LINGUA_DEBUG="1").stderr


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = lingua("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("check", "schema", "train", "generate", "why", "stop", "doctor"))
    assert "imported: []" in done.stderr


def test_schema_and_reference() -> None:
    assert "data" in json.loads(lingua("schema").stdout)["properties"]
    assert lingua("schema", "--reference").stdout.startswith("# Configuration keys")


def test_words_are_passed_on_unchanged_to_the_chosen_app(tmp_path: Path) -> None:
    app = tmp_path / "apps_of_mine" / "mine"
    app.mkdir(parents=True)
    for name in ("train", "generate"):
        (app / f"{name}.py").write_text(f"def main(words):\n    print('{name}', words)\n    return 75\n")
    words = ["x.yaml", "--accept-change", "app=apps_of_mine.mine", "a.b= 1", "+debug"]
    for name in ("train", "generate"):
        done = lingua(name, *words, cwd=tmp_path)
        assert (done.stdout, done.returncode) == (f"{name} {words}\n", 75), done.stderr


@pytest.mark.soak
def test_a_copied_app_with_a_key_of_its_own_is_found_by_its_config(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(ROOT / "apps" / "main", mine, ignore=shutil.ignore_patterns("__pycache__"))
    args = (mine / "args.py").read_text()
    key = '    sharpness: float = 1.0\n    """How sharp."""\n    app: str'
    (mine / "args.py").write_text(args.replace("    app: str", key, 1))
    done = lingua("check", "mine/configs/debug.yaml", "sharpness=2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["config"]["sharpness"], record["config"]["app"]) == (2.0, "mine")
    assert "How sharp." in lingua("schema", "app=mine", cwd=tmp_path).stdout


def test_eval_says_what_it_takes_and_what_is_wrong_without_torch(tmp_path: Path) -> None:
    cases = [
        (["--help"], 0, ["--follow", "--newest-first", "--once", "prefetch CONFIG"]),
        (["--follow", "--once", f"{tmp_path}/run"], 2, [f"{tmp_path}/run does not exist"]),
        ([f"{tmp_path}/run@3", "config=apps/main/configs/eval.yaml"], 2, [f"{tmp_path}/run does not exist"]),
        (["prefetch", DEBUG], 0, ["names no harness tasks"]),
    ]
    program = """
import json, sys
from apps.cli.main import main
from apps.main.eval import main as without_typer
for words in json.loads(sys.argv[1]):
    sys.argv = ["lingua", "eval", *words]
    try:
        main()
    except SystemExit as left:
        print(f"left with {left.code}")
print("python -m: ", without_typer(["--help"]), "torch" in sys.modules)
"""
    words = json.dumps([words for words, _, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", program, words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    *parts, last = " ".join(done.stdout.split()).split("left with ")
    for part, code, (_, expected, told) in zip(parts, [each[0] for each in (*parts[1:], last)], cases, strict=True):
        assert all(each in part for each in told), done.stdout
        assert code == str(expected), done.stdout
    assert "--once" in last
    assert last.endswith("python -m: 0 False"), last


def test_the_version_and_the_keys_of_generate_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from apps.cli.main import app  # not at the top: other tests here look at what is imported

    cases = [(["--version"], ["0."]), (["generate", "--help"], ["Usage: ", "RUN[@STEP] [TEXT]", "temperature=0.8 "])]
    for words, shown in cases:
        with pytest.raises(SystemExit) as end:
            app(words)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(part in out for part in shown), out
