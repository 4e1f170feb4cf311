from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pytest

from apps.main.args import TrainArgs
from lingua.checkpoint.shm.area import Save, make_area
from lingua.config.base import ConfigError, Part
from lingua.config.command_line import CommandLine, parse_command_line
from lingua.config.frozen import dump_yaml
from lingua.config.keys.data import DataArgs
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.eval import EvalArgs, MeasureArgs
from lingua.config.keys.optim import OptimArgs
from lingua.data.sources import estimate_tokens
from lingua.data.token_files import tokenize_file
from lingua.run.lock import RunLock
from lingua.tokenizer import ByteTokenizer
from lingua.train.check import load, problems, resolve
from lingua.train.check_report import Fact, facts, facts_of_kills
from tests.checkpoints import make_run
from tests.corpora import write_parquet

MANY = {"steps": 10**6, "model": {"dim": 2048}, "checkpoint": {"dump": {"every": 1000}, "eval": {"keep": 1}}}
SMALL: dict[str, Any] = {
    "steps": 100,
    "model": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
    "optim": {"warmup": 10},
    "data": {"batch_size": 4, "seq_len": 32},
}


def args(**changes: Any) -> TrainArgs:
    tree = {**SMALL}
    for name, value in changes.items():
        tree[name] = {**tree[name], **value} if isinstance(tree.get(name), dict) and isinstance(value, dict) else value
    return TrainArgs.model_validate(tree)


@pytest.mark.parametrize(
    ("changes", "world_size", "rows", "micro_steps", "lanes"),
    [
        ({}, 1, 4, 1, 64),
        ({}, 3, 12, 1, 72),
        ({"grad_acc_steps": 3}, 2, 24, 3, 72),
        ({"global_batch_size": 48}, 2, 48, 6, 96),
        ({"global_batch_size": 24, "grad_acc_steps": 3}, 2, 24, 3, 72),
        ({"data": {"lanes": 6}}, 2, 8, 1, 6),
        ({"data": {"batch_size": 50}}, 2, 100, 1, 100),
        ({"distributed": {"tp_size": 2}}, 4, 8, 1, 64),
        ({"distributed": {"fsdp_type": "full_shard", "dp_shard": 2}}, 4, 16, 1, 64),
    ],
)
def test_sizes(changes: dict[str, Any], world_size: int, rows: int, micro_steps: int, lanes: int) -> None:
    size = resolve(args(**changes), world_size)
    assert (size.rows_per_step, size.grad_acc_steps, size.lanes) == (rows, micro_steps, lanes)
    assert size.batch_size * size.grad_acc_steps * size.dp_size == size.rows_per_step
    assert size.tokens_per_step == rows * size.seq_len == size.tokens_per_rank_step * size.dp_size


