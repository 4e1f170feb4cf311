"""Parse the command line and turn errors into exit codes; every entry point uses these functions.

An error that a user can fix prints one sentence; `--debug` or LINGUA_DEBUG=1 adds the traceback. Exit code 2 means
that the config or the command line is wrong and nothing was touched, 1 any other failure. Imports nothing heavy.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import importlib
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from lingua.config.trust import DEFAULT_APP, check_code, found, trusting
from lingua.logger import printable
from lingua.masking import public_text

if TYPE_CHECKING:
    from lingua.config.keys.train import TrainArgs
    from lingua.config.yaml_layers import Point

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_INTERRUPTED = 130
EXIT_HOOKS_S = 5.0
"""Seconds that the exit hooks of other packages may take."""
_KEY = re.compile(r"(?!.*\.ya?ml$)[a-z_]\w*(\.\w+)+")


@dataclass
class CommandLine:
    """A parsed command line."""

    config: str | None = None
    overlays: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str | bool] = field(default_factory=dict)
    """`--accept-change` -> True, `--world-size=8` -> "8"."""
    point: Point | None = None
    """A point of a sweep. Its values override everything, and the `grid` block is ignored."""

    @property
    def typed(self) -> list[str]:
        """The words without flags."""
        config = [] if self.config is None else [self.config]
        return [*config, *(f"+{overlay}" for overlay in self.overlays), *self.overrides]

    @property
    def debug(self) -> bool:
        return bool(self.flags.get("debug"))


def parse_command_line(words: Sequence[str], flags: Sequence[str] = ()) -> CommandLine:
    """Parse words: a bare path or `config=x.yaml`, `+overlay.yaml`, `a.b=value`, and `--flag` for the given names.

    Every command knows --debug, --trust and --help. `script=apps.mine.train` means `app=apps.mine`. Raises ConfigError.
    """
    from lingua.config.base import ConfigError

    line, wrong, words = CommandLine(), [], _whole_values(words)
    known = ["debug", "help", "trust", *flags]
    for before, word in zip(["", *words], words, strict=False):
        name, has_value, value = word.lstrip("-").partition("=")
        if has_value and not name.strip("+-"):
            wrong.append(f"command line: {word} names no key; write KEY=VALUE")
        elif word.startswith("-"):
            name = {"h": "help"}.get(name, name)
            if word.startswith("---") or name not in known:
                near = difflib.get_close_matches(name, known, 1)
                remedy = f"did you mean --{near[0]}?" if near else f"a key takes no dashes: {name}={value or 'VALUE'}"
                wrong.append(f"command line: unknown option {word}; {remedy}")
            line.flags[name] = value if has_value else True
        elif word == "+":
            wrong.append("command line: + names no overlay; write +NAME or +FILE.yaml, without a blank")
        elif word.startswith("+"):
            line.overlays.append(word[1:])
        elif not has_value and before.endswith("="):
            wrong.append(f"command line: {before} {word}: remove the space after the =")
        elif not has_value and _KEY.fullmatch(word) and not os.path.exists(word):
            wrong.append(f"command line: {word} has no value; write {word}=VALUE")
        elif not has_value or name == "config":
            path = value if has_value else word
            if line.config is not None:
                wrong.append(f"command line: two configs, {line.config} and {path}; write +{path} to stack the second")
            line.config = path
        elif name == "script" and "." not in value:
            wrong.append(f"command line: {word} names no module of an app; write script={DEFAULT_APP}.train")
        elif name == "script":
            line.overrides.append(f"app={value.rpartition('.')[0]}")
        else:
            line.overrides.append(word)
    if wrong:
        raise ConfigError(wrong)
    return line


def _whole_values(words: Sequence[str]) -> list[str]:
    """Join a value in braces or brackets that a shell split at spaces: data.sources={mine: 1} without quotes."""
    whole = [""]
    for word in words:
        is_open = re.match(r"[\w.]+=[{[]", whole[-1]) and any(
            whole[-1].count(a) > whole[-1].count(b) for a, b in ("{}", "[]")
        )
        whole[-1:] = [f"{whole[-1]} {word}"] if is_open else [whole[-1], word]
    return whole[1:]


_NOT_BARE = re.compile(r"[-+].*|[\w.]+=.*|.*\.ya?ml", re.DOTALL)


def with_ckpt(words: Sequence[str]) -> list[str]:
    """Read a bare RUN, RUN@STEP or folder as `ckpt=`; a .yaml stays the config."""
    return [word if _NOT_BARE.fullmatch(word) else f"ckpt={word}" for word in words]


def split_prompts(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the other words of `generate`, a bare RUN as `ckpt=`, and the prompts.

    A prompt is `prompt=TEXT`, a text with a gap such as [MASK], or a bare text after the run.
    """
    others: list[str] = []
    prompts: list[str] = []
    for word in words:
        if word.startswith("prompt=") or "[MASK" in word:
            prompts.append(word.removeprefix("prompt="))
        elif _NOT_BARE.fullmatch(word) or not any(other.startswith("ckpt=") for other in others):
            others += with_ckpt([word])
        elif others[-1].endswith("="):  # a space after the =, which is reported later
            others.append(word)
        else:
            prompts.append(word)
    return others, prompts


