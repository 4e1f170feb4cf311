"""Runs of every model family: killed, resumed, sharded, compiled, evaluated and asked for text as a Llama is."""

from pathlib import Path

import pytest

from apps.main.eval import main as evaluate
from apps.main.generate import main as generate
from lingua.report.facts import read_run
from lingua.report.history import read_history
from lingua.report.page import report_page
from lingua.run.lock import this_process
from lingua.run.metrics import read_metrics
from tests.runs.test_replay import replay
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, published, train

MODELS: dict[str, list[str]] = {
    "mamba2": ["model.type=mamba2", "model.state_dim=8", "model.conv_size=4", "model.multiple_of=32"],
    "mingru": ["model.type=mingru", "model.conv_size=4", "model.multiple_of=32"],
    "minlstm": ["model.type=minlstm", "model.conv_size=4", "model.multiple_of=32"],
    "hawk": ["model.type=hawk", "model.conv_size=4", "model.multiple_of=32"],
    "mlstm": ["model.type=mlstm", "model.chunk_size=8"],
    "mlstm_v0": ["model.type=mlstm_v0", "model.chunk_size=8"],
    "slstm": ["model.type=slstm"],
    "mtp": ["model.type=mtp", "model.n_future_head=3", "data.n_views=4"],
    "masked diffusion": ["loss.type=masked_diffusion", "loss.samples=2"],
    "hybrid": [
        "model.type=hybrid",
        "model.layers=[attention,mamba2]",
        "model.blocks={mamba2: {state_dim: 8, multiple_of: 32}}",
    ],
}
IN_EVERY_GATE = ("mamba2",)
families = pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[pytest.mark.soak, *([pytest.mark.gate] if name in IN_EVERY_GATE else [])])
        for name, words in MODELS.items()
    ],
    ids=MODELS.keys(),
)


def words_of(model: list[str], run_dir: Path) -> list[str]:
    """Words of a run of six steps."""
    return [*TINY, *model, "steps=6", "checkpoint.dump.every=2", "data.doc_mask=true", f"dump_dir={run_dir}"]


@families
def test_killed_and_resumed_it_is_bitwise_equal_and_can_be_used(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    result = train(words_of(words, calm))
    assert result.exit_code == 0, result.output
    assert train(words_of(words, killed), hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train(words_of(words, killed)).exit_code == 0
    assert published(killed)[-1] == 6
    assert fingerprint(killed, 6) == fingerprint(calm, 6)
    assert losses(killed) == losses(calm)

    capfd.readouterr()
    assert evaluate([f"ckpt={calm}", "validation.max_steps=1", "--json"]) == 0
    assert "documents/python_stdlib/bpb" in capfd.readouterr().out
    assert generate([f"ckpt={calm}", "prompt=import ", "max_gen_len=5", "temperature=0"]) == 0
    assert capfd.readouterr().out.startswith("import ")


@pytest.mark.soak
@pytest.mark.ranks
@families
def test_sharded_with_muon_and_probes_it_trains_as_on_one_rank(words: list[str], tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["optim.type=muon", "probe_freq=3"]
    assert train([*words_of(words, one), *more, "data.batch_size=4"]).exit_code == 0
    sharded = ["distributed.fsdp_type=full_shard", "distributed.full_activation_checkpointing=true"]
    result = train([*words_of(words, two), *more, *sharded, "data.batch_size=2"], n_ranks=2)
    assert result.exit_code == 0, result.output
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert len(read_metrics(two / "probe.jsonl")) == 2


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # torch's own, while its compiler traces
@families
def test_compiled_it_trains_as_eager_and_bitwise_again(words: list[str], tmp_path: Path):
    eager, compiled, again = (tmp_path / name for name in ("eager", "compiled", "again"))
    assert train(words_of(words, eager)).exit_code == 0
    for run_dir in (compiled, again):
        result = train([*words_of(words, run_dir), "distributed.compile=true"])
        assert result.exit_code == 0, result.output
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    assert fingerprint(compiled, 6) == fingerprint(again, 6)


@pytest.mark.ranks
@pytest.mark.soak
def test_multi_token_prediction_splits_its_heads_over_ranks(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = MODELS["mtp"]
    assert train(words_of(words, one)).exit_code == 0
    result = train([*words_of(words, two), "distributed.tp_size=2"], n_ranks=2)
    assert result.exit_code == 0, result.output
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for record, on_one in zip(read_metrics(two / "metrics.jsonl"), read_metrics(one / "metrics.jsonl"), strict=True):
        heads = [record[f"loss/head_{i}"] for i in range(3)]
        assert heads == pytest.approx([on_one[f"loss/head_{i}"] for i in range(3)], rel=1e-4)
        assert sum(heads) == pytest.approx(record["loss/out"], rel=1e-6)
    _, pictures = report_page([read_history(read_run(one), this_process())])
    assert "heads" in [picture.key for picture in pictures]
    rows = replay(one, 6)["rows"]
    assert sum(row["loss"] for row in rows) / len(rows) == pytest.approx(losses(one)[6], rel=1e-4)


def test_tensor_parallelism_is_refused_where_no_rule_exists(tmp_path: Path):
    result = train([*words_of(MODELS["mamba2"], tmp_path), "distributed.tp_size=2"], n_ranks=1)
    assert result.exit_code == 2