@pytest.mark.parametrize(
    ("changes", "world_size", "key", "sentence"),
    [
        (
            {"global_batch_size": 10},
            1,
            "global_batch_size",
            "ranks = 4; set it to 8 or 12",
        ),
        ({"global_batch_size": 3}, 1, "global_batch_size", "set it to 4"),
        ({"global_batch_size": 24, "grad_acc_steps": 2}, 1, "global_batch_size", "grad_acc_steps 2 is 8; drop one"),
        ({"data": {"lanes": 7}}, 2, "data.lanes", "no multiple of 2 data-parallel ranks; set it to 6 or 8"),
        ({"data": {"n_views": 1}}, 1, "data.n_views", "leaves no labels"),
        ({"optim": {"scheduler": "cosin"}}, 1, "optim.scheduler", "known are constant"),
        ({"epochs": 1.0}, 1, "epochs", "steps and epochs both say how long"),
        ({"total_flops": 1e18}, 1, "total_flops", "set total_flops=null"),
        ({"steps": None, "total_flops": 1.0}, 1, "total_flops", "less than one step"),
        ({"eval": {"validation": None}}, 1, "eval", "nothing is measured; set eval.validation"),
        ({"async_eval_gpus": 1}, 1, "async_eval_gpus", "add a section `eval`"),
        ({"eval": {"ema": True}}, 1, "eval.ema", "the run keeps no average of its weights; set optim.ema"),
        ({"sample_every": 5}, 1, "sample_every", "no prompt to continue; set sample_prompt"),
        ({"distributed": {"tp_size": 2}}, 3, "distributed", "tp_size 2 does not divide 3 ranks"),
        ({"distributed": {"fsdp_type": "full_shard", "dp_shard": 2}}, 3, "distributed", "dp_shard 2 does not divide 3"),
        ({"distributed": {"tp_size": 4}}, 4, "distributed.tp_size", "does not divide the model's 2 key-value heads"),
        (
            {"distributed": {"tp_size": 2}, "model": {"hidden_dim": 33}},
            2,
            "distributed.tp_size",
            "does not divide the width 33 of the feed-forward layer; set model.multiple_of",
        ),
        (
            {"distributed": {"tp_size": 2}, "data": {"seq_len": 31}},
            2,
            "distributed.tp_size",
            "does not divide data.seq_len 31; set data.seq_len to 30",
        ),
        (
            {
                "distributed": {"tp_size": 32},
                "model": {"n_heads": 32, "n_kv_heads": 32, "hidden_dim": 64},
            },
            32,
            "distributed.tp_size",
            "too many for a vocabulary of 258",
        ),
        ({"model": {"vocab_size": 100}}, 1, "model.vocab_size", "but the tokenizer has 258 tokens"),
        ({"model": {"vocab_size": 0}}, 1, "model.vocab_size", "set it to 258 or to -1"),
        (
            {"model": {"attn_impl": "sdpa_flash"}, "data": {"doc_mask": True}},
            1,
            "model.attn_impl",
            "cannot do data.doc_mask",
        ),
        (
            {"model": {"attn_impl": "sdpa_cudnn", "sliding_window": 8}},
            1,
            "model.attn_impl",
            "cannot do model.sliding_window",
        ),
        ({"model": {"attn_impl": "flash_attn"}, "device": "cpu"}, 1, "model.attn_impl", "needs a GPU"),
        ({"model": {"attn_impl": "xformers"}, "deterministic": True}, 1, "model.attn_impl", "use sdpa, flex or auto"),
        ({"model": {"attn_impl": "sdpa_cudnn"}, "deterministic": True}, 1, "model.attn_impl", "use sdpa, flex or auto"),
        ({"distributed": {"float8_recipe": "rowwise"}, "device": "cpu"}, 1, "distributed.float8_recipe", "needs a GPU"),
        ({"data": {"tokenizer": {"name": "sp"}}}, 1, "data.tokenizer", "needs a file"),
        ({"data": {"root_dir": "d", "sources": {"a": 0.0}}}, 1, "data.sources", "no source has a weight above 0"),
        ({"checkpoint": {"continue_training_from_init": True}}, 1, "checkpoint.continue_training_from_init", "set it"),
        ({"checkpoint": {"reset": ["data"]}}, 1, "checkpoint.reset", "no state is taken over"),
        ({"checkpoint": {"reset": ["step"], "init_ckpt_path": "x"}}, 1, "checkpoint.reset", "or drop it"),
        ({"optim": {"type": "muon"}, "distributed": {"tp_size": 2}}, 2, "optim.type", "use tp_size 1 and full_shard"),
    ],
)
def test_impossible_combinations(changes: dict[str, Any], world_size: int, key: str, sentence: str) -> None:
    errors, _ = problems(args(**changes), world_size)
    assert [finding.key for finding in errors] == [key]
    assert sentence in errors[0].text
    with pytest.raises(ConfigError):
        resolve(args(**changes), world_size)


def test_a_loss_that_takes_no_split_head_is_refused_under_tensor_parallelism() -> None:
    class OwnLossArgs(Part):
        type: str = "own"

    own = args(distributed={"tp_size": 2}, loss=OwnLossArgs())
    errors, _ = problems(own, 2)
    assert [(finding.key, "takes no head that is split" in finding.text) for finding in errors] == [("loss.type", True)]
    assert problems(own.model_copy(update={"distributed": DistributedArgs()}), 2)[0] == []


def test_a_part_states_what_it_cannot_do_beside_the_rest_of_the_config() -> None:
    class OwnArgs(OptimArgs):
        def conflicts(self, args: TrainArgs) -> Iterator[tuple[str, str]]:
            if args.grad_acc_steps != 1:
                yield "optim.type", "optim.type own needs grad_acc_steps=1"

    class OwnMeasure(MeasureArgs):
        type: str = "own"
        builder: ClassVar[str] = ""

        def conflicts(self, args: TrainArgs) -> Iterator[tuple[str, str]]:
            if args.grad_acc_steps != 1:
                yield "eval.measures", "a measure own needs grad_acc_steps=1"

    errors, _ = problems(args(optim=OwnArgs(warmup=10)), 1)
    assert errors == [("optim.type", "optim.type own needs grad_acc_steps=1")]
    errors, _ = problems(args(eval=EvalArgs(measures=[OwnMeasure()])), 1)
    assert errors == [("eval.measures", "a measure own needs grad_acc_steps=1")]
    assert problems(args(optim=OwnArgs(warmup=10), grad_acc_steps=1), 1)[0] == []


