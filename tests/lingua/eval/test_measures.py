"""What an evaluation costs in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.cli.test_export import make_run
from tests.ranks import exit_code_of

LOAD = """
import re, resource, sys
from pathlib import Path
import torch
from apps.main.args import TrainArgs
from lingua.config.compose import compose
from lingua.train.load_model import load_model
folder, times = Path(sys.argv[1]), float(sys.argv[2])
sizes = ["checkpoint.verify_on_load=sizes"]  # threads that verify have stacks, of which they use little
small, args = (compose(str(folder / n / "config.yaml"), [], sizes, TrainArgs).args for n in ("small", "run"))
load_model(small, folder / "small", torch.device("cpu"), torch.float32)  # imports, threads and the like
model_bytes = 4 * args.model.n_params()
assert model_bytes > 60e6
used_bytes = 1024 * int(re.findall(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])
limit_bytes = used_bytes + int(times * model_bytes)
resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
load_model(args, folder / "run", torch.device("cpu"), torch.float32)
"""


@pytest.mark.parametrize(("times", "code"), [(1.6, 0), (0.8, 1)])
def test_loading_takes_the_memory_of_the_model_once(tmp_path: Path, times: float, code: int) -> None:
    """Of its own; the file is mapped (RLIMIT_DATA, getrlimit(2)). What is left of the limit could not hold it twice."""
    assert exit_code_of(lambda: make_run(tmp_path / "run", dim=256, n_layers=24, multiple_of=256)) == 0
    assert exit_code_of(lambda: make_run(tmp_path / "small")) == 0
    # A new interpreter: memory that this process has given back to itself would not count.
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), str(times)], capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()
