from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apps.main.args import TrainArgs
from lingua.config.base import ConfigError
from lingua.config.compose import Composed, compose, examine
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.slurm_script import job_script


def composed(folder: Path, text: str = "{}", *words: str, overlays: list[str] | None = None) -> Composed[TrainArgs]:
    path = folder / "run.yaml"
    path.write_text(text)
    return compose(str(path), overlays or [], list(words), TrainArgs)


def complaints(folder: Path, text: str, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        composed(folder, text, *words)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def test_no_config_at_all_is_the_defaults() -> None:
    done = compose(None, [], [], TrainArgs)
    assert done.args == TrainArgs()
    assert set(done.origins().values()) == {"default"}


def test_bases_deltas_overlays_and_overrides_stack_in_this_order(tmp_path: Path) -> None:
    for name, lr in (("first", 1), ("second", 2), ("over", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"optim: {{lr: {lr}.0, {name if name == 'x' else 'warmup'}: {lr}}}\n")
    text = "base: [first.yaml, second.yaml]\noptim: {lr: 3.0}\n"
    assert composed(tmp_path, "base: first.yaml").args.optim.lr == 1
    assert composed(tmp_path, "base: [first.yaml, second.yaml]").args.optim.lr == 2
    done = composed(tmp_path, text)
    assert (done.args.optim.lr, done.args.optim.warmup) == (3, 2)
    over = [str(tmp_path / "over.yaml")]
    assert composed(tmp_path, text, overlays=over).args.optim.lr == 4
    assert composed(tmp_path, text, "optim.lr=5", "optim.lr=6", overlays=over).args.optim.lr == 6


def test_sections_merge_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text(
        "data: {root_dir: d, sources: {a: 1.0, b: 2.0}}\neval: {harness: {tasks: [x, y]}}\n"
    )
    args = composed(tmp_path, "base: [common.yaml]\ndata: {sources: {b: 0.0}}\neval: {harness: {tasks: [z]}}").args
    assert args.data.sources == {"a": 1.0, "b": 0.0}
    assert args.eval is not None
    assert args.eval.harness is not None
    assert args.eval.harness.tasks == ["z"]


def test_type_hint_and_config_are_llmgyms_spelling_of_type_and_its_keys(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text("optim: {type_hint: adamw, config: {lr: 1.0, warmup: 7}}\n")
    text = """base: common.yaml
optim:
  type_hint: muon
  config:
    lr: 2.0
data:
  root_dir: d
  tokenizer: {name: none}
  sources:
    - {type_hint: random, config: {vocab_size: 5}}
eval: {measures: [{type_hint: held_out}]}
"""
    done = composed(tmp_path, text)
    assert (done.args.optim.type, done.args.optim.lr, done.args.optim.warmup) == ("muon", 2.0, 7)
    assert done.origins()["optim.type"].endswith("run.yaml:3")
    assert done.origins()["optim.lr"].endswith("run.yaml:5")
    assert done.args.data.tokenizer.vocab_size == 5
    for words in (["optim.type_hint=adamw", "optim.config.lr=3"], ["optim={type_hint: adamw, config: {lr: 3}}"]):
        optim = composed(tmp_path, text, *words).args.optim
        assert (optim.type, optim.lr) == ("adamw", 3.0)
    assert complaints(tmp_path, "optim: {type_hint: adamw, config: {lt: 1.0}}") == [
        "run.yaml:1: unknown key optim.lt; did you mean optim.lr?"
    ]


def test_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text("seed: 1\noptim:\n  lr: 1e-4\n")
    done = composed(tmp_path, "base: [common.yaml]\nsteps: 5\ndata:\n  batch_size: 4\n", "optim.warmup=1")
    origins = {key: value.replace(f"{tmp_path}/", "") for key, value in done.origins().items()}
    expected = {
        "seed": "common.yaml:1",
        "optim.lr": "common.yaml:3",
        "steps": "run.yaml:2",
        "data.batch_size": "run.yaml:4",
        "optim.warmup": "command line",
        "optim.clip": "default",
    }
    assert {key: origins[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        ("model:\n  n_heads: 7", [], "run.yaml:3: model: dim 64 is not a multiple of n_heads 7"),
        ("model:\n  dim: 65", [], "run.yaml:3: model: dim 65 is not a multiple of n_heads 4"),
        ("model: {n_layers: 2}", ["model.n_heads=7"], "command line: model: dim 64 is not a multiple of n_heads 7"),
        ("model: {n_layers: 2}", ["model={n_heads: 7}"], "command line: model: dim 64 is not a multiple of n_heads 7"),
        ("model: {type: mambo}", [], "run.yaml:2: model.type: unknown model type 'mambo'"),
        ("name: ''\ndump_dir: ''", [], "run.yaml:2: the config: name and dump_dir are both empty"),
        ("model:\n  type: mamba2\n  n_heads: 7", [], "run.yaml:4: model: the hidden width 256 is not a multiple of"),
        ("steps: 2", ["eval={harness: {num_fewshot: x}}"], "command line: eval.harness.num_fewshot is 'x'"),
    ],
)
def test_what_overrides_a_base_is_to_blame(tmp_path: Path, text: str, words: list[str], sentence: str) -> None:
    base = "steps: 1\nname: base\nmodel:\n  dim: 64\n  n_heads: 4\neval: {harness: {num_fewshot: 1}}\n"
    (tmp_path / "base.yaml").write_text(base)
    assert sentence in complaints(tmp_path, f"base: base.yaml\n{text}", *words)[0]


def test_merge_keys_and_aliases_keep_their_lines_and_share_nothing(tmp_path: Path) -> None:
    done = composed(tmp_path, "optim:\n  <<: [{lr: 5e-4}, {warmup: 7, lr: 1e-5}]\n  clip: 3.0\n")
    assert (done.args.optim.lr, done.args.optim.warmup, done.args.optim.clip) == (5e-4, 7, 3.0)
    origins = {key: value.replace(f"{tmp_path}/", "") for key, value in done.origins().items()}
    assert [origins[f"optim.{key}"] for key in ("lr", "warmup", "clip")] == ["run.yaml:2", "run.yaml:2", "run.yaml:3"]
    args = composed(tmp_path, "logging: {wandb: &w {project: a}}\neval: {wandb: *w}\n", "eval.wandb.project=b").args
    assert args.logging.wandb is not None
    assert args.logging.wandb.project == "a"


def test_a_file_of_aliases_that_expand_without_end_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "its aliases expand to" in complaints(tmp_path, "\n".join(lines))[0]
    assert "its aliases expand to" in complaints(tmp_path, "name: &a [*a]")[0]


def test_overlays_and_groups_beside_the_config_are_found_by_name(tmp_path: Path) -> None:
    for name, text in (("experiments/a", "optim: {lr: 1.0, warmup: 1}"), ("experiments/b", "optim: {lr: 2.0}")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "mine.yaml").write_text("seed: 5")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("{dim: 64, n_heads: 2}")
    args = composed(tmp_path, "seed: 1", "model=small", overlays=["experiments=[a, b]", "mine"]).args
    assert (args.optim.lr, args.optim.warmup, args.seed, args.model.dim) == (2.0, 1, 5, 64)  # pyright: ignore[reportAttributeAccessIssue]
    assert composed(tmp_path, "seed: 1", overlays=["experiments=a"]).args.optim.lr == 1.0
    (tmp_path / "sub").mkdir()
    base = f"base: {tmp_path / 'base.yaml'}"
    (tmp_path / "base.yaml").write_text("name: base")
    assert composed(tmp_path / "sub", base, overlays=["mine"]).args.seed == 5, "of the base's folder"
    with pytest.raises(ConfigError, match="no config experiments/c: there are a, b"):
        composed(tmp_path, "seed: 1", overlays=["experiments=c"])


def test_a_group_pick_fills_its_section_and_the_command_line_changes_the_pick(tmp_path: Path) -> None:
    group = tmp_path / "configs" / "model"
    group.mkdir(parents=True)
    (group / "small.yaml").write_text("dim: 64\nn_heads: 2\nn_layers: 1\n")
    (group / "large.yaml").write_text("dim: 96\nn_heads: 3\n")
    folder = tmp_path / "configs" / "mine"
    folder.mkdir()
    for pick in ("model/small", "model=small"):
        args = composed(folder, f"base: [{pick}]\nmodel: {{rope_theta: 5.0}}").args
        assert (args.model.dim, args.model.rope_theta) == (64, 5.0)  # pyright: ignore[reportAttributeAccessIssue]
    args = composed(folder, "base: [model/small]\nmodel: {rope_theta: 5.0}", "model=large", "model.n_layers=3").args
    assert args.model.model_dump(include={"dim", "n_heads", "n_layers", "rope_theta"}) == {
        "dim": 96,
        "n_heads": 3,
        "n_layers": 3,
        "rope_theta": 5.0,
    }
    assert "large" in complaints(folder, "base: [model/small]", "model=larg")[0]


def test_a_group_pick_without_one_in_the_config_takes_the_place_of_the_section(tmp_path: Path) -> None:
    args = composed(tmp_path, "model: {dim: 64, n_heads: 2, qk_norm: true}", "model=llama_7B").args
    assert args.model.model_dump(include={"dim", "qk_norm"}) == {"dim": 4096, "qk_norm": False}


def test_debug_overlay_is_found_by_its_name(tmp_path: Path) -> None:
    assert composed(tmp_path, "distributed: {compile: true}", overlays=["debug"]).args.distributed.compile is False
    with pytest.raises(ConfigError, match="debug"):
        composed(tmp_path, overlays=["debgu"])


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("name=7", "name", "7"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("distributed.compile=true", "distributed.compile", True),
        ("steps=null", "steps", None),
        ("eval=null", "eval", None),
        ("data.skip_rows=[[1,2]]", "data.skip_rows", [[1, 2]]),
        ("data.sources={a: 1.0}", "data.sources", {"a": 1.0}),
        ("data.sources.dclm_baseline_1.0_10prct=5", "data.sources", {"x": 3.0, "dclm_baseline_1.0_10prct": 5.0}),
        ("sample_prompt='a=b'", "sample_prompt", "a=b"),
        ("seed=0123", "seed", 123),
        ("seed=0x1F", "seed", 31),
        ("seed=0o17", "seed", 15),
        ("optim.lr=.5", "optim.lr", 0.5),
        ("total_flops=2e5", "total_flops", 2e5),
        ("dump_dir=0042", "dump_dir", "0042"),
        ("launcher.comment=5 # five", "launcher.comment", "5 # five"),
        ("launcher.setup=[0042, 1.10, yes]", "launcher.setup", ["0042", "1.10", "yes"]),
        ("eval={harness: {gen_kwargs: {a: 1.10, b: [0042]}}}", "eval.harness.gen_kwargs", {"a": 1.1, "b": [42]}),
        ("eval={harness: {limit: 0100}}", "eval.harness.limit", 100),
    ],
)
def test_override(tmp_path: Path, word: str, key: str, value: object) -> None:
    dumped = composed(tmp_path, "data: {root_dir: d, sources: {x: 3.0}}", word).args.model_dump()
    for name in key.split("."):
        dumped = dumped[name]
    assert dumped == value


SPELLINGS = ["2:00:00", "1.10", "0123", "0042", "08", "2e5", "1e-3", "1_000", "0x1F", "0o17", "+7", ".inf", "yes"]


@pytest.mark.parametrize("text", SPELLINGS)
def test_text_keys_keep_the_spelling_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TYPED", text)
    keys = ("name", "launcher.comment", "env.NCCL_DEBUG", "launcher.env.set.X", "data.tokenizer.path", "data.root_dir")
    file = "name: {0}\nlauncher: {{comment: {0}, env: {{set: {{X: {0}}}}}}}\nenv: {{NCCL_DEBUG: {0}}}\n"
    file += "data: {{root_dir: {0}, tokenizer: {{path: {0}}}}}\n"
    quoted = "name: '{0}'\nlauncher: {{comment: '{0}', env: {{set: {{X: '{0}'}}}}}}\nenv: {{NCCL_DEBUG: '{0}'}}\n"
    quoted += "data: {{root_dir: '{0}', tokenizer: {{path: '{0}'}}}}\n"
    for args in (
        composed(tmp_path, file.format(text)).args,
        composed(tmp_path, "{}", *(f"{key}={text}" for key in keys)).args,
        composed(tmp_path, quoted.format("${oc.env:TYPED}")).args,
        composed(tmp_path, quoted.format(f"${{oc.env:NOT_SET_HERE,{text}}}")).args,
        composed(tmp_path, quoted.format(f"${{oc.select:not_there,{text}}}")).args,
        composed(tmp_path, file.format(text).replace(f"name: {text}", "name: ${launcher.comment}")).args,
    ):
        data, launcher = args.data, args.launcher
        assert (args.name, launcher.comment, args.env.NCCL_DEBUG, launcher.env.set) == (text, text, text, {"X": text})
        assert (data.root_dir, data.tokenizer.path, args.dump_dir) == (text, text, f"out/{text}")
    named = composed(tmp_path, f"launcher: {{comment: {text}}}\nname: 'a-${{launcher.comment}}'").args.name
    assert named == f"a-{text}"


def test_the_time_limit_reaches_sbatch_as_typed(tmp_path: Path) -> None:
    launcher = composed(tmp_path, "launcher: {account: 0042}", "launcher.time=2:00:00").args.launcher
    options = job_script("x", launcher.model_dump(), []).splitlines()
    assert {"#SBATCH --time=2:00:00", "#SBATCH --account=0042"} <= set(options)


@pytest.mark.parametrize("text", ["1:30", "1_000", "0b11", "2024-01-01", "1e", "٣"])
def test_what_yaml_1_2_does_not_take_for_a_number_is_refused_where_one_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TYPED", text)
    sentence = f"optim.lr is '{text}'; it must be a number"
    assert complaints(tmp_path, "{}", f"optim.lr={text}") == [f"command line: {sentence}"]
    assert complaints(tmp_path, f"optim: {{lr: {text}}}") == [f"run.yaml:1: {sentence}"]
    assert complaints(tmp_path, "optim: {lr: '${oc.env:TYPED}'}") == [f"run.yaml:1: {sentence}"]


def test_names_in_a_mapping_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    text = "data: {root_dir: d, sources: {2024: 1, 0042: 2, true: 3}}\nlauncher: {env: {set: {1: 1.0}}}"
    args = composed(tmp_path, text).args
    assert args.data.sources == {"2024": 1.0, "0042": 2.0, "true": 3.0}
    assert args.launcher.env.set == {"1": "1.0"}


def test_numbers_of_the_environment_are_reckoned_with_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW_MANY", "012")
    args = composed(tmp_path, "steps: '${mul:${oc.env:HOW_MANY},3}'\nseed: ${oc.env:HOW_MANY}").args
    assert (args.steps, args.seed) == (36, 12)
    monkeypatch.setenv("HOW_MANY", "1_2")
    (found,) = complaints(tmp_path, "steps: '${mul:${oc.env:HOW_MANY},3}'")
    assert "'1_2' is not a number" in found


def test_an_escaped_interpolation_is_text(tmp_path: Path) -> None:
    text = "sample_prompt: '\\${evil:1} \\\\\\${x}'\n"
    text += "launcher: {setup: ['export A=\\${A:-1}']}\nname: n\nslurm: {qos: '${sample_prompt}'}"
    args = composed(tmp_path, text).args
    assert args.sample_prompt == "${evil:1} \\${x}"
    assert args.launcher.setup == ["export A=${A:-1}"]
    assert args.slurm is not None
    assert args.slurm.qos == args.sample_prompt


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a$HOME", ()),
        ("dump_base: $NESTED/x", ()),
        ("{}", ("checkpoint.path=$NESTED",)),
    ],
)
def test_a_path_that_the_frozen_config_would_expand_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("NESTED", "a/$HOME")
    (found,) = complaints(tmp_path, text, *words)
    assert "contains a variable again" in found or "cannot hold a $" in found