def choose_app(line: CommandLine) -> str:
    """Return the app's package: from `app=`, else the key `app` of the config or of the run that `ckpt=` or `follow=`
    names, else the package whose configs/ contains the config. Raises ConfigError if a config that came with weights
    names it, and is not trusted."""
    given = dict(word.split("=", 1) for word in line.overrides)
    if "app" in given:
        return given["app"]
    run = given.get("ckpt") or given.get("follow")
    config = Path(line.config) if line.config is not None else found(_config_of_run(run))
    if config is None or not config.is_file():
        return DEFAULT_APP
    from lingua.config.compose import code_named

    trees = _trees(config)  # bases are read only if the config itself names no app
    own = next(trees)
    named = (tree["app"] for tree in itertools.chain((own,), trees) if isinstance(tree.get("app"), str))
    app = next(named, None) or _app_around(config)
    if app != DEFAULT_APP:
        check_code([config], code_named({**own, "app": app}))
    return app


def _trees(config: Path, above: tuple[Path, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield the trees of a file and its bases, in order of precedence; errors in bases are not reported here."""
    from lingua.config.yaml_layers import read_yaml

    tree = read_yaml(config).tree
    yield tree
    bases = tree.get("base")
    for base in reversed(bases if isinstance(bases, list) else [bases]):
        path = config.parent / Path(base).expanduser() if isinstance(base, str) else config
        if path.suffix in (".yaml", ".yml") and path.is_file() and path.resolve() not in (config.resolve(), *above):
            yield from _trees(path, (*above, config.resolve()))


def _app_around(config: Path) -> str:
    """Return the package whose configs/ contains the config, or the default."""
    for folder in config.resolve().parents:
        if folder.name == "configs" and (folder.parent / "args.py").is_file():
            inside = folder.parent.is_relative_to(Path.cwd())
            return ".".join(folder.parent.relative_to(Path.cwd()).parts) if inside else DEFAULT_APP
    return DEFAULT_APP


def _config_of_run(checkpoint: str | None) -> Path | None:
    """Return the frozen config beside or above a checkpoint (<run>/checkpoints/<step>), or None."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return next((p for p in (folder / "config.yaml" for folder in (path, *path.parents[:2])) if p.is_file()), None)


def app_module(app: str, name: str) -> ModuleType:
    """Import a module of an app, such as `train`. Raises ConfigError if there is no such app."""
    from lingua.config.base import ConfigError
    from lingua.config.compose import see_working_folder

    see_working_folder()
    module = f"{app}.{name}"
    if not all(part.isidentifier() for part in app.split(".")):
        raise ConfigError(f"app={app} is not the name of a package; write it as in Python, app={DEFAULT_APP}")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ConfigError(
            f"app {app} has no module {module} importable from {Path.cwd()}; "
            f"run in the folder above it, or choose another with app={DEFAULT_APP}"
        ) from error


def app_schema(app: str) -> type[TrainArgs]:
    """Return the class of an app's config. Raises ConfigError if there is no such app."""
    from lingua.config.base import ConfigError

    module = app_module(app, "args")
    if not hasattr(module, "TrainArgs"):
        raise ConfigError(f"app={app}: {module.__file__} has no class TrainArgs; see apps/main/args.py")
    return module.TrainArgs


def wants_traceback(words: Sequence[str]) -> bool:
    return "--debug" in words or os.environ.get("LINGUA_DEBUG", "") not in ("", "0")


def _refuse_words(words: Sequence[str]) -> None:
    """Raise ConfigError for words that no command takes."""
    wrong = "" if "" not in words else "a word is empty; remove it, or set the shell variable that it stands for"
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        if word.startswith("-") and _KEY.fullmatch(name):
            wrong = f"{word}: keys take no dashes; write {name}={value or 'VALUE'}"
    if wrong:
        from lingua.config.base import ConfigError  # pydantic, which `--help` does without

        raise ConfigError(f"command line: {wrong}")


def run_main(main: Callable[[list[str]], int | None], words: Sequence[str]) -> int:
    """Call `main(words)`, print errors as sentences, and return the exit code."""
    try:
        _refuse_words(words)
        with trusting("--trust" in words):
            return main(_whole_values(words)) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if wants_traceback(words) or code is None:
            print(printable(public_text(traceback.format_exc())), end="", file=sys.stderr)
        elif code != EXIT_BAD_CONFIG or not _said_by_rank_0(error):
            for sentence in getattr(error, "problems", [_sentence(error)]):
                print(f"error: {printable(public_text(sentence))}", file=sys.stderr)
        return code or EXIT_FAILED


def program(module: str, main: Callable[..., int], **own: Any) -> Callable[[list[str]], int]:
    """Return `main` bound to an app's own arguments, and run it if `module` is the program that was started."""
    command = partial(main, **own)
    if module == "__main__":
        leave(run_main(command, sys.argv[1:]))
    return command


def _said_by_rank_0(error: Exception) -> bool:
    """Return whether all ranks raise this error and another one prints it."""
    return getattr(error, "known_to_all", False) and os.environ.get("RANK", "0") != "0"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # not caught anywhere else
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there" if full else "check the path and its permissions"
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {remedy}"
    return str(error) or type(error).__name__


def leave(exit_code: int) -> NoReturn:
    """End this process without tearing the interpreter down. `main` must have closed whatever it opened.

    Teardown with torch loaded costs a second of CPU per rank, which a job in its grace period may not have. Measured
    from stop.json to the end of two ranks: 1.1 s on two idle cores and 10 s on busy ones; this way 0.2 s.
    """
    _flush()
    late = threading.Timer(EXIT_HOOKS_S, os._exit, [exit_code])  # an exit hook may wait for a server, or forever
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()  # hooks of logging, wandb, multiprocessing
    _flush()
    os._exit(exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader or the terminal is gone
            stream.flush()


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that a user can fix, or None for a bug."""
    from lingua.files import CommandError, ConfigError, RunError

    if isinstance(error, ConfigError | CommandError):
        return EXIT_BAD_CONFIG
    return EXIT_FAILED if isinstance(error, ValueError | OSError | RunError) else None
