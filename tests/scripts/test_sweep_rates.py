"""The table and the picture of the sweep of rates; the runs behind them are a `lingua sweep` like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import sweep_rates

from lingua.config.command_line import parse_command_line
from lingua.train.recipe import recipe


def test_the_rule_stands_beside_the_best_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_rates, "swept", lambda size, out, at_once: (3e-3, {1e-3: 4.0, 2e-3: 3.5, 4e-3: 3.625}))
    assert sweep_rates.main([str(tmp_path), "--only", "1M"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:6] == ["1M", "150K", "0.003", "0.002", "1.50", "yes"]
    assert "bits per byte above the best" in (tmp_path / "rates.svg").read_text()


@pytest.mark.parametrize("size", sweep_rates.SIZES)
def test_the_rule_lies_within_the_grid(tmp_path: Path, size: str) -> None:
    tokens, rates = sweep_rates.SIZES[size]
    (tmp_path / "base.yaml").write_text(sweep_rates.BASE)
    found = recipe(parse_command_line([str(tmp_path / "base.yaml")]), size, tokens, "cpu")
    assert rates[0] < found.tree["optim"]["lr"] < rates[-1]
