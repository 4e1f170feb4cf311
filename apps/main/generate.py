"""Generate: `python -m apps.main.generate ckpt=RUN_OR_FOLDER ["prompt=..."] [temperature=0.8 until=END ...]`.

ckpt is a run, RUN@step, a checkpoint folder, what `lingua export` and `lingua import` make, a Hugging Face folder or
any file of weights that training can start from; the model and the tokenizer are those of the run's config.yaml (Meta
Lingua's params.json, Hugging Face's config.json), or of the config given as `config=x.yaml` (a bare path is understood
as either). Several `prompt=` make one batch, and a word with [MASK] is a prompt with a gap (apps/diffusion/README.md);
without one, prompts are read line by line until the end of input. Tokens are sampled; temperature=0 takes the most
likely one always. The answer to one prompt is written as it grows on a terminal. `until` is a string or a list.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from lingua.config.base import ConfigError, Text, named
from lingua.config.command_line import CommandLine, app_module, choose_app, is_prompt, parse_command_line, run_main
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
    """0: the most likely token always (greedy)."""
    ckpt: Text = ""
    """Run, RUN@step, checkpoint folder or file of weights."""
    app: Text = ""
    """Package of the app that trained the model. Empty: the one its config names."""
    until: Annotated[list[Text], BeforeValidator(lambda value: value if isinstance(value, list) else [value])] = []
    """Stop string or strings."""


def main(words: list[str], app: str = str(__package__)) -> int:
    """Answer the prompts on the command line, or those that are read."""
    prompts = [word.removeprefix("prompt=") for word in words if is_prompt(word)]
    line = parse_command_line([word for word in words if not is_prompt(word)])
    if line.flags.get("help"):
        print(__doc__)
        print("keys, with their defaults:\n")
        for name, text in field_docs(GenerateArgs).items():
            print(f"  {name}={GenerateArgs.model_fields[name].default!r}\n      {text.replace(chr(10), ' ')}")
        return 0
    config, args = read_command_line(line)
    wanted = args.app or choose_app(CommandLine(config=str(config)))
    if wanted != app:
        return app_module(wanted, "generate").main([*words, f"app={wanted}"])
    generator = load_generator(described(config, wanted), args)
    for batch in [prompts] if prompts else ask(interactive=sys.stdin.isatty()):
        if len(batch) == 1 and sys.stdout.isatty() and isinstance(generator, _autoregressive()):
            write_as_it_comes(generator, batch[0])
            continue
        for prompt, answer in zip(batch, generator.generate(batch), strict=True):
            show(prompt, answer)
    return 0


def write_as_it_comes(generator: Generator, prompt: str) -> None:
    """Write prompt and answer to the terminal, the answer as it grows."""
    shown, n_held = "", max([0, *map(len, generator.args.until)])

    def come(text: str) -> None:
        nonlocal shown
        safe = text[: len(text) - n_held].rstrip("\ufffd")  # a character or a stop string that is not whole waits
        if safe.startswith(shown):
            print(printable(safe[len(shown) :]), end="", flush=True)
            shown = safe

    print(printable(prompt), end="", flush=True)
    generator.on_text = come
    (answer,) = generator.generate([prompt])
    print(printable(answer.text[len(shown) :]))
    say_cut(answer)


def _autoregressive() -> type[Generator]:
    from lingua.model.generate import Generator

    return Generator


def read_command_line(line: CommandLine) -> tuple[Path, GenerateArgs]:
    """(config of the model, how to generate). Raises ConfigError."""
    bare = line.config if line.config is not None and not line.config.endswith((".yaml", ".yml")) else None
    overrides = [*line.overrides, *([f"ckpt={bare}"] if bare else [])]
    args = compose(None, line.overlays, overrides, GenerateArgs).args
    if not args.ckpt:
        raise ConfigError('command line: no checkpoint; write ckpt=RUN_OR_FOLDER, say ckpt=out/debug "prompt=import "')
    return Path(line.config) if line.config and not bare else config_of(args.ckpt), args


def load_generator(run_args: TrainArgs, args: GenerateArgs) -> Generator:
    """Return a generator with the weights of `args.ckpt` in the model of `run_args`. Loads torch."""
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


def ask(interactive: bool) -> Iterator[list[str]]:
    """Prompts typed one by one, or piped in and then answered together."""
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
    """Prompt and answer on stdout; what the user should know about them on stderr."""
    say_cut(answer)
    text = answer.text if answer.infilled else f"{prompt}{answer.text}"
    print(printable(text) if sys.stdout.isatty() else text, flush=True)


def say_cut(answer: Answer) -> None:
    if answer.n_cut:
        print(f"(the prompt was too long: its first {answer.n_cut} tokens were cut off)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
