"""Config of multi-token prediction (arXiv 2404.19737). Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import SerializeAsAny

from lingua.config.base import PositiveInt, part_of, register
from lingua.config.keys import train
from lingua.config.keys.model import LlamaArgs, ModelArgs


@register("model", "mtp")
class MTPArgs(LlamaArgs):
    """A Llama-style decoder whose head i predicts token i + 1 after a position."""

    builder: ClassVar[str] = "apps.mtp.mtp:MTP"
    hugging_face: ClassVar[str] = ""  # Hugging Face has no such model

    type: Literal["mtp"] = "mtp"  # pyright: ignore[reportIncompatibleVariableOverride]
    n_future_head: PositiveInt = 1
    """Number of heads, each (V, D). Needs data.n_views = n_future_head + 1."""

    @property
    def n_labels(self) -> int:
        return self.n_future_head

    def n_params(self) -> int:
        return self.n_params_non_embedding() + (1 + self.n_future_head) * self.vocab_rows * self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Llama's, plus 6VD for each additional head."""
        return super().flops_per_token(seq_len) + 6 * (self.n_future_head - 1) * self.vocab_size * self.dim

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        wanted = self.n_future_head + 1
        if args.data.n_views != wanted:
            heads = f"model.n_future_head {self.n_future_head}"
            yield (
                "data.n_views",
                f"data.n_views is {args.data.n_views}, but {heads} needs {wanted} views; set it to that",
            )
        if self.weight_tying:
            yield (
                "model.weight_tying",
                "model.weight_tying is true, but the heads of model.type mtp are their own; drop it",
            )


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.mtp"
    """Package of the app that trains the run."""
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", MTPArgs)] = MTPArgs(n_heads=8)
