"""Keys of `eval.generator:` and of `generate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lingua.config.base import Args, PositiveInt, Text


class GeneratorArgs(Args):
    """Sampling from a model; the evaluator uses the same."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most likely token always (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the smallest set of tokens with this probability in all. Null: all."""
    top_k: PositiveInt | None = None
    """Sample from this many most likely tokens. Null: all."""
    max_gen_len: PositiveInt = 512
    """Tokens generated per prompt, at most."""
    max_tokens: PositiveInt = 1024
    """Tokens (prompts and answers, padded) in one batch, at most."""
    max_prompt_len: PositiveInt | None = None
    """Longer prompts keep their end. Null: what max_seqlen leaves."""
    until: list[Text] = []
    """Stop strings; they and what follows are not part of the answer."""
    compile_prefilling: bool = False
    """torch.compile the pass over the prompts."""
    reduce_generation_overhead: bool = False
    """torch.compile the one-token step."""
    show_progress: bool = False
    """Progress bar."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of weights and cache. auto: bf16 on a GPU; on a CPU the type that the weights are stored in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""
    sampler: Literal["low_confidence", "ancestral"] = "low_confidence"
    """Of masked diffusion. low_confidence: each step fills in the tokens that the model is surest of; ancestral: each
    hidden token is filled in with the same chance."""
    diffusion_steps: PositiveInt | None = None
    """Of masked diffusion: steps in which an answer is filled in. Null: one per token."""
    block: PositiveInt | None = None
    """Of masked diffusion: so many tokens are filled in before those to their right. Null: all at once."""
    seed: int = 42
    """Seed of the sampling."""
