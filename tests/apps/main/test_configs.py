"""Every config that is shipped: it passes the check, and its totals are those it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.config.command_line import parse_command_line
from lingua.config.compose import compose
from lingua.config.keys.eval import EvalArgs
from lingua.train import check

CONFIGS = Path(check.__file__).parents[2] / "apps" / "main" / "configs"
TRAINED = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "eval")
ONE_B, SMALL, SEVEN_B = (1_809_946_624, 1_284_610_048), (493_917_184, 231_248_896), (7_526_944_768, 6_476_271_616)

# name: (ranks, tokens per step, steps, parameters, those without embeddings)
TOTALS = {
    "llama_1B_8H200": (8, 393_216, 63_578, *ONE_B),
    "llama_1B_16H200": (16, 262_144, 1000, *ONE_B),
    "llama_1B_24H200": (24, 393_216, 1000, *ONE_B),
    "llama_1B_48G": (1, 16_384, 1_525_879, *ONE_B),
    "llama_1B_48Gx4": (4, 131_072, 190_734, *ONE_B),
    "llama_1B_48Gx4-32acc": (4, 524_288, 47_683, *ONE_B),
    "llama_280M_8H200": (8, 262_144, 21_206, *SMALL),
    "llama_280M_48G_1": (1, 2048, 500, *SMALL),
    "llama_280M_48G_2": (1, 2048, 500, *SMALL),
    "llama_data_selection_test": (1, 2048, 500, *SMALL),
    "llama_8H200_chinchilla": (8, 524_288, 13_195, 608_208_384, 453_035_520),
    "llama_7B_8H200": (8, 65_536, 6000, *SEVEN_B),
    "llama_7B_24H200": (24, 196_608, 2000, *SEVEN_B),
    "llama_1B_8H100_cpt": (8, 524_288, 46_921, 1_235_814_400, 973_146_112),
    "llama_1B": (1, 16_384, 60_000, *ONE_B),
    "llama_1B_old": (1, 16_384, 60_000, *ONE_B),
    "llama_7B": (1, 8192, 100_000, *SEVEN_B),
    "debug": (1, 1024, 400, 1_574_016, 1_049_728),
    "debug_gpu": (1, 65_536, 1000, 103_306_240, 102_777_856),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without runs and data, and no site's variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATA_DIR", "TOKENIZER_DIR", "INIT_CKPT", "EVAL_PARTITION", "EVAL_ACCOUNT", "EVAL_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", TRAINED)
def test_a_config_passes_and_nothing_is_odd_but_missing_files(name: str) -> None:
    checked = check.load(parse_command_line([str(CONFIGS / f"{name}.yaml")]))
    assert [warning for warning in checked.warnings if "is not on this machine" not in warning] == []
    assert checked.args.dump_dir.startswith("out/")
    if name in TOTALS:
        size = checked.resolved
        found = (size.world_size, size.tokens_per_step, size.n_steps, size.n_params, size.n_params_non_embedding)
        assert found == TOTALS[name]


def test_every_config_with_totals_is_there() -> None:
    assert set(TOTALS) | {"bytes"} == set(TRAINED)


@pytest.mark.parametrize("overlay", sorted(path.stem for path in (CONFIGS / "overlays").glob("*.yaml")))
def test_an_overlay_stacks_on_a_recipe(overlay: str) -> None:
    check.load(parse_command_line([str(CONFIGS / "llama_1B_8H200.yaml"), f"+{overlay}"]))


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_a_model_can_be_picked(model: str) -> None:
    checked = check.load(parse_command_line([str(CONFIGS / "llama_1B_8H200.yaml"), f"model={model}"]))
    said = (CONFIGS / "model" / f"{model}.yaml").read_text()
    assert f"{checked.resolved.n_params_non_embedding / 10 ** (9 if 'B parameters w' in said else 6):.4g}"[:3] in said


def test_the_evaluation_config_is_one() -> None:
    args = compose(str(CONFIGS / "eval.yaml"), [], ["ckpt_dir=x"], EvalArgs).args
    assert args.harness is not None
    assert len(args.harness.tasks) == 10


def test_a_site_is_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "/scratch/text")
    monkeypatch.setenv("EVAL_PARTITION", "night")
    args = check.load(parse_command_line([str(CONFIGS / "llama_7B_8H200.yaml")])).args
    assert args.data.root_dir == "/scratch/text"
    assert args.slurm is not None
    assert (args.slurm.partition, args.slurm.mem) == ("night", "128G")
