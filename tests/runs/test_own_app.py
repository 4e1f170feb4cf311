"""One's own app: copy apps/main, change the model, add a key; train, check, resume and generate find it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "model.dim=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "data.seq_len=32",
    "data.load_async=false",
    "validation.at_ends=false",
    "sample_prompt=null",
    "device=cpu",
]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A copy of the code in which apps/mine is a changed copy of apps/main."""
    for package in ("apps", "lingua"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)  # with its bytecode
    mine = tmp_path / "apps" / "mine"
    shutil.copytree(tmp_path / "apps" / "main", mine)
    args = mine / "args.py"
    args.write_text(
        args.read_text().replace(
            '    builder: ClassVar[str] = f"{__package__}.transformer:LMTransformer"\n',
            '    builder: ClassVar[str] = f"{__package__}.transformer:LMTransformer"\n\n'
            '    embedding_scale: float = 1.0\n    """Multiplies the embeddings."""\n',
        )
    )
    model = mine / "transformer.py"
    model.write_text(
        model.read_text().replace(
            "x = self.tok_embeddings(tokens)", "x = self.args.embedding_scale * self.tok_embeddings(tokens)"
        )
    )
    return tmp_path


def run(workplace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(workplace), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=workplace, env=env, capture_output=True, text=True, check=False)


@pytest.mark.gate
@pytest.mark.soak
def test_a_changed_copy_is_found_by_every_command(workplace: Path):
    config = "apps/mine/configs/bytes.yaml"
    train = ["-m", "apps.mine.train", config, *SMALL, "model.embedding_scale=2.0", "steps=2", "dump_dir=out/mine"]
    first = run(workplace, *train)
    assert first.returncode == 0, first.stderr
    assert "embedding_scale: 2.0" in (workplace / "out/mine/config.yaml").read_text()
    assert "app: apps.mine" in (workplace / "out/mine/config.yaml").read_text()

    resumed = run(workplace, *train, "steps=3")
    assert resumed.returncode == 0, resumed.stderr
    assert "loaded full state" in resumed.stderr

    checked = run(
        workplace, "-m", "apps.cli.main", "check", config, "model.embedding_scale=2.0", "model.embeding_scale=1"
    )
    assert checked.returncode == 2
    assert "model.embedding_scale" in checked.stderr  # the key exists, and is the nearest to the misspelt one

    said = run(workplace, "-m", "apps.main.generate", "ckpt=out/mine", "prompt=import", "max_gen_len=4")
    assert said.returncode == 0, said.stderr  # the run knows its app


PLUGIN = """
from typing import Annotated, ClassVar, Literal
import torch
from lingua.config.base import Part, register
from lingua.config.keys.optim import OptimArgs
from lingua.optim.schedule import register_schedule

@register("optim", "plain_sgd")
class SgdArgs(OptimArgs):
    builder: ClassVar[str] = "my_parts:build"
    type: Literal["plain_sgd"] = "plain_sgd"
    momentum: float = 0.5

def build(args, named_parameters):
    return torch.optim.SGD([p for _, p in named_parameters], lr=args.lr, momentum=args.momentum)

@register_schedule("half")
def half(args, step, n_steps):
    return 0.5
"""


@pytest.mark.soak
def test_a_plugin_brings_an_optimizer_and_a_schedule(workplace: Path):
    (workplace / "my_parts.py").write_text(PLUGIN)
    words = ["apps/main/configs/bytes.yaml", *SMALL, "plugins=[my_parts]", "optim.type=plain_sgd", "optim.warmup=0"]
    words += ["optim.momentum=0.25", "optim.scheduler=half", "dump_dir=out/sgd", "steps=2", "logging.freq=1"]
    trained = run(workplace, "-m", "apps.main.train", *words)
    assert trained.returncode == 0, trained.stderr
    assert "lr 1.00e-03" in trained.stderr  # half of the peak


@pytest.mark.gate
@pytest.mark.soak
def test_torchrun_starts_ranks_as_the_readme_says(tmp_path: Path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "apps.main.train", "apps/main/configs/bytes.yaml", *SMALL]
    done = run(REPOSITORY, *words, "steps=2", f"dump_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "on 2 x CPU" in done.stderr
