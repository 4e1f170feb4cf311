"""Config of the main app. Torch-free.

Train, check, resume and every command know the keys that you add here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

import apps.diffusion.args
import apps.fastRNN.args
import apps.mamba.args
import apps.mtp.args
import apps.xlstm.args  # noqa: F401 - each registers its types of models, or of losses
from lingua.config.base import part_of
from lingua.config.keys import train
from lingua.config.keys.model import LlamaArgs, ModelArgs


class LMTransformerArgs(LlamaArgs):
    """A Llama-style decoder (apps/main/transformer.py)."""

    builder: ClassVar[str] = f"{__package__}.transformer:LMTransformer"


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.main"
    """Package of the app that trains the run."""
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", LMTransformerArgs)] = LMTransformerArgs(n_heads=8)
