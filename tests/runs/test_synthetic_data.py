"""A run on data that is made as it goes: killed and resumed it is the undisturbed one, and it knows its floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.report.charts import pictures_of
from lingua.report.facts import read_run
from lingua.report.history import read_history
from lingua.run.lock import this_process
from lingua.run.metrics import read_metrics
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, train

NODES = "[{name: Z, state_dim: 4, alpha: 0.1}, {name: X, state_dim: 5, alpha: 0.1, parents: [Z], observed: true}]"
SOURCES = f"data.sources=[{{type: gssm, nodes: {NODES}}}, {{type: copy, vocab_size: 5, period: 6, weight: 2}}]"
WORDS = [*TINY, SOURCES, "data.tokenizer={name: none}", "steps=8", "checkpoint.dump={every: 3, keep: -1}"]


@pytest.mark.soak
@pytest.mark.gate
def test_a_killed_run_on_made_data_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    result = train([*WORDS, f"dump_dir={calm}"])
    assert result.exit_code == 0, result.output
    assert "no model has a loss below" in result.output
    assert train([*WORDS, f"dump_dir={killed}"], hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train([*WORDS, f"dump_dir={killed}"]).exit_code == 0
    assert fingerprint(killed, 8) == fingerprint(calm, 8)
    assert losses(killed) == losses(calm)
    records = list(read_metrics(calm / "metrics.jsonl"))
    floors = {round(record["loss/out"] - record["loss/above_floor"], 9) for record in records}
    assert len(records) == 8
    assert len(floors) == 1
    keys = [p.key for p in pictures_of([read_history(read_run(calm), this_process())], ["calm"])]
    assert "above_floor" in keys
