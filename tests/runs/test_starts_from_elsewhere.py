"""A run begins with the weights, or with the whole state, of another one."""

from pathlib import Path

import pytest

from apps.cli.export import Format, make_export, make_import
from tests.trainer import TINY, fingerprint, losses, published, train

WORDS = [*TINY, "optim.scheduler=constant", "optim.warmup=0"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("other")
    assert train([*WORDS, "steps=6", "checkpoint.dump.every=3", f"dump_dir={run_dir}"]).exit_code == 0
    return run_dir


def test_weights_alone(other: Path, tmp_path: Path):
    words = [*WORDS, "steps=2", f"dump_dir={tmp_path}", f"checkpoint.init_ckpt_path={other}@6"]
    result = train(words)
    assert result.exit_code == 0, result.output
    assert f"{other}/checkpoints/0000000006" in result.output  # it is said what was loaded from where
    first_of_other = losses(other)[1]
    assert losses(tmp_path)[1] != first_of_other  # the same rows, but trained weights
    assert published(tmp_path) == [2]


def test_the_whole_state_goes_on_as_the_other_did(other: Path, tmp_path: Path):
    words = [*WORDS, "steps=6", f"dump_dir={tmp_path}", f"checkpoint.init_ckpt_path={other}@3"]
    result = train([*words, "checkpoint.continue_training_from_init=true"])
    assert result.exit_code == 0, result.output
    assert losses(tmp_path) == {step: loss for step, loss in losses(other).items() if step > 3}
    tensors = [
        {name: fact for name, fact in fingerprint(run_dir, 6).items() if name.endswith(".distcp")}
        for run_dir in (other, tmp_path)
    ]
    assert tensors[0] == tensors[1]


def test_a_resume_wins_over_the_weights_to_start_from(other: Path, tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", f"checkpoint.init_ckpt_path={other}@6"]
    assert train([*words, "steps=2"]).exit_code == 0
    again = train([*words, "steps=4"])
    assert again.exit_code == 0
    assert "loaded full state" in again.output
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]


def test_weights_of_another_shape_are_refused_by_name(other: Path, tmp_path: Path):
    words = [*WORDS, "steps=2", f"dump_dir={tmp_path}", f"checkpoint.init_ckpt_path={other}", "model.dim=64"]
    result = train(words)
    assert result.exit_code == 1
    assert "tok_embeddings.weight" in result.output
    assert "Traceback" not in result.output


@pytest.mark.soak
def test_a_model_that_was_exported_comes_in_again(other: Path, tmp_path: Path):
    make_export(f"{other}@6", tmp_path / "hf", Format.hf)
    make_import(tmp_path / "hf", tmp_path / "in")
    shape = [word for word in WORDS if not word.startswith(("model.", "apps/"))]
    started = {}
    for name, words in {
        "run": [*WORDS, f"checkpoint.init_ckpt_path={other}@6"],
        "folder": [*WORDS, f"checkpoint.init_ckpt_path={tmp_path / 'hf'}"],
        "config": [str(tmp_path / "in" / "config.yaml"), *shape],  # as one starts continued pretraining
    }.items():
        same = ["steps=2", "seed=7", "optim.lr=1e-3", "distributed.model_dtype=fp32", f"dump_dir={tmp_path / name}"]
        result = train([*words, *same])
        assert result.exit_code == 0, result.output
        started[name] = losses(tmp_path / name)
    assert started["folder"] == started["config"] == started["run"]
