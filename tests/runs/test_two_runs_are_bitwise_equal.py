"""`deterministic: true`: the same config twice gives the same bytes."""

from pathlib import Path

import pytest

from tests.trainer import TINY, fingerprint, losses, train

WORDS = [*TINY, "steps=6"]


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=[pytest.mark.ranks, pytest.mark.soak])])
def test_two_runs_end_with_the_same_bytes(tmp_path: Path, n_ranks: int):
    for name in ("one", "two"):
        assert train([*WORDS, f"dump_dir={tmp_path / name}"], n_ranks).exit_code == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert fingerprint(tmp_path / "one", 6) == fingerprint(tmp_path / "two", 6)


@pytest.mark.soak
@pytest.mark.parametrize(
    "key", ["seed", *(pytest.param(key, marks=pytest.mark.soak) for key in ("model.seed", "data.seed"))]
)
def test_another_seed_is_another_run(tmp_path: Path, key: str):
    for name, seed in (("one", 1), ("two", 2)):
        assert train([*WORDS, f"dump_dir={tmp_path / name}", f"{key}={seed}"]).exit_code == 0
    assert losses(tmp_path / "one") != losses(tmp_path / "two")


@pytest.mark.soak
def test_what_has_no_say_in_the_numbers_changes_no_byte(tmp_path: Path):
    """Workers, prefetch, logging and checkpoint periods."""
    variants = {
        "plain": ["data.load_async=false"],
        "workers": ["data.num_workers=2", "data.prefetch_size=3"],
        "periods": ["logging.freq=4", "checkpoint.dump.every=2", "gc_collect_freq=1", "validation.every=2"],
    }
    for name, words in variants.items():
        assert train([*WORDS, f"dump_dir={tmp_path / name}", *words]).exit_code == 0
    facts = [fingerprint(tmp_path / name, 6) for name in variants]
    assert facts[0] == facts[1] == facts[2]
