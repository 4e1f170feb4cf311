"""One line loads a model for a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lingua
from lingua.config.base import ConfigError
from lingua.config.keys.generate import GeneratorArgs
from lingua.files import RunError
from lingua.model.generate import Generator
from lingua.train.describe import config_of, described
from lingua.train.load_model import load_model
from tests.trainer import TINY, train


def test_a_run_and_a_step_of_it_load_as_load_model_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = train([*TINY, "steps=4", "checkpoint.dump={every: 2, keep: -1}", f"dump_dir={run}"])
    assert trained.exit_code == 0, trained.output
    tokens = torch.arange(32).reshape(2, 16)
    logits = []
    for path in (f"{run}@2", str(run)):
        model, tokenizer, config = lingua.load(path, device="cpu")
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert config.dump_dir == str(run)
        assert tokenizer.decode(tokenizer.encode("def").tolist()) == "def"
        same, _, _ = load_model(described(config_of(path)), path, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            logits.append(model(tokens))
            assert torch.equal(logits[-1], same.eval()(tokens))
    assert not torch.equal(*logits)
    loaded = lingua.load(run, device="cpu")  # as README shows it
    text = loaded.generate("def main(", max_gen_len=10)
    assert text == loaded.generate("def main(", max_gen_len=10, seed=42) != loaded.generate("def main(", max_gen_len=5)
    assert text != loaded.generate("def main(", max_gen_len=10, temperature=0)
    expected = Generator(loaded.model, loaded.tokenizer, GeneratorArgs(temperature=0.8, max_gen_len=10))
    assert text == expected.generate(["def main("])[0].text
    assert loaded.generate("def main(", until=["\n", text[3]], max_gen_len=10) == text.split("\n")[0].split(text[3])[0]
    with pytest.raises(ConfigError, match="max_len"):
        loaded.generate("def main(", max_len=10)
    half = lingua.load(run, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


def test_a_path_without_a_run_is_answered_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none does not exist; `lingua runs FOLDER` lists"):
        lingua.load(tmp_path / "none")


def test_the_package_loads_no_torch_until_it_is_asked() -> None:
    program = "import lingua, sys; assert lingua.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=True)
