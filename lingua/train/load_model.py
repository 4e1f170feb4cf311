"""Load a model with its weights outside of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lingua.checkpoint.load_weights import load_weights, open_source
from lingua.config.base import ConfigError, build_part, named
from lingua.config.compose import compose
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.trust import trusting
from lingua.distributed.parallelize import DTYPES
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import pick_device
from lingua.run.failure import fits
from lingua.tokenizer import Tokenizer, build_tokenizer
from lingua.train.describe import config_of, described, of_checkpoint


class Loaded(NamedTuple):
    """A model from `lingua.load`, in eval mode, with its tokenizer and config."""

    model: nn.Module
    tokenizer: Tokenizer
    config: TrainArgs

    def generate(self, prompt: str, **keys: Any) -> str:
        """Return the model's continuation of a prompt. `keys`: those of `lingua generate`, such as max_gen_len=40."""
        words = [f"{key}={json.dumps(value)}" for key, value in {"temperature": 0.8, **keys}.items()]
        args = compose(None, [], words, GeneratorArgs).args
        generator = named(self.config.objective, "generator")
        (answer,) = generator(self.model, self.tokenizer, args, add_bos=self.config.data.add_bos).generate([prompt])
        return answer.text


def load_described(
    path: str | Path, device: str | torch.device | None, dtype: torch.dtype | None, *, trust: bool
) -> Loaded:
    """Load the model at `path` as the config beside it describes. See `lingua.load`."""
    with trusting(trust):
        config = described(config_of(str(path)))
    where = pick_device("auto", RankInfo()) if device is None else torch.device(device)
    model, tokenizer, _ = load_model(config, path, where, dtype or stored_dtype(path))
    return Loaded(model.eval(), tokenizer, config)


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the dtype that all weights at `path` share, or float32 if they share none that a model computes in."""
    found = set(open_source(path, sizes_only=True).dtypes.values())
    return found.pop() if len(found) == 1 and found <= {torch.bfloat16, torch.float16} else torch.float32


def chosen_dtype(name: str, device: torch.device, stored: Callable[[], torch.dtype]) -> torch.dtype:
    """Return the dtype that `generator.dtype` asks for; `stored` returns that of the weights."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else stored()


def load_model(
    run_args: TrainArgs, ckpt: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Tokenizer, str]:
    """Return the model of `run_args` with the weights at `ckpt`, its tokenizer, and a description of what was loaded.

    Takes the memory of the model plus its largest tensor. Raises RunError for weights that do not fit.
    """
    run_args, tokenizer = of_checkpoint(run_args, ckpt), build_tokenizer(run_args.data.tokenizer)
    model = bare_model(run_args, tokenizer, device, dtype)
    loaded = load_weights(model, ckpt, sizes_only=run_args.checkpoint.verify_on_load == "sizes")
    return model, tokenizer, loaded


def bare_model(run_args: TrainArgs, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the whole model of `run_args` with uninitialized weights."""
    vocab_size = run_args.model.vocab_size if run_args.model.vocab_size > 0 else tokenizer.vocab_size
    if vocab_size < tokenizer.needed_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; set "
            "data.tokenizer in the config of these weights to the one that they were trained with"
        )
    update = {"vocab_size": vocab_size, "max_seqlen": max(run_args.model.max_seqlen, run_args.data.seq_len)}
    with torch.device("meta"):
        model: nn.Module = build_part(run_args.model.model_copy(update=update))
    with fits(f"the model of {sum(parameter.numel() for parameter in model.parameters()):,} parameters"):
        model.to(dtype).to_empty(device=device)
    model.init_buffers()  # pyright: ignore[reportCallIssue]
    return model
