"""Ranks that were started with different configs find that out before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lingua.config.frozen import rule_of
from lingua.distributed.meeting import agree
from lingua.distributed.place import RankInfo
from lingua.distributed.same_config import MixedConfigError, code_of, difference
from lingua.run.failure import classify, known_to_all
from tests.ranks import run_on_ranks

CONFIG: dict[str, Any] = {
    "optim": {"lr": 0.001},
    "data": {"sources": {"a": 1.0, "b": 2.0}, "skip_rows": [[1, 2]], "stage_to": "/scratch/0"},
    "env": {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_abc"},
    "distributed": {"compile_cache": "auto"},
}


def with_other(section: str, **values: Any) -> dict[str, Any]:
    return CONFIG | {section: CONFIG.get(section, {}) | values}


def heard(rank: int, config: dict[str, Any]) -> str:
    """What `agree` tells a rank that must leave."""
    with pytest.raises(MixedConfigError) as caught:
        compare(rank, config)
    assert classify(caught.value) == "setup"
    assert known_to_all(caught.value)
    return str(caught.value)


def compare(rank: int, config: dict[str, Any]) -> None:
    store, place = dist.distributed_c10d._get_default_store(), RankInfo(rank, dist.get_world_size(), master=("here", 1))
    agree(store, place, 60, json.dumps(config))


def test_ranks_with_the_same_config_go_on():
    run_on_ranks(lambda rank: compare(rank, CONFIG), 3)


def test_every_rank_hears_the_keys_and_values_that_differ():
    other = with_other("optim", lr=0.01) | {"env": CONFIG["env"] | {"NCCL_DEBUG": "out of memory"}}
    sentences = run_on_ranks(lambda rank: heard(rank, CONFIG if rank in (0, 2) else other), 4)
    assert (
        sentences
        == [
            "the ranks do not have the same config: optim.lr is 0.001 on ranks 0, 2 and 0.01 on ranks 1, 3; "
            "env.NCCL_DEBUG is 'INFO' on ranks 0, 2 and 'out of memory' on ranks 1, 3; "
            "start all of them with the same config, command line, environment and code"
        ]
        * 4
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (with_other("data", sources={"a": 1.0, "c": 2.0}), "data.sources.b is 2.0 on rank 0 and absent on rank 1; "),
        (with_other("data", sources={"b": 2.0, "a": 1.0}), "data.sources (order) is ['a', 'b'] on rank 0 and ['b', "),
        (with_other("data", skip_rows=[[1, 3]]), ": data.skip_rows.0.1 is 2 on rank 0 and 3 on rank 1; start"),
        (with_other("data", skip_rows=[]), "data.skip_rows is absent on rank 0 and [] on rank 1; "),
        (with_other("optim", lr=None), "optim.lr is 0.001 on rank 0 and null on rank 1"),
        (with_other("env", HF_TOKEN="hf_xyz"), "env.HF_TOKEN is '***' on rank 0 and '***' on rank 1"),
        (CONFIG | {"notes": ["x" * 90 + "y"]}, f"notes.0 is absent on rank 0 and '{'x' * 90}y' on rank 1"),
        (CONFIG | {f"k{n}": n for n in range(11)}, "k7 is absent on rank 0 and 7 on rank 1; 3 more keys; start"),
    ],
)
def test_a_difference_is_named_wherever_it_is(other: dict[str, Any], words: str):
    assert words in difference([CONFIG, other])


def test_the_folders_of_a_machine_may_have_other_names():
    run_on_ranks(lambda rank: compare(rank, with_other("data", stage_to=f"/scratch/{rank}")), 2)
    assert difference([CONFIG, with_other("distributed", compile_cache="/scratch/1")]) == ""
    assert rule_of("data.stage_to") == rule_of("distributed.compile_cache") == "free"  # no number depends on them


def test_other_code_of_an_app_or_a_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_app").mkdir()
    for file in ("their_app/__init__.py", "their_app/train.py", "their_plugin.py"):
        (tmp_path / file).write_text("x = 1\n")
    names = ["lingua", "their_app", "their_plugin"]
    first = code_of(names)
    (tmp_path / "their_app" / ".#train.py").symlink_to("nobody@nowhere")  # an editor's lock
    assert code_of(names) == first
    (tmp_path / "their_app" / "train.py").write_text("x = 2\n")
    second = code_of(names)
    assert [name for name in first if first[name] != second[name]] == ["the code of their_app"]
    (tmp_path / "their_plugin.py").write_text("x = 2\n")
    assert "; the code of their_plugin is '" in difference([first, code_of(names)])
