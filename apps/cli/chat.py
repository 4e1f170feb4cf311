"""`lingua chat RUN`: talk to a model, with streamed answers, line editing, history and sampling keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lingua.model.generate import Generator

DEFAULTS = ["temperature=0.8", "top_k=50", "max_gen_len=256"]
HELP = """/more            go on where the answer ended
/again           answer the same once more
/new             forget the conversation
/KEY=VALUE       temperature, top_k, top_p, max_gen_len, until, seed: /temperature=0.5
/quit, Ctrl-D    end; Ctrl-C ends an answer
A line that ends with \\ goes on in the next."""


def chat(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN[@STEP] [TEXT] [KEY=VALUE] ...",
            help="A run, or whatever `lingua generate` takes; what to say first; keys.",
        ),
    ],
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of `messages`, as in tokenizers of Hugging Face."),
    ] = None,
) -> None:
    """Talk to a model and see its answer as it is generated.

    A pretrained model continues what you type. A run trained with data.loss_on=completion answers it: each prompt by
    itself, as in training, unless a chat_template.jinja beside the weights or --template formats the conversation.
    /help lists the commands; keys are those of `lingua generate`.
    """
    from apps.main.generate import load_generator, read_command_line, write
    from lingua.config.command_line import parse_command_line, split_prompts
    from lingua.train.describe import described

    others, first = split_prompts(words)
    line = parse_command_line(others)
    line.overrides[:0] = DEFAULTS
    config, args = read_command_line(line)
    run_args = described(config, args.app)
    text = template_of(config.parent, template, answers=run_args.data.loss_on == "completion")
    talk = Talk(load_generator(run_args, args), text, write)
    if sys.stdin.isatty():
        print("it continues what you type" if text is None else "it answers what you type", end="; ", file=sys.stderr)
        print("/help lists what else can be typed, Ctrl-D ends", file=sys.stderr)
    with _history():
        for typed in chain(first, typed_lines()):
            if not talk.take(typed):
                return


def template_of(folder: Path, chosen: Path | None, *, answers: bool) -> str | None:
    """Return the template of conversations, or None for a model that continues text. Raises ConfigError."""
    from lingua.config.base import ConfigError
    from lingua.model.tokenizer_json import ANSWER_TEMPLATE, CHAT_TEMPLATE_FILE

    beside = folder / CHAT_TEMPLATE_FILE
    file = chosen or (beside if beside.is_file() else None)
    if file is None:
        return ANSWER_TEMPLATE if answers else None
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template {file} cannot be read: {error}; name a file of text") from None


class Talk:
    """A conversation with a generator. Without a template, it continues text."""

    def __init__(self, generator: Generator, template: str | None, write: Callable[[str], None]) -> None:
        self._generator, self._template, self._write = generator, template, write
        self._prompt = ""
        """The last prompt."""
        self._answer = ""
        self._messages: list[dict[str, str]] = []

    def take(self, typed: str) -> bool:
        """Answer a line or carry out its command; return whether the conversation goes on."""
        word = typed.rstrip()
        name, has_value, value = (part.strip() for part in word[1:].partition("="))
        if word == "/quit":
            return False
        if word == "/help":
            self._write(HELP + "\n")
        elif word == "/new":
            self._prompt, self._answer, self._messages = "", "", []
        elif word in ("/more", "/again") and not self._prompt:
            self._write("nothing was said yet\n")
        elif word == "/more":
            self._say(self._prompt + self._answer, before=self._answer)
        elif word == "/again":
            self._say(self._prompt)
        elif word.startswith("/") and name in _KEYS:
            self._turn(name, value if has_value else None)
        elif typed.startswith("/"):
            near = get_close_matches(name.partition(" ")[0], (*_WORDS, *_KEYS), 1)
            hint = f"did you mean /{near[0]}{'=VALUE' * (near[0] in _KEYS)}? " if near else ""
            self._write(f"{word.split()[0]} is not known; {hint}/help lists what is (text may begin with a blank)\n")
        elif typed:
            if self._template is not None:
                self._messages.append({"role": "user", "content": typed})
            self._say(typed if self._template is None else rendered(self._template, self._messages))
        return True

    def _turn(self, key: str, value: str | None) -> None:
        """Set a key of the generator, checked as in a config, unless `value` is None, and print it."""
        from lingua.config.base import ConfigError
        from lingua.config.compose import compose

        now = self._generator.args
        try:
            changed = now if value is None else compose(None, [], [f"{key}={value}"], type(now)).args
        except ConfigError as error:
            self._write(f"{error}\n")
            return
        self._generator.args = now.model_copy(update={key: getattr(changed, key)})
        self._write(f"{key} is {getattr(changed, key)}\n")

    def _say(self, prompt: str, before: str = "") -> None:
        """Generate after a prompt and write the text as it comes. Ctrl-C keeps the text so far."""
        from apps.main.generate import write_as_it_comes

        shown = ""

        def come(text: str) -> None:
            nonlocal shown
            shown += text
            self._write(text)

        if self._template is None and not before:
            self._write(prompt)
        try:
            shown = write_as_it_comes(self._generator, prompt, come).text
        except KeyboardInterrupt:
            self._write(" ...")
        except ValueError as error:  # the tokenizer refuses the text
            self._write(str(error))
        self._write("\n")
        self._prompt, self._answer = prompt.removesuffix(before) if before else prompt, before + shown
        if self._template is not None:
            if self._messages[-1]["role"] == "assistant":
                self._messages.pop()
            self._messages.append({"role": "assistant", "content": self._answer})
        seed = self._generator.args.seed + 1  # or the same prompt would get the same answer
        self._generator.args = self._generator.args.model_copy(update={"seed": seed})


_KEYS = ("temperature", "top_k", "top_p", "max_gen_len", "until", "seed", "sampler", "diffusion_steps", "block")
_WORDS = ("more", "again", "new", "help", "quit")


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """Fill in a template, sandboxed, since anyone may have written it. Raises ConfigError."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from lingua.config.base import ConfigError

    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        more: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
        return environment.from_string(template).render(messages=messages, **more)
    except TemplateError as error:
        raise ConfigError(f"the chat template: {error}; choose another with --template FILE") from None


def typed_lines() -> Iterator[str]:
    """Yield the lines typed, until the end of input."""
    asks, whole = sys.stdin.isatty(), ""
    while True:
        try:
            line = input(("... " if whole else "> ") if asks else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            whole = ""
            continue
        if line.endswith("\\"):
            whole += line[:-1] + "\n"
            continue
        yield whole + line
        whole = ""


@contextmanager
def _history() -> Iterator[None]:
    """Enable line editing, with a history that is kept in the user's state folder."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "lingua"
    file = state / "chat_history"
    readline.set_history_length(1000)
    with suppress(OSError):  # no history yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        try:
            state.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            print(f"the history is not kept: {error}", file=sys.stderr)
