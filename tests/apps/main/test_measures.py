"""What an evaluation costs in memory."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch

from apps.main.args import TrainArgs
from apps.main.generate import load_model
from lingua.compose import compose
from tests.apps.test_export import make_run
from tests.ranks import exit_code_of


@pytest.mark.parametrize(("times", "code"), [(1.6, 0), (0.8, 1)])
def test_loading_takes_the_memory_of_the_model_once(tmp_path: Path, times: float, code: int) -> None:
    """Of its own; the file is mapped (RLIMIT_DATA, getrlimit(2)). What is left of the limit could not hold it twice."""
    # Made in a process of its own: memory that this one had given back to itself would not count.
    assert exit_code_of(lambda: make_run(tmp_path / "run", dim=256, n_layers=24, multiple_of=256)) == 0
    assert exit_code_of(lambda: make_run(tmp_path / "small")) == 0
    sizes = ["checkpoint.verify_on_load=sizes"]  # threads that verify have stacks, of which they use little
    small, args = (compose(str(tmp_path / n / "config.yaml"), [], sizes, TrainArgs).args for n in ("small", "run"))
    model_bytes = 4 * args.model.n_params()
    assert model_bytes > 60e6

    def load() -> None:
        load_model(small, tmp_path / "small", torch.device("cpu"), torch.float32)  # imports, threads and the like
        status = Path("/proc/self/status").read_text()
        used_bytes = 1024 * int(re.findall(r"VmData:\s+(\d+) kB", status)[0])
        limit_bytes = used_bytes + int(times * model_bytes)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        load_model(args, tmp_path / "run", torch.device("cpu"), torch.float32)

    assert exit_code_of(load) == code
