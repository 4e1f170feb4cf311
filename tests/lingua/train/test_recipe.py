"""The config that `lingua recipe` prints is whole, fits the machine and follows the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.train.check import load
from lingua.train.recipe import Recipe, best_batch, best_rate, recipe
from tests.cli import Lingua

SAMPLE = "apps/main/configs/bytes.yaml"


def made(params: str, *words: str, config: str | Path = SAMPLE, tokens: str = "20x", gpus: str = "h200") -> Recipe:
    return recipe(parse_command_line([str(config), *words]), params, tokens, gpus)


def test_the_law_gives_its_published_values():
    """Of a model with 1B parameters and 100B tokens, arXiv 2503.04715."""
    assert best_rate(10**9, 1e11).value == pytest.approx(1.63e-3, rel=0.01)
    assert best_batch(1e11) == pytest.approx(1.11e6, rel=0.01)


def test_small_models_have_no_higher_rate_than_the_smallest_that_the_law_was_measured_on():
    rate = best_rate(221_664, 3e5)
    assert rate == (2.76e-3, "as 215M, Step Law, arXiv 2503.04715's smallest model; the law says 0.0133")
    assert best_rate(1000, 1e12).value == pytest.approx(7.81e-3, rel=0.1)  # the best of 215M with 466 tokens each
    assert best_rate(10**9, 1e13).value == best_rate(10**9, 466e9).value < 2**-7


@pytest.mark.parametrize(
    ("params", "n_wanted", "gpus", "layout"),
    [
        ("1M", 1e6, "cpu", ("no_shard", None, False)),
        ("300M", 3e8, "H100", ("no_shard", None, False)),
        ("1B", 1e9, "8xH200", ("no_shard", None, False)),
        ("7B", 7e9, "16xh200", ("full_shard", 8, False)),
        ("70B", 7e10, "128xh200", ("full_shard", 128, True)),
    ],
)
def test_what_is_printed_passes_the_check_and_fits(
    tmp_path: Path, params: str, n_wanted: float, gpus: str, layout: tuple[str, int | None, bool]
):
    found = made(params, gpus=gpus)
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(found.lines()))
    read = load(parse_command_line([str(file)]))
    size, args = read.resolved, read.args
    assert size == found.checked.resolved
    assert read.warnings == []
    spread = args.distributed
    assert (spread.fsdp_type, spread.dp_shard, spread.full_activation_checkpointing) == layout
    assert size.n_params == pytest.approx(n_wanted, rel=0.05)
    assert size.total_tokens == pytest.approx(20 * size.n_params, rel=0.01)
    assert size.tokens_per_step == pytest.approx(best_batch(size.total_tokens), rel=0.1)
    rate = best_rate(size.n_params_non_embedding, size.total_tokens).value
    assert args.optim.lr == pytest.approx(rate, rel=0.01)
    assert args.optim.warmup * size.tokens_per_step == pytest.approx(size.n_params, rel=0.05)
    assert all(found.sources[key] for key in ("model.dim", "optim.lr", "global_batch_size", "steps", "optim.warmup"))
    assert {"hours", "disk_bytes"} - {figure.name for figure in found.figures} == (
        {"hours"} if gpus == "cpu" else set()
    )


def test_a_run_of_that_name_does_not_bind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("debug", "recipe_1M"):
        (tmp_path / "out" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "out" / name / "config.yaml").write_text("data: {seq_len: 7}\nsteps: 3\n")
    assert made("1M", config=Path(__file__).parents[3] / SAMPLE, gpus="cpu").checked.args.data.seq_len > 7


def test_data_come_from_a_config_and_what_is_typed_goes_before_the_rules(tmp_path: Path):
    config = tmp_path / "data.yaml"
    config.write_text(
        "data: {root_dir: there, sources: {web: 3, code: 1}, batch_size: 5}\n"
        "model: {n_heads: 4, hidden_dim: 64, qk_norm: true}\ndistributed: {tp_size: 2}\noptim: {lr: 1}\n"
    )
    found = made("50M", "data.seq_len=4096", "optim.clip=0.5", config=config, gpus="8xa100", tokens="2B")
    assert found.tree["data"]["sources"] == {"web": 3.0, "code": 1.0}
    assert found.tree["model"]["qk_norm"]
    assert (found.checked.args.data.seq_len, found.checked.args.optim.clip) == (4096, 0.5)
    assert found.checked.args.distributed.tp_size == 1
    assert found.checked.args.optim.lr < 0.01
    assert found.checked.resolved.n_params == pytest.approx(5e7, rel=0.1)
    assert found.sources["optim.clip"] == "command line"
    assert found.sources["data.root_dir"] == f"{config}:1"


@pytest.mark.parametrize(
    ("params", "more", "said"),
    [
        ("0", {}, "--params 0 is not a number from 1 to 1e+12; write 300M"),
        ("abc", {}, "--params abc is not a number"),
        ("1B", {"tokens": "manyx"}, "--tokens many is not a number from 0.001 to 1e+15; write 300M, 1B or 2e9, or 20x"),
        ("1B", {"gpus": "8xgtx"}, "--gpus 8xgtx names no GPU in the table; write 8xh200 or cpu; known: b200"),
        ("1B", {"gpus": "12xh200"}, "--gpus 12xh200 is no number of whole nodes of 8; write 8xh200"),
        ("70B", {"gpus": "8xh200"}, "--params 70B does not fit 8 x h200; use --gpus 16xh200"),
        ("10K", {}, "--params 10,000 has no shape with a vocabulary of 258; the nearest, 2 layers of width 32"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(params: str, more: dict[str, str], said: str):
    with pytest.raises(ConfigError) as refused:
        made(params, **more)
    [problem] = refused.value.problems
    assert said in problem


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.type=muon", "optim.type is muon, but the rules were measured with adamw"),
        ("model.type=mtp", "model.type is mtp, but the rules were measured on llama"),
    ],
)
def test_what_the_rules_do_not_cover_is_refused(word: str, said: str):
    with pytest.raises(ConfigError, match=said):
        made("1M", word)


def test_a_script_reads_it_as_json(capsys: pytest.CaptureFixture[str]):
    found = Lingua(capsys, "recipe").record("--params", "1M", "--gpus", "cpu")
    assert found["config"]["optim"]["lr"] == pytest.approx(2.9e-3, rel=0.01)
    assert "Step Law" in found["sources"]["optim.lr"]
    assert found["facts"]["disk_bytes"] > 2 * found["facts"]["checkpoint_bytes"] > 0
    code, _, said = Lingua(capsys, "recipe")("--params", "1B", "model.type=mamba2")
    assert (code, said.count("\n")) == (2, 1)