def test_an_item_of_a_list_can_be_overridden(tmp_path: Path) -> None:
    text = "data: {sources: [{path: a}, {path: b, weight: 2.0}]}"
    sources = composed(tmp_path, text, "data.sources.1.weight=5").args.data.sources
    assert [source.weight for source in sources] == [1.0, 5.0]  # pyright: ignore[reportAttributeAccessIssue]
    assert "list of 2" in complaints(tmp_path, text, "data.sources.2.weight=5")[0]


def test_interpolation_sees_files_defaults_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW_MANY", "12")
    monkeypatch.setenv("TRICK", "${oc.env:HOME}")
    text = (
        "name: run-${seed}\nseed: 3\nsteps: ${oc.env:HOW_MANY}\noptim: {warmup: '${div_up:${steps},5}'}\n"
        "data: {root_dir: '${oc.env:NOT_SET_HERE,data}/x', batch_size: '${mul:2,3}', lanes: '${data.seq_len}'}\n"
        "sample_prompt: ${oc.env:TRICK}\nslurm: {partition: '${oc.env:NOT_SET_HERE,\"\"}'}\n"
    ).replace("${div_up:${steps},5}", "${div_up:${seed},2}")
    args = composed(tmp_path, text).args
    assert (args.name, args.steps, args.optim.warmup) == ("run-3", 12, 2)
    assert (args.data.root_dir, args.data.batch_size, args.data.lanes) == ("data/x", 6, args.data.seq_len)
    assert args.sample_prompt == "${oc.env:HOME}"  # what the environment holds is not read as a config
    assert args.slurm is not None
    assert args.slurm.partition == ""


