from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.config.base import ConfigError
from lingua.config.command_line import (
    CommandLine,
    app_module,
    app_schema,
    choose_app,
    parse_command_line,
    run_main,
    split_prompts,
)
from lingua.config.trust import trusting
from lingua.files import RunError


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], CommandLine()),
        (["a.yaml"], CommandLine("a.yaml")),
        (["config=a.yaml"], CommandLine("a.yaml")),
        (["optim.lr=1", "a.yaml", "name=b=c"], CommandLine("a.yaml", [], ["optim.lr=1", "name=b=c"])),
        (["a.yaml", "+debug", "+b.yaml"], CommandLine("a.yaml", ["debug", "b.yaml"])),
        (["--debug", "--accept-change"], CommandLine(flags={"debug": True, "accept-change": True})),
        (["--world-size=8", "-h"], CommandLine(flags={"world-size": "8", "help": True})),
        (["script=apps.mine.train"], CommandLine(overrides=["app=apps.mine"])),
    ],
)
def test_words_are_sorted(words: list[str], line: CommandLine) -> None:
    assert parse_command_line(words, ["accept-change", "world-size"]) == line


@pytest.mark.parametrize(
    ("words", "others", "prompts"),
    [
        (["out/run"], ["ckpt=out/run"], []),
        (["out/run", "some text", "more"], ["ckpt=out/run"], ["some text", "more"]),
        (["ckpt=out/run", "x = 1", "steps"], ["ckpt=out/run"], ["x = 1", "steps"]),
        (["out/run", "prompt=x=1", "temperature=1", "a"], ["ckpt=out/run", "temperature=1"], ["x=1", "a"]),
        (["def f([MASK]): x=1", "out/lr=1@5", "+over", "a.yaml"], ["ckpt=out/lr=1@5", "+over", "a.yaml"], None),
        (["out/run", "temperature=", "0.3"], ["ckpt=out/run", "temperature=", "0.3"], []),
        (["config=a.yaml", "--trust", "prompt=a"], ["config=a.yaml", "--trust"], ["a"]),
    ],
)
def test_prompts_are_told_from_other_words(words: list[str], others: list[str], prompts: list[str] | None) -> None:
    assert split_prompts(words) == (others, words[:1] if prompts is None else prompts)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.yaml", "config=b.yaml"], "two configs, a.yaml and b.yaml"),
        (["--acept-change"], "did you mean --accept-change?"),
        (["--what"], "unknown option --what; a key takes no dashes: what=VALUE"),
        (["a.yaml", "--steps=5"], "unknown option --steps=5; a key takes no dashes: steps=5"),
        (["script=x"], "script=x names no module of an app; write script=apps.main.train"),
        (["a.yaml", "=5"], "=5 names no key; write KEY=VALUE"),
        (["a.yaml", "+", "debug"], r"\+ names no overlay; write \+NAME"),
        (["a.yaml", "optim.lr=", "1e-3"], "optim.lr= 1e-3: remove the space after the ="),
        (["a.yaml", "optim.lr"], "optim.lr has no value; write optim.lr=VALUE"),
    ],
)
def test_words_that_make_no_sense(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_command_line(words, ["accept-change"])


def own_app(folder: Path) -> Path:
    configs = folder / "apps" / "mine" / "configs"
    configs.mkdir(parents=True)
    (configs.parent / "args.py").touch()
    (configs / "x.yaml").write_text("seed: 1")
    return configs / "x.yaml"


def test_the_app_is_chosen_by_word_by_config_by_run_or_by_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_app(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert choose_app(parse_command_line([])) == "apps.main"
    assert choose_app(parse_command_line(["nothing.yaml"])) == "apps.main"
    assert choose_app(parse_command_line([str(config), "app=apps.other"])) == "apps.other"
    assert choose_app(parse_command_line([str(config.relative_to(tmp_path))])) == "apps.mine"
    (tmp_path / "run" / "checkpoints" / "0000000010").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("app: apps.own")
    assert choose_app(parse_command_line(["run/config.yaml"])) == "apps.own"
    (tmp_path / "mamba.yaml").write_text("base: [other.yaml, mamba.yaml, named.yaml, model=small]")
    (tmp_path / "named.yaml").write_text("base: other.yaml\napp: apps.mamba")
    (tmp_path / "other.yaml").write_text("base: mamba.yaml\napp: apps.other")
    assert choose_app(parse_command_line(["mamba.yaml"])) == "apps.mamba"  # by the base that wins
    for checkpoint in ("run", "run/checkpoints/0000000010"):
        with trusting():
            assert choose_app(parse_command_line([f"ckpt={checkpoint}"])) == "apps.own"


def test_an_app_that_is_not_there() -> None:
    assert app_module("apps.main", "args").TrainArgs
    with pytest.raises(ConfigError, match=r"no module apps\.nope\.args"):
        app_module("apps.nope", "args")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError(["one", "two"]), 2, "error: one\nerror: two\n"),
        (ValueError("bad"), 1, "error: bad\n"),
        (RunError("lost"), 1, "error: lost\n"),
        (OSError(28, "No space left on device", "x"), 1, "error: x: No space left on device; free some space there\n"),
        (OSError(20, "Not a directory", "x"), 1, "error: x: Not a directory; check the path and its permissions\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_person_can_mend_is_a_sentence(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.delenv("LINGUA_DEBUG", raising=False)
    assert run_main(fail, []) == code
    assert capsys.readouterr().err == printed
    if isinstance(error, Exception):
        assert run_main(fail, ["--debug"]) == code
        monkeypatch.setenv("LINGUA_DEBUG", "1")
        assert run_main(fail, []) == code
        assert capsys.readouterr().err.count("Traceback") == 2


def test_a_fault_of_the_program_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda words: words[0].missing, ["x"]) == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert "AttributeError" in capsys.readouterr().err
    assert run_main(lambda words: None, []) == 0
    assert run_main(lambda words: 75, []) == 75


def test_who_leaves_keeps_its_word_and_its_promises_to_packages() -> None:
    code = (
        "import atexit; from lingua.config.command_line import leave; "
        "atexit.register(print, 'last'); print('first'); leave(75)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "first\nlast\n", "")


def test_who_leaves_does_not_wait_for_a_package_that_never_ends() -> None:
    code = "import atexit, threading, lingua.config.command_line; lingua.config.command_line.EXIT_HOOKS_S = 0.01\n"
    code += "atexit.register(threading.Event().wait); print('said', end=''); lingua.config.command_line.leave(75)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said", "")


@pytest.mark.parametrize("app", ["", ".", "..x", "apps/main", "apps..main", "/tmp"])
def test_what_is_no_package_is_no_app(app: str) -> None:
    with pytest.raises(ConfigError, match=f"app={re.escape(app)} is not the name of a package"):
        app_schema(app)


def test_a_package_without_a_config_class_is_no_app() -> None:
    with pytest.raises(ConfigError, match=r"app=lingua: .*args.py has no class TrainArgs; see apps/main/args.py"):
        app_schema("lingua")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("", "a word is empty; remove it, or set the shell variable"),
        ("--optim.lr", "--optim.lr: keys take no dashes; write optim.lr=VALUE"),
        ("--optim.lr=1e-3", "--optim.lr=1e-3: keys take no dashes; write optim.lr=1e-3"),
    ],
)
def test_what_no_command_takes_is_refused_by_every_command(
    word: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda words: pytest.fail("it began"), ["status", word]) == 2
    assert sentence in capsys.readouterr().err


def test_a_value_that_the_shell_cut_at_its_blanks_is_whole() -> None:
    words = ["x.yaml", "data.sources={a:", "1,", "b:", "2}", "model.layers=[a,", "b]", "name=c", "prompt=def f({", "+d"]
    line = parse_command_line(words)
    assert line.overrides == ["data.sources={a: 1, b: 2}", "model.layers=[a, b]", "name=c", "prompt=def f({"]
    assert (line.config, line.overlays) == ("x.yaml", ["d"])
    seen: list[str] = []
    assert run_main(seen.extend, words[:5]) == 0
    assert seen == ["x.yaml", "data.sources={a: 1, b: 2}"]
