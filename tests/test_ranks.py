from __future__ import annotations

import subprocess
import sys

import pytest

AFTER_A_FAKE_TENSOR = """
from tests.ranks import exit_code_of
import torch
from torch._subclasses import FakeTensorMode

def gradient():
    torch.ones(1, requires_grad=True).sum().backward()

with FakeTensorMode():
    torch.ones(1, device="cuda")
gradient()
raise SystemExit(exit_code_of(gradient))
"""


@pytest.mark.soak
def test_ranks_that_are_forked_after_a_fake_tensor_was_made_compute_gradients() -> None:
    assert subprocess.run([sys.executable, "-c", AFTER_A_FAKE_TENSOR], check=False).returncode == 0
