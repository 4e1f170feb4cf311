"""The table and the picture of the comparison of objectives; the runs behind them are those of any config."""

from __future__ import annotations

from pathlib import Path

import compare_objectives
import pytest
from compare_objectives import Score


def test_the_table_has_means_and_errors_and_the_picture_both_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(kind: str, steps: int, seed: int, run_dir: Path) -> Score:
        assert run_dir.parent == tmp_path
        return Score(512 * steps, 4.0 + 0.2 * (seed - 777), 0.03 * (kind == "masked_diffusion"))

    monkeypatch.setattr(compare_objectives, "score", score)
    assert compare_objectives.main([str(tmp_path), "--steps", "10"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["16x", "masked", "diffusion", "4.100", "0.100", "0.021"]  # 0.03 / sqrt(2)
    assert (tmp_path / "compute.svg").read_text().count("16x: 81,920") == 1
