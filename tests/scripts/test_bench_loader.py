from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_loader.py"
LOADER = {"loader_tokens_per_s", "bare_tokens_per_s", "workers_2_speedup", "bytes_tokens_per_s", "resume_s_row_10m"}


def figures(*words: str) -> dict[str, Any]:
    """Figures of a run too short for them to mean anything."""
    command = [sys.executable, str(SCRIPT), "--bytes", "3e5", "--rounds", "1", "--seq_len", "64", "--json", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.soak
def test_the_loader_is_measured_with_and_without_a_rank_file(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    ranks.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    without = figures()
    assert {key for key in LOADER if without[key] is None} == LOADER - {"bytes_tokens_per_s", "resume_s_row_10m"}
    assert all(figures("--tokenizer", str(ranks), "--split", "cl100k")[key] > 0 for key in LOADER)


@pytest.mark.soak
def test_the_shuffle_is_measured_for_each_budget(tmp_path: Path) -> None:
    found = figures("--shuffle", "1", "--dir", str(tmp_path))
    assert found["with_1_gb_s"] > 0
    assert found["with_1_gb_peak_rss_bytes"] > 1 << 20
    assert list(tmp_path.iterdir()) == []
