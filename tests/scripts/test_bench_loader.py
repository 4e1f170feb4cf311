from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_loader.py"
KEYS = [
    "loader_tokens_per_s",
    "bare_tokens_per_s",
    "workers_2_speedup",
    "bytes_tokens_per_s",
    "resume_s_row_10",
    "resume_s_row_10m",
    "state_bytes_per_lane",
    "open_files",
]


def test_all_keys_are_there_with_and_without_a_rank_file(tmp_path: Path) -> None:
    """Rounds of a blink: the figures mean nothing here, but they are told."""
    ranks = tmp_path / "ranks"
    ranks.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    for words in ([], ["--tokenizer", str(ranks)]):
        command = [sys.executable, str(SCRIPT), "--bytes", "3e5", "--rounds", "1", "--seq_len", "64", "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout)
        assert set(KEYS) <= set(figures)
        assert ("no --tokenizer" in done.stderr) == (not words)
        assert (figures["workers_2_speedup"] is None) == (not words)
        assert figures["bytes_tokens_per_s"] > 0
