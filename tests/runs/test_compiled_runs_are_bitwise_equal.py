"""`deterministic: true` with torch.compile and several ranks: cold and warm caches, killed or not, the same bytes."""

import warnings
from pathlib import Path

import pytest

from tests.services import Services, both, served_by
from tests.slurm_cluster import until
from tests.trainer import TINY, Hook, at_step, fingerprint, kill_self, losses, published, send_self, train

WORDS = [
    *TINY,
    "steps=6",
    "checkpoint.dump.every=2",
    "checkpoint.dump.keep=-1",
    "distributed.compile=true",
    "distributed.selective_activation_checkpointing=true",
    "distributed.timeout_s=900",  # one rank may compile for long while the other waits
]


def lenient(then: Hook = lambda rank: None) -> Hook:
    """Hook: Inductor may warn of what torch itself does not use any more."""

    def hook(rank: int) -> None:
        warnings.simplefilter("ignore")
        then(rank)

    return hook


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("layout", [pytest.param("fsdp_type=full_shard", marks=pytest.mark.gate), "tp_size=2"])
def test_two_ranks_compiled_and_spread(tmp_path: Path, shm: Path, layout: str):
    """The calm run compiles and saves synchronously. The other one finds the code, saves in the background, is killed
    and then asked to stop."""
    words = [*WORDS, f"distributed.{layout}", f"distributed.compile_cache={tmp_path / 'compiled'}"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    result = train([*words, f"dump_dir={calm}"], 2, lenient())
    assert result.exit_code == 0, result.output
    assert any((tmp_path / "compiled").glob("torch-*/inductor/fxgraph/*")), "nothing was kept"

    words += [f"dump_dir={killed}", "checkpoint.async_save_mode=shm", f"checkpoint.shm_path={shm}"]

    def kill_when_published() -> None:
        until(lambda: published(killed) == [2], "the first checkpoint")
        kill_self()

    with Services() as services:
        codes = train(words, 2, both(lenient(at_step(3, kill_when_published)), served_by(services))).exit_codes
    assert -9 in codes
    for hook, exit_code in ((at_step(3, send_self("SIGTERM")), 75), (lambda rank: None, 0)):
        with Services() as services:
            result = train(words, 2, both(lenient(hook), served_by(services)))
        assert result.exit_code == exit_code, result.output
    assert losses(killed) == losses(calm)
    assert [fingerprint(killed, step) for step in (2, 4, 6)] == [fingerprint(calm, step) for step in (2, 4, 6)]
