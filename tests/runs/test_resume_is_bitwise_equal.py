"""Killed anywhere and started again, a run ends with the very bytes of the run that nobody disturbed."""

from pathlib import Path

import pytest

from lingua.files import Files
from tests.trainer import TINY, Hook, at_step, fingerprint, kill_self, losses, published, train

N_STEPS = 12
WORDS = [*TINY, f"steps={N_STEPS}", "checkpoint.dump.every=4", "checkpoint.dump.keep=-1", "grad_acc_steps=2"]


def kill_during_save_of(step: int, operation: int) -> Hook:
    """Hook: die at the n-th operation on the disk after update `step`."""

    def hook(rank: int) -> None:
        seen = {"step": False, "operations": 0}

        def arm() -> None:
            seen["step"] = True

        at_step(step, arm)(rank)
        for name in ("create", "write", "fsync", "fsync_dir", "rename", "link"):
            real = getattr(Files, name)

            def counted(self: Files, *args: object, _real=real):
                if seen["step"]:
                    seen["operations"] += 1
                    if seen["operations"] == operation:
                        kill_self()
                return _real(self, *args)

            setattr(Files, name, counted)

    return hook


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    result = train([*WORDS, f"dump_dir={run_dir}"])
    assert result.exit_code == 0, result.output
    assert published(run_dir) == [4, 8, 12]
    return run_dir


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(at_step(1, kill_self), id="before the first checkpoint", marks=pytest.mark.soak),
        pytest.param(at_step(7, kill_self), id="between two checkpoints"),
        pytest.param(at_step(8, kill_self), id="just before a save", marks=pytest.mark.soak),
        pytest.param(kill_during_save_of(8, 3), id="early in a save", marks=pytest.mark.soak),
        pytest.param(kill_during_save_of(8, 12), id="late in a save", marks=pytest.mark.soak),
        pytest.param(kill_during_save_of(12, 5), id="in the last save", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("load_async", ["true", pytest.param("false", marks=pytest.mark.soak)])
def test_a_killed_run_ends_as_the_undisturbed_one(undisturbed: Path, tmp_path: Path, kill: Hook, load_async: str):
    words = [*WORDS, f"dump_dir={tmp_path}", f"data.load_async={load_async}"]
    assert train(words, hook=kill).exit_codes == [-9]
    result = train(words)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path) == losses(undisturbed)
    for step in published(tmp_path):
        assert fingerprint(tmp_path, step) == fingerprint(undisturbed, step)
    assert published(tmp_path)[-1] == N_STEPS


@pytest.mark.soak
def test_killed_again_and_again(undisturbed: Path, tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    for step in (2, 5, 6, 9, 11):
        assert train(words, hook=at_step(step, kill_self)).exit_codes == [-9]
    assert train(words).exit_code == 0
    assert fingerprint(tmp_path, N_STEPS) == fingerprint(undisturbed, N_STEPS)


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["no_shard", pytest.param("full_shard", marks=pytest.mark.gate)])
def test_two_ranks_of_which_one_is_killed(tmp_path: Path, layout: str):
    words = [*WORDS, f"distributed.fsdp_type={layout}", "grad_acc_steps=1"]
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    assert train([*words, f"dump_dir={calm}"], n_ranks=2).exit_code == 0
    codes = train([*words, f"dump_dir={disturbed}"], n_ranks=2, hook=at_step(6, kill_self, on_rank=1)).exit_codes
    assert codes[1] == -9
    assert codes[0] != 0  # it notices
    result = train([*words, f"dump_dir={disturbed}"], n_ranks=2)
    assert result.exit_code == 0, result.output
    assert fingerprint(disturbed, N_STEPS) == fingerprint(calm, N_STEPS)
    assert losses(disturbed) == losses(calm)