@pytest.mark.parametrize(
    "value",
    [
        "${evil:1}",
        "${${word}:1}",
        "x ${seed} ${ evil : 1}",
        "${oc.env:X,${evil:1}}",
        "${oc.env:${evil:1}}",
        "${oc.decode:1}",
    ],
)
@pytest.mark.filterwarnings("ignore:register_new_resolver:UserWarning")
def test_no_resolver_that_evaluates_is_ever_called(tmp_path: Path, value: str) -> None:
    calls: list[object] = []
    OmegaConf.register_new_resolver("evil", lambda *words: calls.append(words), replace=True)
    try:
        found = complaints(tmp_path, f"dump_base: evil\nsteps: 1\nplugins: []\nsample_prompt: '{value}'\n")
    finally:
        OmegaConf.clear_resolver("evil")
    assert len(found) == 1
    assert found[0].startswith("run.yaml:4: sample_prompt is ")
    assert calls == []


def test_tags_that_build_objects_are_refused(tmp_path: Path) -> None:
    (found,) = complaints(tmp_path, "name: x\nsteps: !!python/object/apply:os.system ['touch hacked']\n")
    assert found.startswith("run.yaml:2: not valid YAML")


def test_home_and_variables_are_expanded_in_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "dump_base: ~/runs\nname: ~\ndata: {root_dir: $HOME/data, sources: {a: 1.0}}\nsample_prompt: $HOME\n"
        "checkpoint: {path: '${oc.env:HOME}/ckpt', init_ckpt_path: rel/ative}\nlogging: {wandb: {dir: '~'}}"
    ).replace("name: ~", "name: n")
    args = composed(tmp_path, text).args
    assert (args.dump_base, args.dump_dir) == ("/home/me/runs", "/home/me/runs/n")
    assert (args.data.root_dir, args.sample_prompt) == ("/home/me/data", "$HOME")
    assert (args.checkpoint.path, args.checkpoint.init_ckpt_path) == ("/home/me/ckpt", "rel/ative")
    assert args.logging.wandb is not None
    assert args.logging.wandb.dir == "/home/me"
    (found,) = complaints(tmp_path, "dump_base: $NO_SUCH_THING/x")
    assert "NO_SUCH_THING" in found


