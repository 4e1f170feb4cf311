"""Generate text from a run, or continue prompts.

usage: python -m apps.main.generate [ckpt=]RUN[@STEP] [TEXT ...] [config=FILE] [key=value ...]

RUN is a run (its newest checkpoint), a step of it, a checkpoint folder, an export, a Hugging Face folder or any file of
weights that training can start from. The config of the model is the config.yaml, params.json or config.json near it, or
config=FILE. TEXT is a prompt, also as prompt=TEXT; with [MASK] in it, one with a gap (apps/diffusion/README.md).
Several texts make one batch; without one, prompts are read line by line. --trust runs code that a config beside weights
names.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from lingua.config.base import ConfigError, Text, named
from lingua.config.command_line import CommandLine, app_module, choose_app, parse_command_line, run_main, split_prompts
from lingua.config.compose import compose
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.reference import field_docs
from lingua.logger import printable
from lingua.train.describe import config_of, described

if TYPE_CHECKING:
    from lingua.model.generate import Answer, Generator


class GenerateArgs(GeneratorArgs):
    """Keys of the command line."""

    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0: always the most likely token (greedy)."""
    ckpt: Text = ""
    """Run, RUN@step, checkpoint folder or file of weights."""
    app: Text = ""
    """Package of the app that trained the model. Empty: the one that its config names."""
    until: Annotated[list[Text], BeforeValidator(lambda value: value if isinstance(value, list) else [value])] = []
    """Stop string or strings; an answer ends before the first of them."""


def main(words: list[str], app: str = str(__package__)) -> int:
    """Answer the prompts on the command line, or those read from stdin."""
    others, prompts = split_prompts(words)
    line = parse_command_line(others)
    if line.flags.get("help"):
        print(__doc__, "keys, with their defaults:", *(f"  {key}\n      {text}" for key, text in key_rows()), sep="\n")
        return 0
    config, args = read_command_line(line)
    wanted = args.app or choose_app(CommandLine(config=str(config)))
    if wanted != app:
        return app_module(wanted, "generate").main([*words, f"app={wanted}"])
    generator = load_generator(described(config, wanted), args)
    for batch in [prompts] if prompts else ask(interactive=sys.stdin.isatty()):
        if len(batch) == 1 and sys.stdout.isatty() and isinstance(generator, _autoregressive()):
            write(batch[0])
            answer = write_as_it_comes(generator, batch[0], write)
            write("\n")
            say_cut(answer)
            continue
        for prompt, answer in zip(batch, generator.generate(batch), strict=True):
            show(prompt, answer)
    return 0


def key_rows() -> list[tuple[str, str]]:
    """Return (`key=default`, meaning) of each key."""
    defaults = {name: field.default for name, field in GenerateArgs.model_fields.items()}
    shown = {name: "null" if value is None else str(value) for name, value in defaults.items()}
    return [(f"{name}={shown[name]}", text.replace("\n", " ")) for name, text in field_docs(GenerateArgs).items()]


def write_as_it_comes(generator: Generator, prompt: str, write: Callable[[str], None]) -> Answer:
    """Answer a prompt, writing the answer as it grows."""
    shown, n_held = "", max([0, *map(len, generator.args.until)])

    def come(text: str, *, last: bool = False) -> None:
        nonlocal shown
        # Hold back an incomplete character or stop string.
        safe = text if last else text[: len(text) - n_held].rstrip("\ufffd")
        if safe.startswith(shown):
            write(safe[len(shown) :])
            shown = safe

    generator.on_text = come
    (answer,) = generator.generate([prompt])
    come(answer.text, last=True)
    return answer


def _autoregressive() -> type[Generator]:
    from lingua.model.generate import Generator

    return Generator


def read_command_line(line: CommandLine) -> tuple[Path, GenerateArgs]:
    """Return (config of the model, how to generate). Raises ConfigError."""
    args = compose(None, line.overlays, line.overrides, GenerateArgs).args
    if not args.ckpt:
        raise ConfigError("command line: no run is named; write RUN first, out/debug say, then the text to continue")
    return Path(line.config) if line.config else config_of(args.ckpt), args


def load_generator(run_args: TrainArgs, args: GenerateArgs) -> Generator:
    """Return a generator with the weights of `args.ckpt` in the model of `run_args`. Loads torch."""
    print(f"loading {args.ckpt}", file=sys.stderr, flush=True)
    import torch

    from lingua.distributed.place import find_rank_info
    from lingua.distributed.process_group import pick_device
    from lingua.model.generate import cpu_threads
    from lingua.train.load_model import chosen_dtype, load_model, stored_dtype

    device = pick_device(args.device, find_rank_info())
    dtype = chosen_dtype(args.dtype, device, lambda: stored_dtype(args.ckpt))
    model, tokenizer, loaded = load_model(run_args, args.ckpt, device, dtype)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        n_params = sum(parameter.numel() for parameter in model.parameters())
        torch.set_num_threads(cpu_threads(n_params, torch.get_num_threads()))
    print(f"{loaded}, on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    return named(run_args.objective, "generator")(model, tokenizer, args, add_bos=run_args.data.add_bos)


def write(text: str) -> None:
    """Write text as it is; on a terminal, show escape characters."""
    out = getattr(sys.stdout, "unescaped", sys.stdout)
    out.write(printable(text) if out.isatty() else text)
    out.flush()


def ask(interactive: bool) -> Iterator[list[str]]:
    """Yield prompts typed one by one, or all piped ones as one batch."""
    if not interactive:
        piped = [line.rstrip("\n") for line in sys.stdin]
        yield from [piped] if piped else []
        return
    print("a prompt per line; Ctrl-D ends", file=sys.stderr)
    yield from ([line] for line in _typed() if line)


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def show(prompt: str, answer: Answer) -> None:
    """Print prompt and answer to stdout, and a note about a cut prompt to stderr."""
    say_cut(answer)
    write(f"{answer.text}\n" if answer.infilled else f"{prompt}{answer.text}\n")


def say_cut(answer: Answer) -> None:
    if answer.n_cut:
        print(f"(the prompt was too long: its first {answer.n_cut} tokens were cut off)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
