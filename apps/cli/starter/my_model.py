"""A model of your own: Llama with parallel attention and feed-forward, as in GPT-J."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from lingua.config.base import register
from lingua.config.keys.model import LlamaArgs
from lingua.model.context import ForwardContext
from lingua.model.transformer import TransformerBlock


@register("model", "my_model")
class MyModelArgs(LlamaArgs):
    """Llama with parallel attention and feed-forward. Add your own keys here."""

    block: ClassVar[str] = f"{__name__}:MyBlock"
    hugging_face: ClassVar[str] = ""  # Hugging Face's Llama computes something else

    type: Literal["my_model"] = "my_model"  # pyright: ignore[reportIncompatibleVariableOverride]


class MyBlock(TransformerBlock):
    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # x (B, S, D)
        return x + self.attention(self.attention_norm(x), ctx) + self.feed_forward(self.ffn_norm(x))