def test_the_run_folder_is_a_function_of_the_config_alone(tmp_path: Path) -> None:
    assert composed(tmp_path, "name: a").args.dump_dir == "out/a"
    assert composed(tmp_path, "name: a\ndump_base: b").args.dump_dir == "b/a"
    assert composed(tmp_path, "name: a\ndump_dir: c/d").args.dump_dir == "c/d"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "run.yaml: is empty; write `key: value` lines"),
        ("data: {sources: {nope:1}}", "run.yaml:1: not valid YAML: nope:1 is a key without a value; write a space"),
        (
            "logging: {wandb: true}",
            "run.yaml:1: logging.wandb is true; it is a section: set its keys, such as logging.",
        ),
        ("launcher: {time: foo}", "run.yaml:1: launcher.time: 'foo' is not a time limit such as 90 (minutes)"),
        ("launcher: {mem: 64 GB}", "run.yaml:1: launcher.mem: '64 GB' is not an amount of memory such as"),
        ("eval: {launcher: {time: 1h}}", "run.yaml:1: eval.launcher.time: '1h' is not a time limit"),
        ("steps: 0", "run.yaml:1: steps is 0; it must be at least 1"),
        ("name: a/../../x", "name is 'a/../../x', which is not a folder below dump_base; choose a plain name"),
        ("name: ./", "name is './', which is not a folder below dump_base; choose a plain name, or set dump_dir"),
        ("model: {dim: 33, n_heads: 4}", "model: dim 33 is not a multiple of n_heads 4; use 32 or 36, or set head_dim"),
        ("data:\n  batchsize: 4", "run.yaml:2: unknown key data.batchsize; did you mean data.batch_size?"),
        ("batch_size: 4", "run.yaml:1: unknown key batch_size; did you mean data.batch_size?"),
        ("model: {n_layer: 4, n_heads: 8}", "run.yaml:1: unknown key model.n_layer; did you mean model.n_layers?"),
        ("data: {batch_size: four}", "run.yaml:1: data.batch_size is 'four'; it must be a whole number"),
        (
            "data: {batch_size: '4'}",
            "run.yaml:1: data.batch_size is '4' (write it without quotes); it must be a whole number",
        ),
        ("steps: 1e3", "run.yaml:1: steps is 1e3 (write 1000); it must be a whole number"),
        ("data: {batch_size: 0}", "run.yaml:1: data.batch_size is 0; it must be at least 1"),
        ("optim: {lr: .inf}", "run.yaml:1: optim.lr is .inf; it must be a finite number"),
        ("optim: {lr: 1:30}", "run.yaml:1: optim.lr is '1:30'; it must be a number"),
        ("seed: 1_000", "run.yaml:1: seed is '1_000'; it must be a whole number"),
        (
            "model: {n_heads: 8, state_dim: 128}",
            "run.yaml:1: unknown key model.state_dim for this model.type; it is a key of model.type mamba2",
        ),
        ("model: {n_heads: 8, init_args: {dt_max: 0.01}}", "run.yaml:1: unknown key model.init_args for this"),
        (
            "model: {n_heads: 8, conv_size: 4}",
            "run.yaml:1: unknown key model.conv_size for this model.type; it is a key of model.type mingru",
        ),
        ("model: {type: mamba2, n_groups: 0}", "run.yaml:1: model.n_groups is 0; it must be at least 1"),
        ("model: {type: hybrid, n_heads: 8, layers: []}", "run.yaml:1: model.layers is []"),
        ("model_type: minRNN", "model_type is 'minRNN'; use one of hawk, hybrid,"),
        (
            "{model_type: minGRU, model: {type: hawk}}",
            "model_type is minGRU, but model.type is hawk; remove model_type",
        ),
        (
            "model: {n_heads: 8, n_future_head: 3}",
            "run.yaml:1: unknown key model.n_future_head for this model.type; it is a key of model.type mtp",
        ),
        (
            "model: {n_heads: 8, layers: [4]}",
            "run.yaml:1: unknown key model.layers for this model.type; it is a key of model.type hybrid",
        ),
        (
            "distributed: {compile: yes}",
            "run.yaml:1: distributed.compile is 'yes' (write true); it must be true or false",
        ),
        ("name: true", "run.yaml:1: name is true (put it in quotes); it must be text"),
        ("seed: !!int 1_0", "run.yaml:1: not valid YAML: '1_0' is not a number"),
        ("seed: !!bool yes", "run.yaml:1: not valid YAML: 'yes' is neither true nor false"),
        ("seed: " + "9" * 5000, "run.yaml:1: not valid YAML: a number of 5000 digits"),
        ("seed: 99999999999999999999", "run.yaml:1: seed: 99999999999999999999 has more than 64 bits; 92233720368547"),
        ("data: {seed: -99999999999999999999}", "run.yaml:1: data.seed: -99999999999999999999 has more than 64 bits"),
        (
            "name: a\0b",
            "run.yaml: not valid YAML: unacceptable character #x0000: special characters are not",
        ),
        ("a: " + "[" * 3000, "run.yaml: not valid YAML: maximum recursion depth exceeded"),
        ("distributed: {compile: 1}", "run.yaml:1: distributed.compile is 1; it must be true or false"),
        ("device: tpu", "run.yaml:1: device is 'tpu'; it must be 'auto', 'cpu' or 'cuda'"),
        ("data: 3", "run.yaml:1: data is 3; it is a section: set its keys, such as data."),
        ("data: {sources: {a: -1.0}, root_dir: d}", "run.yaml:1: data.sources.a is -1.0; it must be at least 0"),
        ("data:\n  sources:\n  - path: a\n    wait: 3", "run.yaml:4: unknown key data.sources.0.wait; did you mean"),
        ("data: {sources: 5}", "run.yaml:1: data.sources is 5; it must be keys with values or a list"),
        (
            "model: {dim: 100, n_heads: 3}",
            "run.yaml:1: model: dim 100 is not a multiple of n_heads 3",
        ),
        (
            "model: {type: mamba}",
            "run.yaml:1: model.type: unknown model type 'mamba'; known: hawk, hybrid,",
        ),
        ("data: {randomize_rate: 0.5}", "run.yaml:1: unknown key data.randomize_rate: tokens are not randomised"),
        ("eval: {dataset_dir: x}", "run.yaml:1: unknown key eval.dataset_dir: use eval.validation.root_dir"),
        ("name: [", "run.yaml:1: not valid YAML"),
        ("a: 1\nb: c: d", "run.yaml:2: not valid YAML"),
        ("seed: 1\nseed: 2", "run.yaml:2: key seed is repeated"),
        ("- a", "run.yaml:1: contains ['a'] instead of keys with values"),
        ("name: &a [*a]", "run.yaml"),
        ("steps: ${stepps}", "run.yaml:1: steps is '${stepps}', which cannot be resolved"),
        ("name: '${oc.env:NOT_SET_HERE}'", "cannot be resolved: the environment has no NOT_SET_HERE; set it, or write"),
        (
            "sample_prompt: ${oc.env:X",
            "sample_prompt cannot be resolved: missing BRACE_CLOSE at '<EOF>'; fix it, or write",
        ),
        ("base: [nothing.yaml]", "run.yaml:1: base file nothing.yaml does not exist"),
        ("base: [run.yaml]", "run.yaml: is its own base"),
        ("base: {a: 1}", "run.yaml:1: base is {'a': 1}; write a list"),
        ("plugins: [no_such_module]", "run.yaml:1: plugins names 'no_such_module', which cannot be imported"),
        ("name: ''", "name and dump_dir are both empty"),
        (f"seed: 1\nname: {'n' * 256}", "run.yaml:2: the config: name is 'nnn"),
        (f"seed: 1\ncheckpoint: {{path: {'n' * 256}}}", "run.yaml:2: the config: checkpoint.path is 'nnn"),
        ("launcher: {env: {set: {A=B: 1}}}", "run.yaml:1: launcher.env.set.A=B"),
        ("seed: 1\nname: a/../../x", "run.yaml:2: the config: name is 'a/../../x', which is not a folder"),
        ("data:\n  seed: 1\n  skip_rows: [[2, 1]]", "run.yaml:3: data: skip_rows [2, 1] is no range of rows"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    found = complaints(tmp_path, text)
    assert len(found) == 1
    assert sentence in found[0]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        compose(str(path), [], [], TrainArgs)
    assert (
        str(caught.value) == f"{path}: not a text file in UTF-8, byte 9 is 0xe9; name a YAML file, or save it as UTF-8"
    )


def test_a_grid_outside_a_sweep_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key grid: only `lingua sweep` reads it"):
        composed(tmp_path, "grid: {optim.lr: [1e-3]}")


def test_everything_wrong_is_said_at_once_and_each_with_its_place(tmp_path: Path) -> None:
    text = "steps: many\nunknown: 1\ndata: {batch_size: 0}\nmodel: {dim: 100, n_heads: 3}\nname: ${evil:}"
    found = complaints(tmp_path, text, "optim.lrr=1", "seed=x")
    assert len(found) == 7
    assert sum(problem.startswith("command line: ") for problem in found) == 2


def test_what_is_wrong_does_not_hide_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: many\nseed: 5\ndata: {sources: [{path: 3.5, weight: x}, {path: b}]}")
    examined = examine(str(path), [], [], TrainArgs)
    assert examined.composed is not None
    assert (examined.composed.args.steps, examined.composed.args.seed) == (None, 5)
    assert "steps" in examined.bad_keys


def test_a_missing_config_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "llama_1B.yaml").touch()
    with pytest.raises(ConfigError, match=r"does not exist.*did you mean .*llama_1B\.yaml"):
        compose(str(tmp_path / "lama_1B.yaml"), [], [], TrainArgs)
    with pytest.raises(ConfigError, match="is a folder"):
        compose(str(tmp_path), [], [], TrainArgs)


