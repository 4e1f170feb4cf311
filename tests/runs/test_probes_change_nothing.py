"""A probed run is bit for bit the run without probes, and says what it saw in `probe.jsonl`."""

from pathlib import Path

import pytest

from lingua.run.metrics import read_metrics
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, train

WORDS = [*TINY, "steps=6", "data.batch_size=1"]
SHARDED = [
    "grad_acc_steps=2",
    "distributed.fsdp_type=full_shard",
    "distributed.selective_activation_checkpointing=true",
]


@pytest.mark.soak
def test_killed_and_resumed(tmp_path: Path):
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    assert train([*WORDS, f"dump_dir={plain}"]).exit_code == 0
    words = [*WORDS, "probe_freq=2", "checkpoint.dump.every=3", f"dump_dir={probed}"]
    assert train(words, hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train(words).exit_code == 0
    assert losses(plain) == losses(probed)
    assert fingerprint(plain, 6) == fingerprint(probed, 6)
    assert not (plain / "probe.jsonl").exists()

    records = read_metrics(probed / "probe.jsonl")
    assert [(record["global_step"], record["incarnation"]) for record in records] == [(2, 1), (4, 1), (4, 2), (6, 2)]
    second, before, again, last = ({k: v for k, v in r.items() if k.startswith("probe/")} for r in records)
    assert before == again
    assert second.keys() == last.keys()
    gradient = "probe/layers.1.attention.wq/grad/rms"
    assert len({each[gradient] for each in (second, before, last)}) == 3


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # torch's own, while its compiler traces
@pytest.mark.parametrize(
    ("n_ranks", "words"),
    [
        (1, ["data.doc_mask=true", "distributed.model_dtype=bf16"]),
        (1, ["distributed.full_activation_checkpointing=true"]),
        pytest.param(2, SHARDED, marks=pytest.mark.ranks),
        pytest.param(2, [*SHARDED, "distributed.compile=true"], marks=pytest.mark.ranks),
    ],
)
def test_in_every_layout(tmp_path: Path, n_ranks: int, words: list[str]):
    for name, more in (("plain", []), ("probed", ["probe_freq=2"])):
        result = train([*WORDS, *words, *more, f"dump_dir={tmp_path / name}"], n_ranks)
        assert result.exit_code == 0, result.output
    assert losses(tmp_path / "plain") == losses(tmp_path / "probed")
    assert fingerprint(tmp_path / "plain", 6) == fingerprint(tmp_path / "probed", 6)
    assert [record["global_step"] for record in read_metrics(tmp_path / "probed" / "probe.jsonl")] == [2, 4, 6]
