"""A small model of every family, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import torch

from apps.fastRNN.args import HawkArgs, MinGRUArgs, MinLSTMArgs
from apps.main.args import LMTransformerArgs
from apps.mamba.args import Mamba2Args
from apps.mtp.args import MTPArgs
from apps.xlstm.args import MLSTMArgs, MLSTMV0Args, SLSTMArgs
from lingua.config.base import build_part
from lingua.config.keys.model import DecoderArgs, HybridArgs
from lingua.model.decoder import Decoder

VOCAB = 37
SHARED: dict[str, Any] = {"vocab_size": VOCAB, "dim": 32, "n_layers": 3, "max_seqlen": 64}
MAMBA: dict[str, Any] = {"n_heads": 4, "state_dim": 8, "multiple_of": 16, "conv_size": 4, "ssm_chunk_size": 8}

WITHOUT_CONVOLUTION: dict[str, Any] = MAMBA | {"conv_size": None}

FAMILIES: dict[str, DecoderArgs] = {
    "llama": LMTransformerArgs(**SHARED, n_heads=4, multiple_of=16),
    "mamba2": Mamba2Args(**SHARED, **MAMBA),
    "mamba2, every option": Mamba2Args(
        **SHARED, **MAMBA, n_groups=2, conv_bias=True, dt_bias=True, D_has_head_dim=True, norm="layer"
    ),
    "mamba2 without convolution": Mamba2Args(**SHARED, **WITHOUT_CONVOLUTION),
    "mingru": MinGRUArgs(**SHARED, multiple_of=16, conv_size=4),
    "minlstm": MinLSTMArgs(**SHARED, multiple_of=16, n_heads=4, conv_size=3),
    "hawk": HawkArgs(**SHARED, multiple_of=16, n_heads=2, conv_size=2),
    "mlstm": MLSTMArgs(**SHARED, chunk_size=8),
    "mlstm_v0": MLSTMV0Args(**SHARED, chunk_size=8, conv_size=3),
    "slstm": SLSTMArgs(**SHARED),
    "mtp": MTPArgs(**SHARED, n_heads=4, multiple_of=16, n_future_head=3),
    "hybrid": HybridArgs(
        **SHARED,
        layers=["attention", "mamba2", "mlstm"],
        blocks={"attention": {"n_heads": 4, "multiple_of": 16, "sliding_window": 9}, "mamba2": MAMBA},
    ),
}


def build(args: DecoderArgs, seed: int = 1) -> Decoder:
    """Build a model on the CPU with its initial weights."""
    with torch.device("meta"):
        model: Decoder = build_part(args)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model
