"""The tokenizer download: what is fetched, and the config line it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.hub import FakeHub


def run(server: FakeHub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "setup/download_tokenizer.py", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_llama3(tmp_path: Path) -> None:
    with FakeHub({"original/tokenizer.model": b"IQ== 0\n"}) as server:
        ended = run(server, tmp_path, "llama3", str(tmp_path / "tokenizers"), "--api_key", "hf_key")
    assert ended.returncode == 0, ended.stderr
    path = tmp_path / "tokenizers/original/tokenizer.model"
    assert path.read_bytes() == b"IQ== 0\n"
    assert ended.stdout == f"data.tokenizer.name=tiktoken data.tokenizer.path={path}\n"
    assert "Bearer hf_key" in server.keys


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with FakeHub({}) as server:
        ended = run(server, tmp_path, "lama3", str(tmp_path))
    assert ended.returncode == 1
    assert (
        ended.stderr == "error: no tokenizer 'lama3'; there are gemma, gpt2, llama2, llama3, or give owner/repository\n"
    )
    assert server.requests == []
