"""What the sweep scripts submit; sbatch is a shell function's worth of a program that writes down its words."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.config.command_line import parse_command_line
from lingua.train import check
from lingua.train.recipe import best_rate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sbatch(tmp_path: Path) -> dict[str, str]:
    """An environment whose sbatch appends `EXTRA_ARGS | words` to the file said/sbatch."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$CONFIG_FILE | $EXTRA_ARGS | $*" >> "{tmp_path}/said"\n')
    program.chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return {**kept, "PATH": f"{program.parent}:{kept['PATH']}", "BASE_DIR": str(ROOT)}


def submitted(tmp_path: Path) -> list[tuple[str, list[str], list[str]]]:
    """(config, overrides, words of sbatch) of each job."""
    lines = [line.split(" | ") for line in (tmp_path / "said").read_text().splitlines()]
    return [(config, extra.split(), words.split()) for config, extra, words in lines]


@pytest.mark.parametrize(
    ("script", "config", "rates"),
    [
        ("lr_sweep.sh", "llama_280M_8H200", ["5e-3", "1e-2", "5e-2"]),
        ("lr_sweep_llama_1b_cpt.sh", "llama_1B_8H100_cpt", ["1e-5", "5e-5", "1e-4", "5e-4", "1e-3", "5e-3"]),
    ],
)
def test_one_job_per_learning_rate(tmp_path: Path, sbatch: dict[str, str], script: str, config: str, rates: list[str]):
    env = {**sbatch, "EMAIL": "you@example.org", "EXTRA_ARGS": "steps=10"}
    subprocess.run([str(ROOT / "scripts" / script), "--time=1:00:00"], cwd=tmp_path, env=env, check=True)
    jobs = submitted(tmp_path)
    assert [next(w for w in extra if w.startswith("optim.lr=")) for _, extra, _ in jobs] == [
        f"optim.lr={lr}" for lr in rates
    ]
    assert len({next(w for w in extra if w.startswith("dump_dir=")) for _, extra, _ in jobs}) == len(rates)
    for path, extra, words in jobs:
        assert path == f"apps/main/configs/{config}.yaml"
        assert "steps=10" in extra
        assert {"--mail-user=you@example.org", "--time=1:00:00", "--export=ALL,BASE_DIR,CONFIG_FILE,EXTRA_ARGS"} <= set(
            words
        )
        assert words[-1] == f"{ROOT}/apps/main/configs/miso_8.slurm"
        checked = check.load(parse_command_line([str(ROOT / path), *extra]))
        assert checked.args.name == Path(checked.args.dump_dir).name


def test_a_sweep_without_a_checkout_says_so(tmp_path: Path, sbatch: dict[str, str]):
    del sbatch["BASE_DIR"]
    done = subprocess.run(
        [str(ROOT / "scripts/lr_sweep.sh")], cwd=tmp_path, env=sbatch, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "BASE_DIR: is not set; export it" in done.stderr


def test_the_rate_called_rule_is_that_of_the_recipe():
    [words] = runpy.run_path(str(ROOT / "scripts/chinchilla_scaling.py"))["points"]([8], ["rule"], [0], 1e18)
    checked = check.load(parse_command_line([str(ROOT / "apps/main/configs/llama_8H200_chinchilla.yaml"), *words]))
    size = checked.resolved
    rate = best_rate(size.n_params_non_embedding, size.total_tokens).value
    assert checked.args.optim.lr == pytest.approx(rate, rel=0.01)


def test_thirty_models_of_the_same_compute(tmp_path: Path, sbatch: dict[str, str]):
    command = [sys.executable, str(ROOT / "scripts/chinchilla_scaling.py"), "--", "--partition=night"]
    subprocess.run(command, cwd=tmp_path, env=sbatch, check=True)
    jobs = submitted(tmp_path)
    assert len({extra[0] for _, extra, _ in jobs}) == len(jobs) == 30
    trained = set()
    for config, extra, words in jobs:
        assert "--partition=night" in words
        assert words[-1].endswith("miso_8_silent.slurm")
        checked = check.load(parse_command_line([str(ROOT / config), *extra]))
        assert checked.args.model.dim == 96 * checked.args.model.n_layers  # pyright: ignore[reportAttributeAccessIssue]
        assert checked.resolved.n_steps > 1000
        tree = checked.frozen
        trained.add((tree["model"]["n_layers"], tree["optim"]["lr"], tree["model"]["seed"], tree["data"]["seed"]))
    assert len(trained) == 30, "no two of them train the same thing"
