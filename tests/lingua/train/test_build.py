"""Settings of the whole process that a run makes before it builds its model."""

from __future__ import annotations

import pytest
import torch

from lingua.train.build import make_deterministic


def test_deterministic_runs_do_not_fill_memory_that_is_written_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory is False  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore[reportAttributeAccessIssue]