@pytest.mark.parametrize(
    ("changes", "world_size", "key"),
    [
        ({"optim": {"warmup": 100}}, 1, "optim.warmup"),
        ({"optim": {"lr": 1e10}}, 1, "optim.lr"),
        ({"steps": None}, 1, "steps"),
        ({"model": {"max_seqlen": 16}}, 1, "model.max_seqlen"),
        ({"distributed": {"dp_replicate": 4}}, 2, "distributed.dp_replicate"),
        ({"data": {"n_views": 3}}, 1, "data.n_views"),
        ({"data": {"num_workers": 65}}, 1, "data.num_workers"),
        ({"data": {"num_workers": 2, "load_async": False}}, 1, "data.num_workers"),
        ({"data": {"seq_len": 8192, "prefetch_size": 100_000}}, 1, "data.prefetch_size"),
        ({"distributed": {"model_dtype": "fp16"}}, 1, "distributed.model_dtype"),
        ({"distributed": {"float8_recipe": "tensorwise"}}, 1, "distributed.float8_recipe"),
        ({"profiling": {"signal": "SIGUSR2"}}, 1, "profiling.signal"),
        ({"signals": {"SIGUSR2": "save"}}, 1, "signals.SIGUSR2"),
        ({"stop_signals": ["SIGUSR2"]}, 1, "signals.SIGTERM"),
        ({"signals": {"SIGHUP": "save"}, "profiling": {"signal": "SIGHUP"}}, 1, "profiling.signal"),
        ({"checkpoint": {"init_ckpt_model_key": "model"}}, 1, "checkpoint.init_ckpt_model_key"),
        (
            {"steps": 10**6, "model": {"dim": 2048}, "checkpoint": {"dump": {"every": 1000}, "eval": {"keep": 1}}},
            1,
            "checkpoint.dump.keep",
        ),
        (
            {"steps": 10**6, "model": {"dim": 2048}, "checkpoint": {"dump": {"keep": 1}, "keep_every": 1000}},
            1,
            "checkpoint.keep_every",
        ),
        ({"steps": 10**4, "checkpoint": {"dump": {"every": 0}, "eval": {"every": -1}}}, 1, "checkpoint.dump.every"),
        ({"data": {"root_dir": "/nowhere", "sources": {"a": 1.0}}}, 1, "data.sources"),
        ({"data": {"tokenizer": {"name": "tiktoken", "path": "/nowhere/tokenizer.model"}}}, 1, "data.tokenizer.path"),
        ({"checkpoint": {"init_ckpt_path": "/nowhere"}}, 1, "checkpoint.init_ckpt_path"),
    ],
)
def test_odd_things_warn(changes: dict[str, Any], world_size: int, key: str) -> None:
    errors, warnings = problems(args(**changes), world_size)
    assert errors == []
    assert key in [finding.key for finding in warnings]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("signals.SIGUSR1=dance", "signals.SIGUSR1 is 'dance'; it must be 'stop', 'save' or 'profile'"),
        ("signals.SIGFOO=stop", "unknown key signals.SIGFOO; did you mean signals.SIGINT?"),
    ],
)
def test_an_unknown_signal_or_action_is_one_sentence(tmp_path: Path, word: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^command line: {re.escape(sentence)}$"):
        loaded(write(tmp_path), word)


def test_a_disk_that_is_away_is_no_mistake_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is exit code 2, and a job that ends so never comes back."""

    def stale(folder: Path) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle", str(folder))

    monkeypatch.setattr("lingua.data.jsonl.JsonlSource.find_files", stale)
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="Stale file handle"):
        problems(args(data={"root_dir": str(tmp_path), "sources": {"a": 1.0}}), 1)
    with pytest.raises(OSError, match="Stale file handle"):  # 1000 steps instead would be another run
        resolve(args(steps=None, epochs=1.0, data={"root_dir": str(tmp_path), "sources": {"a": 1.0}}), 1)


def test_a_tokenizer_that_cannot_be_read_for_a_moment_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        problems(args(data={"tokenizer": {"name": "hf", "path": str(tmp_path)}}), 1)


def test_nothing_is_saved_for_evaluations_that_no_section_asks_for() -> None:
    dump = {"every": 500, "keep": 2}
    assert args(checkpoint={"dump": dump}).checkpoint.eval.every == 0
    assert args(checkpoint={"dump": dump, "eval": {"every": 50, "keep": 1}}).checkpoint.eval.every == 50
    assert args(checkpoint={"dump": dump}, eval={"validation": {}}).checkpoint.eval.every == 1000
    again = TrainArgs.model_validate(args(checkpoint={"dump": dump}).model_dump() | {"eval": {"validation": {}}})
    assert [finding.key for finding in problems(again, 1)[1]] == ["checkpoint.eval.every"]


def test_nothing_is_said_about_a_plain_config() -> None:
    assert problems(args(), 1) == ([], [])


@pytest.mark.parametrize(("optim", "in_matrices", "in_others"), [("adamw", 12, 12), ("muon", 8, 12)])
def test_a_checkpoint_holds_the_weights_and_what_the_optimizer_keeps(
    optim: str, in_matrices: int, in_others: int
) -> None:
    size = resolve(args(optim={"type": optim}), 1)
    others = size.n_params - size.n_params_non_embedding
    assert size.checkpoint_bytes == in_matrices * size.n_params_non_embedding + in_others * others


def test_total_flops_makes_steps() -> None:
    plain = resolve(args(), 2)
    flops = plain.flops_per_token * plain.tokens_per_step * 7.5
    size = resolve(args(steps=None, total_flops=flops), 2)
    assert size.n_steps == 7
    assert "total_flops" in size.how_long


def test_epochs_make_steps_from_the_bytes_of_the_sources(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    line = '{"text": "' + "x" * 98 + '"}\n'
    (folder / "a.chunk.00.jsonl").write_text(line * 640)
    data = {"root_dir": str(tmp_path), "sources": {"a": 1.0}}
    assert estimate_tokens(DataArgs.model_validate(data)) == 640 * 100  # with begin and end
    assert resolve(args(steps=None, epochs=2.0, data=data), 1).n_steps == 2 * 640 * 100 // (4 * 32)
    (folder / "a.chunk.00.jsonl").unlink()
    errors, _ = problems(args(data=data), 1)
    assert "no *.jsonl file in this folder" in errors[0].text
    made = {"type": "random", "vocab_size": 5, "documents": 80}  # each is a row, with one token more than its labels
    data = {"sources": [made], "tokenizer": {"name": "none"}}
    assert resolve(args(steps=None, epochs=2.0, data=data), 1).n_steps == 2 * 80 // 4


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("", "in 0 lines"),
        ("\n \n\r\n", "in 3 lines ({'blank': 3})"),
        ('{"body": "a"}\n[]\n{\n{"text": ""}\n', "in 4 lines ({'no_text': 2, 'not_json': 1, 'empty': 1})"),
        ("\n" * 300_000, "in the first "),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "mmap_jsonl"])
def test_a_source_without_a_document_is_wrong(tmp_path: Path, form: str, lines: str, found: str) -> None:
    (tmp_path / "a.chunk.00.jsonl").touch()
    (tmp_path / "a.chunk.01.jsonl").write_text(lines)
    sources = [{"path": str(tmp_path), "format": form}]
    errors, _ = problems(args(data={"sources": sources}), 1)
    assert [error.key for error in errors] == ["data.sources"]
    assert f"{tmp_path}: no document with 'text' or 'content' {found}" in errors[0].text
    assert list(tmp_path.glob("*.idx")) == []
    (tmp_path / "a.chunk.02.jsonl").write_text('{"text": "a"}\n')
    assert bool(problems(args(data={"sources": sources}), 1)[0]) == (len(lines) > 10_000)


def test_a_parquet_or_token_source_without_a_document_is_wrong(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows" / "a.parquet", {"text": ["", None]})
    write_parquet(tmp_path / "rows" / "b.parquet", {"text": pyarrow.array([], "string")})
    (tmp_path / "a.jsonl").write_text("[]\n")
    tokenize_file(tmp_path / "a.jsonl", tmp_path / "made" / "a.jsonl.tokens", ByteTokenizer())
    for name, form, found in (
        ("rows", "parquet", "no document with 'text' or 'content' in 2 lines ({'empty': 1, 'no_text': 1})"),
        ("made", "tokens", "no document in these token files"),
    ):
        errors, _ = problems(args(data={"sources": [{"path": str(tmp_path / name), "format": form}]}), 1)
        assert found in errors[0].text


def test_sources_lie_under_root_dir_unless_absolute() -> None:
    named = DataArgs.model_validate({"root_dir": "d", "sources": {"a": 1.0, "off": 0.0}})
    assert [(s.name, s.path) for s in named.read_files()] == [("a", "d/a")]
    listed = DataArgs.model_validate({"root_dir": "d", "sources": [{"path": "a/b"}, {"path": "/c", "name": "see"}]})
    assert [(s.name, s.path) for s in listed.read_files()] == [("b", "d/a/b"), ("see", "/c")]


def test_a_run_to_go_on_from(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 50, 100)

    def found(start: str, *reset: str) -> tuple[list[str], list[str]]:
        checkpoint = {"init_ckpt_path": start, "continue_training_from_init": True, "reset": list(reset)}
        errors, warnings = problems(args(checkpoint=checkpoint), 1)
        return [finding.text for finding in errors], [finding.text for finding in warnings]

    assert found(f"{tmp_path}/run@50") == ([], [])
    for start in (f"{tmp_path}/run@100", f"{tmp_path}/run"):
        (error,), _ = found(start, "data")
        assert "is already at step 100; raise steps, or count from 0 with checkpoint.reset=[data,step]" in error
        assert found(start, "step") == ([], [])
    assert found(f"{tmp_path}/run@7")[1] == [f"checkpoint.init_ckpt_path {tmp_path}/run@7 is not on this machine"]


def test_a_fork_trains_what_its_origin_has_not(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 50)
    (tmp_path / "run/checkpoints/0000000050/train_state.00000.json").write_text('{"shared": {"total_tokens": 777}}')

    def figures(*reset: str) -> dict[str, Fact]:
        start = {"init_ckpt_path": f"{tmp_path}/run", "continue_training_from_init": True, "reset": list(reset)}
        fork = args(steps=80, checkpoint=start)
        return {fact.name: fact for fact in facts(fork, resolve(fork, 1), 0.4, "h200")}

    of_fork, anew = figures(), figures("step")
    per_step = anew["tokens_per_step"].value
    assert anew["total_tokens"].value == 80 * per_step
    assert of_fork["total_tokens"].value == 777 + 30 * per_step
    assert of_fork["total_tokens"].how == "777 of the first 50 steps + 30 steps * tokens per step"
    assert of_fork["total_flops"].value == of_fork["flops_per_token"].value * 30 * per_step


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ({}, "training waits until each is on the disk (0.* s at 1 GB/s); checkpoint.async_save_mode=shm writes"),
        (
            {"async_save_mode": "shm", "slots": 3},
            "training goes on while each is written (0.* s at 1 GB/s), from 5.4 MiB of",
        ),
        (
            {"async_save_mode": "shm", "slots": 3, "replicate": 1},
            "training goes on while each is written (0.* s at 1 GB/s), from 10.7 MiB of",
        ),
    ],
)
def test_what_a_save_costs_is_said_in_either_mode(checkpoint: dict[str, Any], sentence: str) -> None:
    run = args(steps=80, checkpoint=checkpoint)
    how = next(fact.how for fact in facts(run, resolve(run, 1), 0.4, "h200") if fact.name == "checkpoint_bytes")
    assert fnmatch(how, f"*; {sentence}*")


@pytest.mark.parametrize(
    ("mode", "every", "kill_every", "lost", "best"),
    [  # 5 s per step; 85 GB: 85 s to the disk, 2.7 s into the memory of 8 ranks
        (None, 400, "2h", "18.9% of the time, at one kill per 2h with checkpoint.dump.every 400", 211),
        ("shm", 400, "2h", "16.1% of the time", 39),
        ("shm", 39, "120m", "5.7% of the time", 39),
        ("shm", 0, "1d", "100.0% of the time, at one kill per 1d with checkpoint.dump.every 0: nothing is kept", 136),
    ],
)
def test_kills_cost_what_the_period_of_saves_leaves_to_lose(
    mode: str | None, every: int, kill_every: str, lost: str, best: int
) -> None:
    run = args(steps=1000, checkpoint={"async_save_mode": mode, "dump": {"every": every}})
    size = replace(resolve(run, 1), world_size=8, checkpoint_bytes=int(85e9))
    now, then = facts_of_kills(run, size, hours=5000 / 3600, kill_every=kill_every, disk_gb_per_s=1)
    assert f"{now.shown} {now.how}".startswith(lost)
    assert then.value == best


@pytest.mark.parametrize("kill_every", ["2", "h", "2x", "-1h", "0h", ""])
def test_a_kill_rate_that_cannot_be_read_is_refused(kill_every: str) -> None:
    run = args(steps=80)
    with pytest.raises(ConfigError, match=f"--kill-every {kill_every} is no duration; write 90s, 30m, 2h or 1d"):
        list(facts_of_kills(run, resolve(run, 1), 1.0, kill_every, 1.0))


# -- on other GPUs -------------------------------------------------------------------------------------------------


def frozen(**changes: Any) -> dict[str, Any]:
    return {"global_batch_size": 48, "data": {"lanes": 96}, **changes}


@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_rows_and_lanes_stay_and_accumulation_follows(world_size: int, micro_steps: int) -> None:
    size = resolve(args(), world_size, frozen())
    assert (size.rows_per_step, size.lanes, size.grad_acc_steps) == (48, 96, micro_steps)


def test_a_number_of_ranks_that_does_not_fit_names_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"rows per step stay 48.*set data\.batch_size to 3 or 6"):
        resolve(args(), 8, frozen())
    with pytest.raises(ConfigError, match="start on a number of ranks that divides 48"):
        resolve(args(), 5, frozen())


# -- a whole command line ------------------------------------------------------------------------------------------


def write(folder: Path, **changes: Any) -> str:
    path = folder / "x.yaml"
    path.write_text(dump_yaml({**SMALL, "dump_dir": str(folder / "run"), **changes}))
    return str(path)


def loaded(*words: str, world_size: int = 1) -> Any:
    return load(parse_command_line(words, ["accept-change"]), world_size)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(write(tmp_path), "optim.lrr=1", "optim.scheduler=x", "async_eval_gpus=1", "steps=many", "epochs=1.0")
    found = caught.value.problems
    assert len(found) == 4  # that epochs and steps contradict each other cannot be said: steps is no number
    assert all(problem.startswith("command line: ") for problem in found)


def test_what_only_follows_from_a_wrong_value_is_not_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(write(tmp_path), "data.batch_size=x", "global_batch_size=7")
    assert len(caught.value.problems) == 1


def test_a_key_without_an_effect_is_a_warning(tmp_path: Path) -> None:
    (warning,) = loaded(write(tmp_path), "distributed.spawn_method=fork", "checkpoint.thread_debug=true").warnings
    assert warning == "command line: distributed.spawn_method has no effect; take it out"


def test_strict_paths_turns_missing_files_into_errors(tmp_path: Path) -> None:
    line = parse_command_line([write(tmp_path, data={"root_dir": "/nowhere", "sources": {"a": 1.0}})])
    (warning,) = load(line, 1).warnings
    assert "x.yaml:" in warning
    assert "/nowhere/a is not on this machine" in warning
    with pytest.raises(ConfigError, match="/nowhere/a is not on this machine"):
        load(line, 1, strict_paths=True)


def started(run_dir: Path, config: dict[str, Any], *, has_begun: bool = True) -> None:
    """Leave what a start leaves that saved nothing; `has_begun`: it came to its first step."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    (run_dir / "metrics.checkpoint.jsonl").write_text('{"event": "begun"}\n' if has_begun else "")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "run_id").write_text("the-run")


def publish_mark(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "checkpoint_0000000004.done").write_text("{}")


def stage_snapshot(run_dir: Path, shm: Path, **changes: Any) -> None:
    """A complete snapshot in memory, as a start leaves it that was killed before the service drained it."""
    save = Save(**{"run_id": "the-run", "attempt": 1, "step": 4, "ranks": (0,), **changes})
    region = make_area(run_dir, shm)
    region.make_slots(1, set())
    region.slot(0).put_mark(save)
    region.slot(0).report_ready(0, save, {})


def test_a_second_start_is_compared_with_the_first(tmp_path: Path) -> None:
    config, run_dir = write(tmp_path), tmp_path / "run"
    first = loaded(config, world_size=2)
    assert first.differences == []
    started(run_dir, first.frozen)
    publish_mark(run_dir)
    again = loaded(config, world_size=1)
    assert again.differences == []
    assert (again.resolved.rows_per_step, again.resolved.grad_acc_steps) == (8, 2)
    assert [str(d) for d in loaded(config, "steps=200", world_size=2).differences] == [
        "steps: 100 -> 200 takes effect from here on"
    ]
    with pytest.raises(ConfigError, match=r"optim\.lr: .*--accept-change"):
        loaded(config, "optim.lr=1", world_size=2)
    assert len(loaded(config, "optim.lr=1", "--accept-change", world_size=2).differences) == 1
    with pytest.raises(ConfigError, match=r"model\.dim: 64 -> 128 cannot change"):
        loaded(config, "model.dim=128", "--accept-change", world_size=2)
    from_frozen = loaded(str(run_dir / "config.yaml"), world_size=1)
    assert (from_frozen.resolved.rows_per_step, from_frozen.differences) == (8, [])
    with pytest.raises(ConfigError, match=r"rows per step stay 8.*set data\.batch_size to 2"):
        loaded(str(run_dir / "config.yaml"), world_size=4)


@pytest.mark.parametrize(
    ("optim", "step", "n_steps", "effect"),
    [
        ({"scheduler": "cosine"}, 100, 200, "raises the learning rate of step 101 from 3e-05 to 0.00017"),
        ({"scheduler": "linear"}, 100, 200, "raises the learning rate of step 101 from 3e-05 to 0.000172"),
        ({"scheduler": "cosine"}, 50, 200, "raises the learning rate of step 51 from"),
        ({"scheduler": "wsd"}, 100, 200, "raises the learning rate of step 101 from 3e-05 to 0.0003"),
        ({"scheduler": "wsd"}, 50, 200, None),  # its decay had not begun
        ({"scheduler": "constant"}, 100, 200, None),
        ({"scheduler": "cosine"}, 5, 200, None),  # warming up
        ({"scheduler": "cosine"}, 50, 60, None),  # it falls
    ],
)
def test_a_length_that_raises_the_rate_again_must_be_allowed(
    tmp_path: Path, optim: dict[str, Any], step: int, n_steps: int, effect: str | None
) -> None:
    config, run_dir = write(tmp_path, optim={**optim, "warmup": 10}), tmp_path / "run"
    started(run_dir, loaded(config).frozen)
    (run_dir / "checkpoints" / f"checkpoint_{step:010d}.done").write_text("{}")
    if effect is None:
        assert [d.key for d in loaded(config, f"steps={n_steps}").differences] == ["steps"]
        return
    sentence = rf"steps: 100 -> {n_steps} {re.escape(effect)}.*; allow it with --accept-change"
    with pytest.raises(ConfigError, match=sentence):
        loaded(config, f"steps={n_steps}")
    assert [d.key for d in loaded(config, f"steps={n_steps}", "--accept-change").differences] == ["steps"]


def test_until_there_is_a_checkpoint_the_config_is_free(tmp_path: Path) -> None:
    config = write(tmp_path)
    started(tmp_path / "run", loaded(config, world_size=2).frozen)
    free = loaded(config, "model.dim=128", "optim.lr=1", "data.lanes=40", "seed=1", world_size=2)
    assert {"model.dim", "optim.lr", "data.lanes", "seed"} <= {d.key for d in free.waived}
    assert "model.dim: 64 -> 128 takes effect from here on" in [str(d) for d in free.differences]
    unchanged = loaded(config, world_size=1)  # on other GPUs; lowering data.batch_size is the same
    assert (unchanged.resolved.rows_per_step, unchanged.resolved.grad_acc_steps, unchanged.waived) == (8, 2, [])
    assert loaded(config, "data.batch_size=3", world_size=2).resolved.rows_per_step == 6


def test_a_start_that_failed_before_training_leaves_nothing_to_keep(tmp_path: Path) -> None:
    config = write(tmp_path)
    started(tmp_path / "run", loaded(config, world_size=2).frozen, has_begun=False)
    again = loaded(config, "data.batch_size=1", world_size=2)
    assert (again.resolved.rows_per_step, again.differences) == (2, [])


@pytest.mark.parametrize("changes", [{}, {"run_id": "older"}, {"ranks": (0, 1)}, {"n_nodes": 2}], ids=str)
def test_a_complete_snapshot_in_memory_counts_as_a_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Not that of an older run of this name, nor half of one, nor what only several nodes together have."""
    config = write(tmp_path, checkpoint={"async_save_mode": "shm", "shm_path": str(tmp_path)})
    started(tmp_path / "run", loaded(config).frozen)
    stage_snapshot(tmp_path / "run", tmp_path, **changes)
    if changes:
        assert [d.key for d in loaded(config, "optim.lr=1").waived] == ["optim.lr"]
    else:
        with pytest.raises(ConfigError, match=r"optim\.lr: .*--accept-change"):
            loaded(config, "optim.lr=1")


def test_a_checkpoint_that_lacks_only_its_mark_counts_as_one(tmp_path: Path) -> None:
    config, root = write(tmp_path), tmp_path / "run" / "checkpoints"
    started(tmp_path / "run", loaded(config).frozen)
    (root / "0000000004").mkdir()
    assert loaded(config, "optim.lr=1").waived != []
    (root / "incarnation-1").mkdir()
    (root / "incarnation-1" / "checkpoint_0000000004.done").write_text("{}")
    with pytest.raises(ConfigError, match=r"optim\.lr: .*--accept-change"):
        loaded(config, "optim.lr=1")


def test_after_a_nan_the_rate_may_be_lowered(tmp_path: Path) -> None:
    """As the message of the failure says, and nothing else."""
    config, run_dir = write(tmp_path, optim={"lr": 0.5}), tmp_path / "run"
    started(run_dir, loaded(config).frozen)
    publish_mark(run_dir)
    with pytest.raises(ConfigError, match="--accept-change"):
        loaded(config, "optim.lr=0.1")
    (run_dir / "stop.json").write_text('{"reason": "error", "kind": "nan"}')
    lowered = loaded(config, "optim.lr=0.1", "data.skip_rows=[[6,7]]")
    assert [str(d) for d in lowered.differences if d.key == "optim.lr"] == [
        "optim.lr: 0.5 -> 0.1 takes effect from here on"
    ]
    for word in ("optim.lr=0.6", "optim.weight_decay=0.3"):
        with pytest.raises(ConfigError, match="--accept-change"):
            loaded(config, word)


# -- seeds ---------------------------------------------------------------------------------------------------------


def seeds(checked: Any) -> tuple[int, int, int]:
    tree = checked.frozen
    return tree["seed"], tree["model"]["seed"], tree["data"]["seed"]


def test_the_seeds_of_weights_and_rows_follow_seed(tmp_path: Path) -> None:
    config = write(tmp_path)
    assert seeds(loaded(config)) == (42, 42, 42)
    assert seeds(loaded(config, "seed=7")) == (7, 7, 7)
    assert seeds(loaded(config, "seed=7", "data.seed=1")) == (7, 7, 1)
    origins = loaded(config, "seed=7").composed.origins()
    assert (origins["model.seed"], origins["data.seed"]) == ("seed, command line", "seed, command line")
    assert loaded(config).composed.origins()["data.seed"] == "seed, default"
    stated = write(tmp_path, model={**SMALL["model"], "seed": 3})
    assert seeds(loaded(stated, "seed=7")) == (7, 3, 7)
    assert seeds(loaded(stated, "seed=7", "model.seed=null")) == (7, 7, 7)


def test_a_run_that_began_with_other_seeds_keeps_them(tmp_path: Path) -> None:
    """model.seed and data.seed were 42 whatever `seed` was."""
    config, run_dir = write(tmp_path, seed=777), tmp_path / "run"
    older = loaded(config, "model.seed=42", "data.seed=42").frozen
    started(run_dir, older)
    publish_mark(run_dir)
    again = loaded(config)
    assert (seeds(again), again.differences) == ((777, 42, 42), [])
    assert (again.args.model.seed, again.args.data.order_seed) == (42, 42)
    assert again.composed.origins()["data.seed"] == "the run's first attempt"


def test_a_seed_that_changes_nothing_is_a_warning(tmp_path: Path) -> None:
    config = write(tmp_path, data={**SMALL["data"], "seed": 1}, model={**SMALL["model"], "seed": 1})
    (warning,) = [text for text in loaded(config, "seed=2").warnings if "follow seed" in text]
    assert warning.startswith("command line: seed is 2, but model.seed is 1 (")
    assert not [text for text in loaded(config, "seed=2", "data.seed=null").warnings if "follow seed" in text]


def debug(tmp_path: Path, *words: str) -> CommandLine:
    """Return the command line of a run that has not begun: who ran the README's first command has an out/debug."""
    return parse_command_line(["apps/main/configs/bytes.yaml", f"dump_dir={tmp_path}/out", *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["checkpoint.init_ckpt_path=/nope"], r"init_ckpt_path /nope does not exist: / does not hold it; correct it"),
        (["dump_dir=/proc/x"], r"dump_dir is /proc/x, but /proc cannot hold files; choose another folder"),
        (["dump_dir=/etc/passwd/x"], r"dump_dir is /etc/passwd/x, but /etc/passwd is a file; choose another folder"),
        (["checkpoint.path=/sys/x"], r"checkpoint\.path is /sys/x, but /sys cannot hold files; choose another"),
        (["data.seq_len=100000000"], r"4 rows of data\.seq_len 100,000,000 takes 2\.2 TiB at least, and no GPU known"),
        (["data.seq_len=100000000", "device=cpu"], r"takes 2\.2 TiB at least, and this machine has .*; lower data"),
    ],
)
def test_what_can_never_start_does_not_pass(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(debug(tmp_path, *words), 1)


def test_weights_of_a_folder_that_is_not_on_this_machine_may_be_on_another(tmp_path: Path) -> None:
    line = debug(tmp_path, f"checkpoint.init_ckpt_path={tmp_path}/there/weights")
    assert any("there/weights is not on this machine" in warning for warning in load(line, 1).warnings)


def test_a_tokenizer_that_is_missing_is_found_where_the_run_is_started(tmp_path: Path) -> None:
    line = debug(tmp_path, "data.tokenizer.name=hf", f"data.tokenizer.path={tmp_path}/tokenizer.json")
    assert any("assumed to have 128,256 tokens" in warning for warning in load(line, 1).warnings)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not on this machine; correct the path, or copy it here"):
        load(line, 1, starting=True)


def test_tensorboard_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = debug(tmp_path, "logging.tensorboard=true")
    with pytest.raises(ConfigError, match=r"the package tensorboard is missing; `uv sync --extra tensorboard`"):
        load(line, 1)


def test_a_folder_with_another_runs_checkpoints_is_refused_before_anything_starts(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with RunLock(tmp_path / "a") as lock:
        lock.bind(shared)
    words = ["config=apps/main/configs/bytes.yaml", f"checkpoint.path={shared}"]
    load(parse_command_line([*words, f"dump_dir={tmp_path / 'a'}"]))
    with pytest.raises(ConfigError, match=r"shared holds the checkpoints of another run, .*/a; choose another"):
        load(parse_command_line([*words, f"dump_dir={tmp_path / 'b'}"]))
