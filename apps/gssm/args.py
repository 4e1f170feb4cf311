"""Config of runs on data that is generated during training; otherwise that of apps/main. Torch-free."""

from __future__ import annotations

import apps.main.args


class TrainArgs(apps.main.args.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.gssm"
    """Package of the app that trains the run."""
