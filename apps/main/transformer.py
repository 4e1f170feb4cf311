"""The app's language model: a Llama-style decoder. Change it freely.

`Decoder` (lingua/model/decoder.py) is the whole model; its blocks are in lingua/model/transformer.py. Override here
what your model does differently: `build_output`, `loss_of`, `forward`; or set `LMTransformerArgs.block`.
"""

from __future__ import annotations

from lingua.model.decoder import Decoder

from .args import LMTransformerArgs


class LMTransformer(Decoder):
    """tok_embeddings, layers, norm, output."""

    args: LMTransformerArgs  # pyright: ignore[reportIncompatibleVariableOverride]
