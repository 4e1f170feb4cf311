"""The table and the picture of the comparison of families; the runs behind them are those of any config."""

from __future__ import annotations

from pathlib import Path

import compare_families
import pytest


def test_every_rate_is_in_the_table_and_the_best_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def train(keys: str, dim: int, rate: str, steps: int, run_dir: Path) -> dict[int, float]:
        seen.append((run_dir.name, dim, steps))
        return {0: 8.0, steps // 2: 4.0, steps: 3.0 if rate == "1e-3" else 2.5}

    monkeypatch.setattr(compare_families, "train", train)
    words = [str(tmp_path), "--only", "mingru", "hybrid", "--rates", "1e-3", "4e-3"]
    assert compare_families.main(words) == 0
    assert seen[0] == ("mingru_1M_1e-3", 128, 200)
    assert seen[-1] == ("hybrid_5M_4e-3", 256, 100)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["5M", "hybrid", "3.000", "2.500"]
    assert (tmp_path / "families.svg").read_text().count("about 5M parameters") == 1
