"""Runs that are evaluated: a little data with held-out documents, what was found, and what is found by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lingua.config.command_line import CommandLine
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.eval.command import read_command_line
from lingua.eval.measures import Measures
from lingua.files import read_json
from lingua.run.metrics import read_metrics
from tests.trainer import TINY

EVAL = [
    "eval.harness=null",
    "eval.generator.dtype=fp32",
    "eval.generator.device=cpu",
    "eval.validation.max_steps=3",
    "eval.poll_s=0.2",
]


def make_data(folder: Path) -> Path:
    """A source `mine` with held-out documents beside it; returns the folder of sources."""
    source = folder / "data" / "mine"
    source.mkdir(parents=True)
    texts = [f"def f{n}(x):\n    return x + {n}\n" * 5 for n in range(8)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (source / "mine.chunk.0.jsonl").write_text(lines * 20)
    (source / "mine.val.jsonl").write_text(lines)
    return folder / "data"


def words_of(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Words of a run of 5 steps; those due are 2, 4 and the last."""
    what = [f"dump_dir={run_dir}", "steps=5", "checkpoint.eval={every: 2, keep: 0}", "checkpoint.dump.every=2"]
    return [*TINY, *what, f"data.root_dir={data}", "data.sources={mine: 1.0}", *EVAL, *more]


def verdicts(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step. The line of the newest may not be there yet."""
    return {int(file.parent.name): read_json(file)["metrics"] for file in sorted(run_dir.glob("evals/*/results.json"))}


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Verdicts after the last evaluator's end; each has its one line, which says the same."""
    found = verdicts(run_dir)
    file = run_dir / "metrics.eval.jsonl"
    lines = read_metrics(file) if file.is_file() else []
    assert sorted(line["global_step"] for line in lines) == sorted(found), "none is lost, none comes twice"
    for line in lines:
        assert line.items() >= found[line["global_step"]].items()
    return found


def by_hand(run_dir: Path, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The same, found afterwards in the published checkpoints by one process."""
    request = read_command_line(CommandLine(overrides=[f"ckpt={run_dir}"]))
    run_args, args = request.compose()
    world = World(RankInfo(), torch.device("cpu"), mesh=None)
    measures = Measures(run_args, args, world, request.by_phase(run_args))
    return {step: measures.measure(f"{run_dir}@{step}", lambda: None) for step in steps}
