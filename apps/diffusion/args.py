"""Config of masked diffusion. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from lingua.config.base import Fraction, Part, part_of, register, show
from lingua.config.keys import train
from lingua.config.keys.model import CrossEntropyArgs


@register("loss", "masked_diffusion")
class MaskedDiffusionArgs(CrossEntropyArgs):
    """Masked diffusion: tokens of a row are masked with probability t, and the model predicts them from the rest."""

    builder: ClassVar[str] = "apps.diffusion.objective:MaskedDiffusion"
    asks_of_model: ClassVar[Mapping[str, Any]] = {"causal": False, "mask_token": True}
    validation: ClassVar[str] = "apps.diffusion.score:validation_loss"
    scorer: ClassVar[str] = "apps.diffusion.score:BoundScorer"
    generator: ClassVar[str] = "apps.diffusion.sample:DiffusionGenerator"

    type: Literal["masked_diffusion"] = "masked_diffusion"  # pyright: ignore[reportIncompatibleVariableOverride]
    schedule: Literal["log_linear", "llada"] = "log_linear"
    """log_linear: t from min_t to 1; a token is masked with probability (1 - min_t) t and has weight 1/t. llada: t from
    0 to 1, probability p = (1 - min_t) t + min_t, weight 1/p."""
    min_t: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Minimum of t, which bounds the weight."""
    soft_cap: Annotated[float, Field(gt=0)] | None = None
    """Soft cap of the weights (UniDisc: 5); the loss is then no longer a bound. Null: none."""
    random_lengths: Fraction = 0.0
    """Share of steps whose rows are cut to a random length (LLaDA: 0.01), to train on short texts too."""
    samples: Annotated[int, Field(ge=2)] = 128
    """Number of maskings of each text in an evaluation, to bound its likelihood. A text of n tokens with at most this
    many possible maskings, 2^n - 1, is scored exactly, with all of them."""
    validation_samples: Annotated[int, Field(ge=2)] = 8
    """The same for each row of a validation during training."""
    seed: int | None = None
    """Seed of the masking. Null: the run's `seed`."""

    def scored_tokens(self, seq_len: int) -> int:
        return seq_len - 1  # the first token is given, as it is to a causal model

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        model = args.model
        for key, value in self.asks_of_model.items():
            found = getattr(model, key, None)
            if found is None:
                text = f"loss.type is {self.type}, which needs model.{key} {show(value)}"
                yield "loss.type", f"{text}, but model.type {model.type} has no such key; use model.type llama"
            elif found != value:
                text = f"model.{key} is {show(found)}, but loss.type {self.type} needs {show(value)}"
                yield f"model.{key}", f"{text}; drop it"
        if model.n_labels > 1:
            text = f"model.type {model.type} learns {model.n_labels} tokens at each position"
            yield "loss.type", f"loss.type is {self.type}, but {text}; use model.type llama"
        cut, keys = self.random_lengths > 0, ("data.doc_mask", "distributed.compile", "distributed.tp_size > 1")
        set_keys = (args.data.doc_mask, args.distributed.compile, args.distributed.tp_size > 1)
        for key in (key for key, is_set in zip(keys, set_keys, strict=True) if cut and is_set):
            yield "loss.random_lengths", f"loss.random_lengths does not go with {key}; set one of them to 0 or false"


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.diffusion"
    """Package of the app that trains the run."""
    loss: Annotated[SerializeAsAny[Part], part_of("loss", MaskedDiffusionArgs)] = MaskedDiffusionArgs()
