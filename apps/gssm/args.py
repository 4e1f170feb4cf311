"""Config of runs on data that is made as they go: that of apps/main, whose models they train. Torch-free."""

from __future__ import annotations

import apps.main.args


class TrainArgs(apps.main.args.TrainArgs):
    """Everything a run is made of."""

    app: str = __package__ or "apps.gssm"
    """Package of the app that trains this run."""
