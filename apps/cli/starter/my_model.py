"""A model of your own: Llama whose attention and feed-forward work side by side, as in GPT-J."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from lingua.config.base import register
from lingua.config.keys.model import LlamaArgs
from lingua.model.context import ForwardContext
from lingua.model.transformer import TransformerBlock


@register("model", "my_model")
class MyModelArgs(LlamaArgs):
    """Attention and feed-forward side by side. A key of your own is a line here."""

    block: ClassVar[str] = f"{__name__}:MyBlock"
    hugging_face: ClassVar[str] = ""  # theirs computes something else

    type: Literal["my_model"] = "my_model"  # pyright: ignore[reportIncompatibleVariableOverride]


class MyBlock(TransformerBlock):
    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # x (B, S, D)
        return x + self.attention(self.attention_norm(x), ctx) + self.feed_forward(self.ffn_norm(x))