def test_a_plugin_registers_before_the_config_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_plugin_of_test.py").write_text(
        "from typing import Literal\nfrom lingua.config.base import register\n"
        "from lingua.config.keys.optim import OptimArgs\n"
        "@register('optim', 'sign_of_test')\nclass SignArgs(OptimArgs):\n"
        "    type: Literal['sign_of_test'] = 'sign_of_test'\n    sharpness: float = 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    text = "plugins: [my_plugin_of_test]\noptim: {type: sign_of_test, sharpness: 2.0}"
    done = composed(tmp_path, text)
    assert done.args.model_dump()["optim"]["sharpness"] == 2.0
    assert "unknown key optim.sharpness" not in str(complaints(tmp_path, text + "\nseed: x"))


def test_what_is_wrong_with_a_class_of_a_plugin_is_told_with_the_name_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_plugin_of_test.py").write_text(
        "from lingua.config.base import register\nfrom lingua.config.keys.optim import OptimArgs\n"
        "class Odd: ...\n@register('optim', 'odd_of_test')\nclass OddArgs(OptimArgs):\n"
        "    type: str = 'odd_of_test'\n    odd: Odd | None = None\n"
    )
    monkeypatch.chdir(tmp_path)
    found = str(complaints(tmp_path, "plugins: [wrong_plugin_of_test]\noptim: {type: odd_of_test}"))
    assert "plugins names 'wrong_plugin_of_test', which cannot be imported" in found


def test_keys_without_an_effect_are_read_and_named_where_they_ask_for_something(tmp_path: Path) -> None:
    config = tmp_path / "old.yaml"
    config.write_text(
        "distributed: {spawn_method: forkserver}\ncheckpoint: {thread_debug: true}\nlogging: {acc_freq: 8}\n"
        "eval: {wipe_ckpt: true, terminal_eval_wandb: false, harness: {tasks: [copa], device: cpu}}\n"
    )
    composed = compose(str(config), [], [], TrainArgs)
    assert composed.ignored == ["logging.acc_freq", "eval.wipe_ckpt", "eval.harness.device"]
    config.write_text("wipe_ckpt: true\nharness: {device: cpu}\n")
    assert compose(str(config), [], [], EvalArgs).ignored == ["wipe_ckpt", "harness.device"]
    with pytest.raises(ConfigError, match=r"unknown key .*wipe_ckpt"):  # of a run it never was one
        compose(None, [], ["wipe_ckpt=true"], TrainArgs)
    with pytest.raises(ConfigError, match=r"unknown key .*spawn_method"):
        compose(None, [], ["spawn_method=fork"], GeneratorArgs)
