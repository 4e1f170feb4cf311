"""A run that continues a prompt while it trains is bit for bit the run that does not, and keeps what it wrote."""

from pathlib import Path

import pytest

from lingua.run.metrics import SAMPLES_FILE, read_metrics
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, train

WORDS = [*TINY, "steps=6", "data.batch_size=1"]
SAMPLES = ["sample_prompt=def ", "sample_every=2"]
SHARDED = ["distributed.fsdp_type=full_shard"]


@pytest.mark.soak
@pytest.mark.gate
def test_killed_and_resumed(tmp_path: Path):
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    assert train([*WORDS, f"dump_dir={plain}"]).exit_code == 0
    words = [*WORDS, *SAMPLES, "checkpoint.dump.every=3", f"dump_dir={sampled}"]
    assert train(words, hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train(words).exit_code == 0
    assert losses(plain) == losses(sampled)
    assert fingerprint(plain, 6) == fingerprint(sampled, 6)
    found = read_metrics(sampled / SAMPLES_FILE)
    assert [(r["global_step"], r["incarnation"]) for r in found] == [(2, 1), (4, 1), (4, 2), (6, 2)]
    assert [r["text"] for r in found[1:2]] == [r["text"] for r in found[2:3]]
    assert all(r["prompt"] == "def " and r["text"] for r in found)
    assert not (plain / SAMPLES_FILE).exists()


@pytest.mark.soak
@pytest.mark.ranks
def test_every_layout_writes_the_same(tmp_path: Path):
    words = [*TINY, "steps=3", "data.batch_size=1", "global_batch_size=2", "model.vocab_size=260"]
    layouts = {
        "one": (1, SAMPLES),
        "tensor": (2, ["distributed.tp_size=2", *SAMPLES]),
        "sharded": (2, [*SHARDED, *SAMPLES]),
        "plain": (2, SHARDED),
    }
    for name, (n_ranks, more) in layouts.items():
        result = train([*words, *more, f"dump_dir={tmp_path / name}"], n_ranks)
        assert result.exit_code == 0, result.output
    one, tensor, sharded = (
        [(r["global_step"], r["text"]) for r in read_metrics(tmp_path / name / SAMPLES_FILE)]
        for name in ("one", "tensor", "sharded")
    )
    assert one == tensor == sharded
    assert [step for step, _ in one] == [2, 3]
    assert losses(tmp_path / "plain") == losses(tmp_path / "sharded")
