"""Continue the run's prompt during training, so that people can read what it has learned (`samples.jsonl`)."""

from __future__ import annotations

import gc
import logging

import torch

from lingua.checkpoint.load_weights import copy_weights
from lingua.checkpoint.state import restore_rng, rng_state
from lingua.config.base import ConfigError, named, show
from lingua.config.keys.generate import GeneratorArgs
from lingua.distributed.process_group import from_main
from lingua.run.failure import TooLargeError
from lingua.train.learner import Run
from lingua.train.load_model import bare_model, chosen_dtype

log = logging.getLogger(__name__)

SAMPLING = GeneratorArgs(temperature=0.7, top_k=40, max_gen_len=256)
"""Uses no top_p: its sum has no deterministic kernel on a GPU."""


def check_prompt(run: Run, prompt: str) -> None:
    """Raise ConfigError for a prompt that cannot be tokenized, before the run trains."""
    try:
        n_ids = len(run.tokenizer.encode(prompt, run.args.data.add_bos, False))
    except ValueError as error:
        raise ConfigError(f"sample_prompt is {show(prompt)}, which the tokenizer does not take: {error}") from error
    if not n_ids:
        raise ConfigError("sample_prompt is empty, and there is no begin token to start from; set sample_prompt")


def continued(run: Run, prompt: str) -> str | None:
    """Return the model's continuation of a prompt; None, with a warning, if rank 0 cannot compute it. Collective.

    Only rank 0 generates, with a whole copy of the weights, so the text does not depend on the layout, up to rounding.
    The model, random states and the position in the data do not change.
    """
    random_states = rng_state()
    try:
        return _continued(run, prompt)
    finally:
        restore_rng(random_states)
        gc.collect()  # automatic collection is off in the loop
        if run.world.device.type == "cuda":
            torch.cuda.empty_cache()


def _continued(run: Run, prompt: str) -> str | None:
    stored, device = next(run.model.parameters()).dtype, run.world.device
    dtype = chosen_dtype("auto", device, lambda: stored)
    model, problem = bare_model(run.args, run.tokenizer, torch.device("meta"), dtype), None
    if run.world.is_main:
        try:
            model = bare_model(run.args, run.tokenizer, device, dtype)
        except TooLargeError as error:  # the others wait in copy_weights
            problem = error
    copy_weights(run.model, model)

    def generate() -> str | None:
        if problem is not None:
            log.warning("no sample at step %d: %s", run.step, problem)
            return None
        generator = named(run.args.objective, "generator")(
            model, run.tokenizer, SAMPLING, add_bos=run.args.data.add_bos
        )
        try:
            (answer,) = generator.generate([prompt])
        except RuntimeError as error:  # out of memory, or logits are not finite: training can go on
            log.warning("no sample at step %d: %s", run.step, error)
            return None
        return answer.text

    return from_main(generate)
