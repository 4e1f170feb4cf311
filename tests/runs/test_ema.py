"""The average of the weights is part of the exact state, and may be evaluated and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apps.cli.export import Format, make_average, make_export
from apps.main.eval import main as evaluate
from lingua.checkpoint.load_weights import open_source
from lingua.config.base import ConfigError
from lingua.files import RunError
from tests.trainer import TINY, at_step, fingerprint, kill_self, train

WORDS = [*TINY, "steps=6", "checkpoint.dump.every=1", "checkpoint.dump.keep=-1", "model.weight_tying=true"]
NAME = "tok_embeddings.weight"


@pytest.mark.soak
def test_an_average_survives_kills_and_other_ranks_and_is_read_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir, killed = tmp_path / "a", tmp_path / "b"
    words = [*WORDS, "optim.ema=0.5"]
    assert train([*words, f"dump_dir={run_dir}"]).exit_code == 0
    assert train([*words, f"dump_dir={killed}"], hook=at_step(4, kill_self)).exit_codes == [-9]
    assert train([*words, f"dump_dir={killed}"]).exit_code == 0
    assert fingerprint(killed, 6) == fingerprint(run_dir, 6)

    average = open_source(f"{run_dir}@1:ema").read(NAME)
    for step in range(2, 7):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * open_source(f"{run_dir}@{step}").read(NAME)
        torch.testing.assert_close(open_source(f"{run_dir}@{step}:ema").read(NAME), average)

    made = make_export(f"{run_dir}@6:ema", tmp_path / "out", Format.safetensors)
    assert "average" in made.origin
    assert torch.equal(open_source(tmp_path / "out").read(NAME), open_source(f"{run_dir}:ema").read(NAME))
    scores = []
    for place in (f"{run_dir}@6:ema", str(tmp_path / "out"), str(run_dir)):
        assert evaluate([place]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1] != scores[2]

    two = [*words, "data.batch_size=1", f"dump_dir={killed}", "steps=8", "--accept-change"]
    assert train(two, n_ranks=2).exit_code == 0  # resharded
    assert not torch.equal(open_source(f"{killed}@8:ema").read(NAME), open_source(f"{killed}@8").read(NAME))


@pytest.mark.soak
def test_an_average_may_begin_and_end_in_mid_run(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    assert train([*words, "steps=2"]).exit_code == 0
    with pytest.raises(RunError, match="holds no average of the weights"):
        open_source(f"{tmp_path}:ema")
    assert train([*words, "steps=4", "optim.ema=0.5", "--accept-change"]).exit_code == 0
    assert open_source(f"{tmp_path}@4:ema").read(NAME).isfinite().all()
    assert train([*words, "steps=6", "--accept-change"]).exit_code == 0


@pytest.mark.soak
def test_the_mean_of_checkpoints_is_a_folder_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir, out = tmp_path / "run", tmp_path / "mean"
    assert train([*WORDS, f"dump_dir={run_dir}"]).exit_code == 0
    made = make_average([f"{run_dir}@{step}" for step in (4, 5, 6)], out)
    assert made.files == ["config.yaml", "model.safetensors"]
    each = [open_source(f"{run_dir}@{step}").read(NAME).double() for step in (4, 5, 6)]
    assert torch.equal(open_source(out).read(NAME), (sum(each[1:], each[0]) / 3).float())
    assert evaluate([str(out)]) == 0
    make_export(str(out), tmp_path / "hf", Format.hf)
    words = [*WORDS, f"dump_dir={tmp_path / 'more'}", f"checkpoint.init_ckpt_path={out}", "steps=1"]
    assert train(words).exit_code == 0
    with pytest.raises(ConfigError, match="two checkpoints or more"):
        make_average([str(run_dir)], tmp_path / "one")
    other = [*WORDS, "model.dim=64", f"dump_dir={tmp_path / 'other'}", "steps=1"]
    assert train(other).exit_code == 0
    with pytest.raises(RunError, match="are of two models, which differ in"):
        make_average([str(run_dir), str(tmp_path / "other")], tmp_path / "both")
    assert not (tmp_path / "both").exists()
