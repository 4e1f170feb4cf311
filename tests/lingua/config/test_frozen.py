from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apps.main.args import TrainArgs
from lingua.config.compose import compose
from lingua.config.frozen import compare, dump_yaml, freeze, read_config, read_frozen, rule_of

BASE: dict[str, Any] = {"data": {"root_dir": "d", "sources": {"a": 1.0}}}


def config(**changes: Any) -> dict[str, Any]:
    """A frozen config with `section__key=value` changes."""
    tree = freeze(TrainArgs.model_validate(BASE), {"global_batch_size": 64})
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return tree


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"steps": 5}, "free"),
        ({"name": "x"}, "free"),
        ({"grad_acc_steps": 3}, "free"),
        ({"data__batch_size": 8}, "free"),
        ({"data__num_workers": 2}, "free"),
        ({"data__root_dir": "moved"}, "free"),
        ({"data__skip_rows": [[1, 2]]}, "free"),
        ({"data__tokenizer__path": "moved"}, "free"),
        ({"distributed__dp_shard": 8}, "free"),
        ({"distributed__compile": True}, "free"),
        ({"checkpoint__dump__every": 7}, "free"),
        ({"logging__freq": 1}, "free"),
        ({"env__OMP_NUM_THREADS": "4"}, "free"),
        ({"eval": {"name": "evals"}}, "free"),
        ({"model__attn_impl": "sdpa"}, "free"),
        ({"optim__lr": 1.0}, "accept"),
        ({"optim__weight_decay": 0.5}, "accept"),
        ({"optim__scheduler": "wsd"}, "accept"),
        ({"data__sources": {"a": 2.0}}, "accept"),
        ({"data__sources": {"a": 1.0, "b": 1.0}}, "accept"),
        ({"distributed__model_dtype": "fp32"}, "accept"),
        ({"loss__z_loss": 0.1}, "accept"),
        ({"optim__type": "sgd"}, "refuse"),
        ({"model__dim": 64}, "refuse"),
        ({"model__vocab_size": 64}, "refuse"),
        ({"model__rope_scaling": {"factor": 2.0}}, "refuse"),
        ({"data__seq_len": 64}, "refuse"),
        ({"data__lanes": 128}, "refuse"),
        ({"data__tokenizer__name": "sp"}, "refuse"),
        ({"data__seed": 1}, "refuse"),
        ({"seed": 1}, "refuse"),
        ({"global_batch_size": 32}, "refuse"),
    ],
    ids=str,
)
def test_rule_of_a_change(change: dict[str, Any], rule: str) -> None:
    (difference,) = compare(config(), config(**change))
    assert difference.rule == rule
    assert ("--accept-change" in str(difference)) == (rule == "accept")
    assert ("cannot change" in str(difference)) == (rule == "refuse")


def test_equal_configs_do_not_differ() -> None:
    assert compare(config(), config()) == []


def test_a_key_of_ones_own_app_needs_consent() -> None:
    assert rule_of("sharpness") == "accept"


def test_a_key_that_another_version_did_not_have_is_no_difference() -> None:
    older = config()
    del older["probe_freq"]
    assert compare(older, config(probe_freq=5)) == []
    assert compare(config(probe_freq=5), older) == []


def test_a_difference_names_key_and_both_values() -> None:
    (difference,) = compare(config(), config(optim__lr=0.5))
    assert str(difference).startswith("optim.lr: 0.0003 -> 0.5 ")


NOT_TEXT_ELSEWHERE = ["2e5", "08", "0042", "0o17", "0x1F", "1_000", "1:30", "2:00:00", "1.10", ".inf", "~", "null"]
NOT_TEXT_ELSEWHERE += ["true", "yes", "on", "2024-01-01", "<<", "=", "", "!!int 5", "&a", "*a", "# a", "- a", "a: b"]
LIKE_INTERPOLATIONS = ["${x}", "\\${x}", "\\\\${x}", "${HOME:-x}", "${", "a${oc.env:HOME}"]
TEXTS = st.one_of(
    st.text(), st.text("0123456789._:+-eExo ", max_size=8), st.sampled_from(NOT_TEXT_ELSEWHERE + LIKE_INTERPOLATIONS)
)
LONG = st.integers(-(1 << 63), (1 << 63) - 1)
ANYTHING = st.recursive(
    st.none() | st.booleans() | LONG | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, texts=st.lists(TEXTS, max_size=3), lr=st.floats(1e-300, 1e300), n=LONG, rest=ANYTHING)
@example(text="\x85", texts=NOT_TEXT_ELSEWHERE, lr=1e22, n=-1, rest=[float("inf"), 1.0, 1, True, "\u2028 a  b\r"])
@example(text="a" * 200, texts=LIKE_INTERPOLATIONS, lr=1e-5, n=0, rest={text: text for text in NOT_TEXT_ELSEWHERE})
def test_any_config_reads_back_as_itself(text: str, texts: list[str], lr: float, n: int, rest: Any) -> None:
    said = {
        "seed": n,
        "sample_prompt": text,
        "optim": {"lr": lr},
        "launcher": {"account": text, "setup": texts, "env": {"set": {f"V{i}": each for i, each in enumerate(texts)}}},
        "logging": {"wandb": {"tags": texts}},
        "eval": {"harness": {"tasks": [*texts, {"rest": rest}], "gen_kwargs": {text: rest}}},
    }
    frozen = freeze(TrainArgs.model_validate(said), {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(dump_yaml(frozen).encode())
        assert read_config(path) == frozen
        again = freeze(compose(str(path), [], [], TrainArgs).args, {})
    assert repr(again) == repr(frozen)  # 1 is not 1.0 and not True


@pytest.mark.parametrize("text", NOT_TEXT_ELSEWHERE)
def test_readers_of_older_yaml_see_text_where_the_frozen_config_has_text(text: str) -> None:
    assert yaml.safe_load(dump_yaml({"name": text, text: 1})) == {"name": text, text: 1}


@pytest.mark.parametrize("name", ["2e5", "08", "0o17"])
def test_text_that_an_older_version_froze_without_quotes_is_text_again(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(f"name: {name}\nenv: {{NCCL_DEBUG: {name}}}\nseed: 5\n")
    args = compose(str(tmp_path / "config.yaml"), [], [], TrainArgs).args
    assert (args.name, args.env.NCCL_DEBUG, args.seed) == (name, name, 5)
    (tmp_path / "config.yaml").write_text(dump_yaml(read_config(tmp_path / "config.yaml")))  # as copies are made
    assert compose(str(tmp_path / "config.yaml"), [], [], TrainArgs).args == args


@pytest.mark.parametrize("name", ["plain", "7", "null", "a: b", "ünï\n'\""])
def test_a_frozen_config_reads_back_and_composes(tmp_path: Path, name: str) -> None:
    args = TrainArgs.model_validate({**BASE, "name": name, "optim": {"lr": 1e-5}})
    tree = freeze(args, {"steps": 7, "data.lanes": 64})
    (tmp_path / "config.yaml").write_text(dump_yaml(tree), encoding="utf-8")
    assert read_frozen(tmp_path) == tree
    again = compose(str(tmp_path / "config.yaml"), [], [], TrainArgs).args
    assert (again.steps, again.data.lanes, again.name, again.optim.lr) == (7, 64, name, 1e-5)


def test_no_run_no_frozen_config(tmp_path: Path) -> None:
    assert read_frozen(tmp_path) is None
