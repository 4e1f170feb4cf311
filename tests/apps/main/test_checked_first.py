"""What is wrong with a command line is said before torch is loaded: where torch cannot be imported, it is said too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DEBUG = "apps/main/configs/debug.yaml"
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # an import of it fails
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("model: {dim: 32, n_layers: 1, n_heads: 2}\n")
    (tmp_path / "consolidated.pth").write_bytes(b"never read")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("apps.main.train", [DEBUG, "optim.nope=1"], "optim.nope"),
        pytest.param("apps.main.train", [DEBUG, "steps=soon"], "steps", marks=pytest.mark.soak),
        pytest.param("apps.main.train", ["nothing.yaml"], "nothing.yaml", marks=pytest.mark.soak),
        pytest.param("apps.main.train", [DEBUG, "app=apps.other"], "apps.other", marks=pytest.mark.soak),
        ("apps.cli.main", ["train", DEBUG, "optim.nope=1"], "optim.nope"),
        pytest.param("apps.main.generate", ["ckpt={weights}", "nope=1"], "nope", marks=pytest.mark.soak),
        pytest.param(
            "apps.main.generate", ["ckpt={weights}", "temperature=hot"], "temperature", marks=pytest.mark.soak
        ),
        ("apps.main.generate", ["ckpt=no/such/run"], "no/such/run"),
        ("apps.main.eval", ["ckpt={weights}", "nope=1"], "nope"),
        pytest.param(
            "apps.main.eval", ["ckpt={weights}", "validation.max_steps=many"], "max_steps", marks=pytest.mark.soak
        ),
        pytest.param("apps.main.eval", ["follow={weights}", "harness=1"], "harness", marks=pytest.mark.soak),
        ("lingua.stool", [f"config={DEBUG}", "nodes=many"], "nodes"),
    ],
)
def test_a_wrong_word_is_answered_without_torch(weights: Path, module: str, words: list[str], said: str) -> None:
    words = [word.format(weights=weights) for word in words]
    command = [sys.executable, "-c", WITHOUT_TORCH, module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert "torch" not in done.stderr
