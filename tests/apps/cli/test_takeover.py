"""`lingua import --run`: a run of Meta Lingua goes on here with its weights, its optimizer and its step."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.state_dict import get_state_dict

from apps.cli.made import Made
from apps.cli.takeover import take_over
from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.checkpoint import lookup
from lingua.checkpoint.load_weights import load_weights
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.frozen import dump_yaml
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.config.keys.optim import AdamWArgs
from lingua.console import Progress
from lingua.files import RunError
from lingua.model.loss import CrossEntropy
from lingua.optim.adamw import build_adamw
from lingua.train.check import load
from lingua.train.describe import described
from tests.trainer import TINY, losses, published, train

MODEL: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "vocab_size": 258, "max_seqlen": 32}


def config(run_dir: Path) -> dict[str, Any]:
    """As its trainer freezes it; keys of the fork at values that ask for nothing."""
    return {
        "name": "old", "dump_dir": str(run_dir), "dump_base": "", "seed": 777, "grad_acc_steps": 2, "steps": 6,
        "gc_collect_freq": 1000, "probe_freq": None, "total_flops": 1e15, "deterministic": False,
        "data": {
            "root_dir": "data", "sources": {}, "batch_size": 2, "seq_len": 32, "n_views": 2, "seed": 42,
            "add_bos": True, "add_eos": True, "load_async": False, "prefetch_size": 8,
            "tokenizer": {"name": "bytes", "path": None}, "source_filter_functions": None, "randomize_rate": 0.0,
        },
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "clip": 1.0, "scheduler": "cosine", "warmup": 1},
        "model": {**MODEL, "head_dim": None, "n_kv_heads": None, "init_std_factor": "disabled", "sliding_window": None},
        "distributed": {"dp_shard": 1, "dp_replicate": 1, "tp_size": 1, "model_dtype": "fp32", "fsdp_type": "no_shard"},
        "checkpoint": {
            "dump": {"every": 3, "keep": 1}, "path": str(run_dir / "checkpoints"), "init_ckpt_path": None,
            "continue_training_from_init": False, "async_save_mode": None,
        },
        "logging": {"freq": 1, "acc_freq": None, "wandb": None}, "async_eval_gpus": None, "eval": None,
    }  # fmt: skip


def old_run(run_dir: Path, tied: bool = False) -> tuple[LMTransformer, torch.optim.Optimizer]:
    """A run as it stands after 4 steps: folders, names and the pickled leftovers of its optimizer."""
    model = LMTransformer(LMTransformerArgs.model_validate({**MODEL, "weight_tying": tied}))
    model.init_weights(3)
    optimizer = build_adamw(AdamWArgs(decay_all=True), list(model.named_parameters()))
    for step in range(4):
        tokens = torch.randint(258, (2, 32), generator=torch.Generator().manual_seed(step))
        loss, _ = model(tokens, labels=tokens, loss=CrossEntropy(CrossEntropyArgs()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, optim = get_state_dict(model, optimizer)
    if tied:
        weights["output.tied_module.weight"] = weights["tok_embeddings.weight"]
    folder = run_dir / "checkpoints" / "0000000004"
    folder.mkdir(parents=True)
    save({"model": weights, "optim": optim}, storage_writer=FileSystemWriter(folder), no_dist=True)
    said = config(run_dir)
    said["model"]["weight_tying"] = tied
    (run_dir / "config.yaml").write_text(dump_yaml(said))
    (folder / "params.json").write_text(json.dumps(said))
    (folder / "train_state_00000.json").write_text(json.dumps({"step": 4, "acc_step": 0, "scheduler": {}}))
    return model, optimizer


def taken(old: Path, out: Path, **more: Any) -> Made:
    return take_over(old, out, Progress(bar=False), **more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_optimizer_and_step_are_the_old_ones_and_training_goes_on(tmp_path: Path, tied: bool) -> None:
    model, optimizer = old_run(tmp_path / "old", tied)
    made = taken(tmp_path / "old", tmp_path / "new")
    args = described(tmp_path / "new" / "config.yaml")
    assert (args.global_batch_size, args.optim.decay_all, args.steps, args.total_flops) == (4, True, 6, None)
    assert any("reading begins with the first row" in warning for warning in made.warnings)

    start = args.checkpoint.init_ckpt_path
    assert start is not None
    fresh = LMTransformer(LMTransformerArgs.model_validate({**MODEL, "weight_tying": tied}))
    state = TrainState(fresh, build_adamw(AdamWArgs(decay_all=True), list(fresh.named_parameters())))
    manager = CheckpointManager(CheckpointArgs(), tmp_path / "elsewhere")
    manager.load_from(start, state)  # verifies the manifest
    manager.close()
    assert (state.shared["step"], state.shared["total_tokens"]) == (4, 4 * 4 * 32)
    for (name, ours), theirs in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        there = optimizer.state[theirs]
        assert {key: torch.equal(value, there[key]) for key, value in state.optimizer.state[ours].items()} == {
            "step": True,
            "exp_avg": True,
            "exp_avg_sq": True,
        }

    if tied:
        return
    result = train([str(tmp_path / "new" / "config.yaml"), "device=cpu"])
    assert result.exit_code == 0, result.output
    assert sorted(losses(tmp_path / "new")) == [5, 6]
    assert published(tmp_path / "new") == [6]
    assert train([str(tmp_path / "new" / "config.yaml"), "device=cpu", "steps=7", "--accept-change"]).exit_code == 0
    assert sorted(losses(tmp_path / "new")) == [5, 6, 7]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_is_not_complete_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old_run(tmp_path / "old")
    root = tmp_path / "old" / "checkpoints"
    (root / "0000000004").rename(root / "0000000009")
    for name in ("0000000011", "0000000012"):  # states are written before the tensors have arrived
        (root / name).mkdir()
        for file in (root / "0000000009").iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "0000000012" / ".metadata").unlink()
    half = next(iter((root / "0000000011").glob("*.distcp")))
    half.write_bytes(half.read_bytes()[:1000])
    assert taken(tmp_path / "old", tmp_path / "new").origin.startswith("step 4 of")
    assert "it has no .metadata" in caplog.text
    assert f"{half.name} has 1000 bytes of at least" in caplog.text
    with pytest.raises(RunError, match="has no complete checkpoint of step 11"):
        taken(tmp_path / "old@11", tmp_path / "other")
    with pytest.raises(RunError, match="has no checkpoint of step 5; it has 9, 11, 12"):
        taken(tmp_path / "old@5", tmp_path / "other")
    with pytest.raises(RunError, match="new already exists"):
        taken(tmp_path / "old", tmp_path / "new")


@pytest.mark.filterwarnings("ignore")
def test_keys_that_are_gone_are_told_and_an_edited_config_helps(tmp_path: Path) -> None:
    old_run(tmp_path / "old")
    said = config(tmp_path / "old")
    said["data"]["randomize_rate"] = 0.5
    (tmp_path / "old" / "config.yaml").write_text(dump_yaml(said))
    with pytest.raises(ConfigError, match=r"unknown key data\.randomize_rate: tokens are not randomised"):
        taken(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "edited.yaml").write_text(dump_yaml(config(tmp_path / "old")))
    taken(tmp_path / "old", tmp_path / "new", config=tmp_path / "edited.yaml")


class Touch:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.filterwarnings("ignore")
def test_nothing_of_the_old_run_is_executed(tmp_path: Path) -> None:
    old_run(tmp_path / "old")
    (tmp_path / "old" / "checkpoints" / "0000000004" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "x")))
    with pytest.raises(RunError, match="is refused"):
        taken(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", ["", "@4"])
def test_a_run_of_meta_lingua_gives_its_weights_to_a_new_run(tmp_path: Path, step: str) -> None:
    model, _ = old_run(tmp_path / "old")
    (tmp_path / "old/checkpoints/0000000009").mkdir()  # killed while it was saved: no .metadata
    fresh = LMTransformer(LMTransformerArgs.model_validate(MODEL))
    assert "0000000004" in load_weights(fresh, f"{tmp_path}/old{step}")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    words = [*TINY, f"dump_dir={tmp_path}/new", f"checkpoint.init_ckpt_path={tmp_path}/old{step}"]
    assert not any("init_ckpt_path" in warning for warning in load(parse_command_line(words)).warnings)
    with pytest.raises(RunError, match=r"is a run of Meta Lingua; `lingua import --run .*/old NEW` makes it one"):
        lookup.intact(f"{tmp_path}/old{step}")


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_a_run_of_meta_lingua_does_not_have_is_refused(tmp_path: Path) -> None:
    old_run(tmp_path / "old")
    words = [*TINY, f"dump_dir={tmp_path}/new", f"checkpoint.init_ckpt_path={tmp_path}/old@5"]
    with pytest.raises(ConfigError, match=r"/old@5 does not exist: .*/old has no such checkpoint; correct it"):
        load(parse_command_line(words))
