"""Keys of `eval.generator:` and of `generate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lingua.config.base import Args, PositiveInt, Text


class GeneratorArgs(Args):
    """How to sample from a model; evaluations use the same keys."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: always the most likely token (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the smallest set of tokens with this total probability. Null: all."""
    top_k: PositiveInt | None = None
    """Sample from this many of the most likely tokens. Null: all."""
    max_gen_len: PositiveInt = 512
    """Maximum tokens generated per prompt."""
    max_tokens: PositiveInt = 1024
    """Maximum tokens (prompts and answers, padded) per batch."""
    max_prompt_len: PositiveInt | None = None
    """Maximum tokens of a prompt; longer ones lose their beginning. Null: what max_seqlen leaves."""
    until: list[Text] = []
    """Stop strings; an answer ends before the first of them."""
    compile_prefilling: bool = False
    """torch.compile the prefill."""
    reduce_generation_overhead: bool = False
    """torch.compile the decoding step of one token."""
    show_progress: bool = False
    """Show a progress bar."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of weights and cache. auto: bf16 on a GPU; on a CPU the type that the weights are stored in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    sampler: Literal["low_confidence", "ancestral"] = "low_confidence"
    """Masked diffusion. low_confidence: each step fills in the tokens that the model is most confident of; ancestral:
    each masked token is filled in with the same probability."""
    diffusion_steps: PositiveInt | None = None
    """Masked diffusion: steps that fill in an answer. Null: one per token."""
    block: PositiveInt | None = None
    """Masked diffusion: fill in this many tokens before those to their right. Null: all at once."""
    seed: int = 42
    """Seed of the sampling."""
