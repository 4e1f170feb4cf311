"""Save and load of real models: bitwise on any number of ranks, stock torch opens it, faults cost one checkpoint."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lingua.checkpoint import dcp, layout, publish
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState, tensors_of
from lingua.checkpoint.verified import pieces_of
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.config.keys.optim import AdamWArgs
from lingua.files import DISK, Buffer, DiskError, Files, RunError, write_json
from lingua.optim.adamw import build_adamw
from lingua.run.failure import KINDS, classify
from lingua.run.lock import OvertakenError, RunLock
from tests.fakes import At, Clock, FaultyFiles
from tests.ranks import run_on_ranks
from tests.tiny import DIM, VOCAB, TinyLM, assert_equal, make, snapshot, train


def args(every: int = 1, keep: int = 0) -> CheckpointArgs:
    return CheckpointArgs(dump=SaveEvery(every=every, keep=keep), eval=SaveEvery(every=0))


def manager_of(run_dir: Path, files: Files = DISK, keep: int = 0) -> CheckpointManager:
    return CheckpointManager(args(keep=keep), run_dir, files=files, sleep=lambda seconds: None)


def left_behind(root: Path) -> list[Path]:
    """What lies in the staging_dirs of a run's starts."""
    return [path for _, staging_dir in layout.staging_dirs(root) for path in staging_dir.iterdir()]


def saved_run(run_dir: Path, *steps: int) -> TrainState:
    """A run with checkpoints at these steps; returns its state after the last."""
    state = make()
    manager = manager_of(run_dir)
    before = 0
    for step in steps:
        train(state, before + 1, step)
        assert manager.save(step, state).published
        before = step
    return state


def resumed(run_dir: Path) -> TrainState:
    """The state of the newest checkpoint."""
    manager, state = manager_of(run_dir), make()
    newest = manager.latest()
    assert newest is not None
    manager.load(newest, state)
    return state


# -- equality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_training_equals_uninterrupted(tmp_path: Path, tied: bool) -> None:
    state = make(tied)
    manager = manager_of(tmp_path)
    manager.prepare(state)  # creates the optimizer's state before the first step; must leave no trace
    train(state, 1, 3)
    assert manager.save(3, state).published
    train(state, 4, 5)

    plain = make(tied)
    train(plain, 1, 5)
    assert_equal(snapshot(plain), snapshot(state))

    resumed = make(tied)
    again = manager_of(tmp_path)
    assert again.latest() == 3
    again.load(3, resumed)
    assert resumed.shared == {"step": 3}
    train(resumed, 4, 5)
    assert_equal(snapshot(plain), snapshot(resumed))


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("tied", [False, True])
def test_save_on_any_ranks_load_on_any_ranks(tmp_path: Path, tied: bool) -> None:
    def save(rank: int, n: int) -> dict[str, Tensor]:
        state = make(tied, shard=n > 1, name="run")
        state.per_rank = {"data": f"{rank} of {n}"}
        train(state, 1, 2)
        with torch.no_grad():
            state.model(torch.zeros(1, 1, dtype=torch.int64))  # FSDP leaves the root's weights gathered
        report = manager_of(tmp_path / f"by{n}").save(2, state)
        assert report.published
        assert report.size_bytes > 0
        return snapshot(state)

    def load(rank: int, n: int, saved_by: int) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        state = make(tied, shard=n > 1)
        manager = manager_of(tmp_path / f"by{saved_by}")
        assert manager.latest() == 2
        manager.load(2, state)
        assert state.optimizer.param_groups[0]["lr"] == 0.02
        assert state.shared == {"name": "run", "step": 2}
        return snapshot(state), state.per_rank_all

    saved = {n: run_on_ranks(lambda rank, n=n: save(rank, n), n)[0] for n in (1, 2, 3)}
    for loaded_by in (1, 2, 3):
        for of_rank in run_on_ranks(lambda rank, n=loaded_by: {m: load(rank, n, m) for m in saved}, loaded_by):
            for saved_by, (result, per_rank_all) in of_rank.items():
                assert_equal(saved[saved_by], result)
                assert per_rank_all == [{"data": f"{rank} of {saved_by}"} for rank in range(saved_by)]


def test_rng_continues(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    state = make()
    np.random.seed(5)
    np.random.randn()  # leaves half of a pair behind
    random.gauss(0, 1)
    manager_of(tmp_path).save(1, state)
    expected = draw()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    manager_of(tmp_path).load(1, make())
    assert draw() == expected


def test_other_world_size_seeds_from_seed_step_and_rank(tmp_path: Path) -> None:
    run_on_ranks(lambda rank: manager_of(tmp_path).save(4, make(step=4)), 2)

    def draw(seed: int) -> float:
        state = make()
        state.seed = seed
        manager_of(tmp_path).load(4, state)
        assert state.per_rank == {}
        return torch.rand(()).item()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_changed_config_wins_and_the_schedule_is_restored(tmp_path: Path) -> None:
    state = make()
    train(state, 1, 3)
    manager_of(tmp_path).save(3, state)
    other = make()
    for group in other.optimizer.param_groups:
        group["weight_decay"] = 0.5
    other = TrainState(other.model, other.optimizer)
    manager_of(tmp_path).load(3, other)
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.5, 0.5]
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.03, 0.03]
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(("saved", "wanted"), [("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_moments_of_one_type_are_loaded_as_another(tmp_path: Path, saved: str, wanted: str) -> None:
    def state_of(state_dtype: str) -> TrainState:
        model = make().model
        args = AdamWArgs.model_validate({"state_dtype": state_dtype})
        return TrainState(model, build_adamw(args, model.named_parameters()))

    first, second = state_of(saved), state_of(wanted)
    train(first, 1, 3)
    manager_of(tmp_path).save(3, first)
    manager_of(tmp_path).load(3, second)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    expected = {
        name: tensor.to(dtype) if "exp_avg" in name else tensor for name, tensor in tensors_of(first).by_name.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(second).by_name.items())
    assert tensors_of(second).by_name.keys() == expected.keys()


def test_another_run_is_continued(tmp_path: Path) -> None:
    first = saved_run(tmp_path / "first", 1, 2)
    manager = manager_of(tmp_path / "second")
    state = make()
    assert manager.load_from(f"{tmp_path / 'first'}@2", state).name == "0000000002"
    assert_equal(snapshot(first), snapshot(state))
    assert manager.latest() is None
    flip(layout.folder(tmp_path / "first" / layout.CHECKPOINTS, 2) / layout.optim_file(0))
    assert manager.load_from(tmp_path / "first", make()).name == "0000000001"
    with pytest.raises(RunError, match=r"does not verify: optim\.00000\.distcp"):
        manager.load_from(f"{tmp_path / 'first'}@2", make())
    with pytest.raises(RunError, match="is not a run: it has no config"):
        manager.load_from(tmp_path, make())
    without = make()
    manager.load_from(f"{tmp_path / 'first'}@2", without, optimizer=False)  # its file is not read
    found = snapshot(without)
    assert all(torch.equal(found[n], tensor) for n, tensor in snapshot(first).items() if n.startswith("model."))


def test_another_runs_files_are_read_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "first", 1)
    opened: list[str] = []

    def noted(path: Path, *args: Any, **more: Any) -> Iterator[memoryview]:
        opened.append(path.name)
        return pieces_of(path, *args, **more)

    for module in ("restore", "publish", "verified"):
        monkeypatch.setattr(f"lingua.checkpoint.{module}.pieces_of", noted)
    manager_of(tmp_path / "second").load_from(tmp_path / "first", make())
    assert sorted(name for name in opened if name.endswith(layout.TENSORS)) == [
        layout.model_file(0), layout.optim_file(0),
    ]  # fmt: skip


@pytest.mark.ranks
def test_replicas_of_shards_are_written_once(tmp_path: Path) -> None:
    def save(rank: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = TinyLM(tied=True)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model, mesh=mesh)
        state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        train(state, 1, 2)
        report = manager_of(tmp_path).save(2, state)
        n_values = sum(p.numel() for p in model.parameters())
        assert 3 * 4 * n_values < report.size_bytes
        return snapshot(state)

    expected = run_on_ranks(save, 4)[0]
    root = tmp_path / layout.CHECKPOINTS
    described = dcp.tensor_properties(layout.folder(root, 2))
    assert described["model.output.weight"] == ((VOCAB, DIM), torch.float32)
    torch.manual_seed(1)
    model = TinyLM(tied=True)
    state = TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))
    manager_of(tmp_path).load(2, state)
    assert_equal(expected, snapshot(state))
    indices = pickle.loads((layout.folder(root, 2) / layout.METADATA).read_bytes()).storage_data
    places = {(place.relative_path, place.offset) for place in indices.values()}
    aliases = sum(index.fqn == "model.output.weight" for index in indices)
    assert len(places) == len(indices) - aliases


# -- stock torch -------------------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_stock_torch_opens_it(tmp_path: Path, tied: bool) -> None:
    def save(rank: int) -> dict[str, Tensor]:
        state = make(tied, shard=True)
        train(state, 1, 2)
        manager_of(tmp_path).save(2, state)
        return snapshot(state)

    expected = run_on_ranks(save, 3)[0]
    folder = layout.folder(tmp_path / layout.CHECKPOINTS, 2)

    fresh = make(tied)
    loaded = {"model": fresh.model.state_dict()}
    stock.load(loaded, checkpoint_id=folder, no_dist=True)
    fresh.model.load_state_dict(loaded["model"])
    assert_equal({n: t for n, t in expected.items() if n in loaded["model"]}, snapshot(fresh))

    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    converted = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert set(converted) == {"model", "optim"}
    for name, tensor in converted["model"].items():
        assert torch.equal(tensor, expected[name])
    for name, slots in converted["optim"]["state"].items():
        for key, tensor in slots.items():
            assert torch.equal(tensor, expected[f"{name}.{key}"])


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        run_dir = tmp_path / str(tied)
        manager_of(run_dir).save(1, make(tied))
        sizes[tied] = (layout.folder(run_dir / layout.CHECKPOINTS, 1) / layout.model_file(0)).stat().st_size
    assert sizes[False] - sizes[True] > VOCAB * DIM * 4


def test_metadata_is_constant(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    root = tmp_path / layout.CHECKPOINTS
    first, second = ((layout.folder(root, step) / layout.METADATA).read_bytes() for step in (1, 2))
    assert first == second


# -- damage ------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = [layout.model_file(0), layout.optim_file(0), layout.train_state_file(0), layout.METADATA, layout.MANIFEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_damage_is_set_aside_and_the_older_one_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    saved_run(tmp_path, 1, 2)
    root = tmp_path / layout.CHECKPOINTS
    result = layout.evaluation(tmp_path, 2) / "results.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    harm(layout.folder(root, 2) / name)
    manager = manager_of(tmp_path)
    assert manager.latest() == 1
    assert name in caplog.text
    assert layout.done_steps(root) == [1]
    assert (root / "0000000002.broken-1").is_dir()
    assert (root / "checkpoint_0000000002.done.broken-1").exists()
    assert (tmp_path / "evals" / "0000000002.broken-1" / "results.json").exists()
    state = make()
    manager.load(1, state)
    train(state, 2, 2)
    assert manager.save(2, state).published  # its place is free again


def test_a_damaged_mark_is_set_aside(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    layout.done_mark(tmp_path / layout.CHECKPOINTS, 2).write_text("{")
    assert manager_of(tmp_path).latest() == 1


def test_when_nothing_is_intact_a_person_decides(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    flip(layout.folder(tmp_path / layout.CHECKPOINTS, 1) / layout.model_file(0))
    with pytest.raises(RunError, match=r"none of the checkpoints \[1\] .* verifies"):
        manager_of(tmp_path).latest()
    assert manager_of(tmp_path).latest() is None  # started again: from step 0


@pytest.mark.ranks
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["checkpoint_0000000002.done", "manifest.json", "run_id", "train_state.00000.json"])
def test_a_read_that_fails_names_the_file_and_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    saved_run(tmp_path, 1, 2)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def fail(path: Path) -> bytes:
        if path.name == name:
            raise OSError(number, os.strerror(number))  # as read(2) fails: without a name
        return read(path)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DiskError, match=rf"{os.strerror(number)}.*{re.escape(name)}") as caught:
        resumed(tmp_path)
    assert (caught.value.errno, classify(caught.value)) == (number, "disk")
    left = sorted(path.name for path in tmp_path.rglob("*") if "incarnation" not in path.name)
    assert left == [other for other in before if "incarnation" not in other]


def test_all_ranks_fall_back_to_the_same_step(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    flip(layout.folder(tmp_path / layout.CHECKPOINTS, 2) / layout.optim_file(0))
    assert run_on_ranks(lambda rank: manager_of(tmp_path).latest(), 3) == [1, 1, 1]


def test_an_older_step_sets_later_ones_aside(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2, 3)
    manager = manager_of(tmp_path)
    manager.load(1, make())
    root = tmp_path / layout.CHECKPOINTS
    assert layout.done_steps(root) == [1]
    assert (root / "0000000003.later-1").is_dir()
    with pytest.raises(RunError, match=r"no checkpoint of step 2; it has \[1\]"):
        manager.load(2, make())


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    other = make()
    other.model.layers["2"] = nn.Linear(DIM, DIM)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    with pytest.raises(RunError, match=r"model\.layers\.2\.weight is missing"):
        manager_of(tmp_path).load(1, TrainState(other.model, other.optimizer))
    del other.model.layers["2"], other.model.layers["1"]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    kept = torch.optim.AdamW(other.model.parameters(), lr=0.0)
    with pytest.raises(RunError, match=r"do not have: model\.layers\.1\.bias"):
        manager_of(tmp_path).load(1, TrainState(other.model, kept))


# -- hostile files -------------------------------------------------------------------------------------------------


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


def test_hostile_metadata_is_not_executed(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    witness = tmp_path / "executed"
    folder = layout.folder(tmp_path / layout.CHECKPOINTS, 1)
    (folder / layout.METADATA).write_bytes(pickle.dumps(Touch(witness)))
    with pytest.raises(RunError, match=r"\.metadata is refused"):
        manager_of(tmp_path).load_folder(folder, make())
    assert not witness.exists()


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_failing_disk_costs_one_checkpoint_only(tmp_path: Path) -> None:
    before = saved_run(tmp_path / "first", 1)
    save = manager_of(tmp_path / "first", counting := FaultyFiles(), keep=1).save
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    train(before, 2, 2)
    assert save(2, before).deleted == [1]
    assert counting.n_done > 40
    for fail_at in range(1, counting.n_done + 1):
        run_dir = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "copy", run_dir)
        try:
            faulty = manager_of(run_dir, FaultyFiles(fail_at), keep=1)
        except RunError:  # it was the opening that failed
            faulty = manager_of(run_dir)
        faulty.save(2, before)
        manager = manager_of(run_dir)
        newest = manager.latest()
        assert newest in (1, 2)
        manager.load(newest, state := make())
        assert state.shared["step"] == newest
        assert not left_behind(run_dir / layout.CHECKPOINTS)
        assert not list(run_dir.glob("*/*.broken-*"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errno.ENOSPC, r"checkpoint 2 is lost, older ones are untouched: the disk is full at .*free.*; make room"),
        (errno.EDQUOT, r"the disk quota is used up at"),
        (errno.EIO, r"Input/output error"),
        (errno.EROFS, r"Read-only file system"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: int, sentence: str) -> None:
    state = saved_run(tmp_path, 1)
    manager = manager_of(tmp_path, FaultyFiles(1, error=error, lasting=True, operations=("create", "write")))
    report = manager.save(2, state)
    assert not report.published
    assert report.error is not None
    assert re.search(sentence, report.error)
    with pytest.raises(RunError, match=sentence.replace("checkpoint 2", "checkpoint 3")):
        manager.save(3, state, final=True)
    assert layout.done_steps(tmp_path / layout.CHECKPOINTS) == [1]
    assert not left_behind(tmp_path / layout.CHECKPOINTS)


@pytest.mark.parametrize("error", [errno.EIO, pytest.param(errno.ESTALE, marks=pytest.mark.soak)])
def test_the_last_save_survives_any_one_fault_of_the_disk(tmp_path: Path, error: int) -> None:
    """Each operation fails once in the save that a stop asks for; nothing comes after it but the end of the run."""
    state = saved_run(tmp_path / "first", 1)
    train(state, 2, 2)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    manager = manager_of(tmp_path / "first", counting := FaultyFiles(), keep=1)
    n_opening = counting.n_done
    assert manager.save(2, state, final=True).published
    expected = (layout.folder(tmp_path / "first" / layout.CHECKPOINTS, 2) / layout.MANIFEST).read_bytes()
    for fail_at in range(n_opening + 1, counting.n_done + 1):
        run_dir = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "copy", run_dir)
        files = FaultyFiles(fail_at, error=error)
        assert manager_of(run_dir, files, keep=1).save(2, state, final=True).published, files.log[fail_at - 1]
        again = manager_of(run_dir)
        assert again.latest() == 2
        assert (layout.folder(again.root, 2) / layout.MANIFEST).read_bytes() == expected
        assert not left_behind(again.root)
        assert not list(again.root.glob("*.unmarked-*")), files.log[fail_at - 1]


@pytest.mark.parametrize("lasts", range(1, 4))
def test_the_last_save_survives_a_fault_that_also_hits_the_clearing_away(tmp_path: Path, lasts: int) -> None:
    """The folder has its name when an fsync fails, and the renames that follow fail for a while."""

    class Outage(Files):
        left = 0

        def fsync_dir(self, path: Path) -> None:
            if path.name == layout.CHECKPOINTS and layout.folder(path, 2).exists() and not Outage.left:
                Outage.left = -1
                raise OSError(errno.EIO, "Input/output error", str(path))
            super().fsync_dir(path)

        def rename(self, source: Path, target: Path) -> None:
            if Outage.left < 0 and Outage.left >= -lasts:
                Outage.left -= 1
                raise OSError(errno.EIO, "Input/output error", str(source))
            super().rename(source, target)

    state = saved_run(tmp_path, 1)
    train(state, 2, 2)
    assert manager_of(tmp_path, Outage()).save(2, state, final=True).published
    again = manager_of(tmp_path)
    assert again.latest() == 2
    assert sorted(path.name for path in again.root.iterdir() if "unmarked" in path.name or "broken" in path.name) == []


@pytest.mark.parametrize(
    ("error", "kind", "n_tries"),
    [
        (errno.EIO, "disk", 6),
        (errno.ESTALE, "disk", 6),
        (errno.ETIMEDOUT, "disk", 6),
        (errno.EROFS, "disk", 6),
        (errno.ENOSPC, "disk_full", 1),
        (errno.EDQUOT, "disk_full", 1),
        (errno.EACCES, "setup", 1),
    ],
)
def test_a_disk_that_stays_broken_ends_the_run_as_what_it_is(
    tmp_path: Path, error: int, kind: str, n_tries: int
) -> None:
    files = FaultyFiles(1, error=error, lasting=True, operations=("mkdir",))
    manager = manager_of(tmp_path, files=DISK)
    manager._direct.files = files  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(DiskError) as caught:
        manager.save(1, make(), final=True)
    assert (caught.value.errno, classify(caught.value)) == (error, kind)
    assert files.n_done == n_tries
    assert KINDS[kind].restart_may_help is (n_tries > 1)


@pytest.mark.parametrize(("grace_s", "n_tries"), [(5.0, 1), (5.6, 2), (8.0, 3), (1000.0, 6)])
def test_the_last_save_is_tried_again_only_within_the_grace(tmp_path: Path, grace_s: float, n_tries: int) -> None:
    clock, files = Clock(), FaultyFiles(1, error=errno.EIO, lasting=True, operations=("create",))
    manager = CheckpointManager(args(), tmp_path, files=files, wall_clock=clock.now, sleep=clock.sleep)
    with pytest.raises(DiskError, match="Input/output error"):
        manager.save(1, make(), final=True, deadline_s=clock.now() + grace_s)
    assert files.n_done == n_tries


def test_a_checkpoint_is_there_although_the_folder_cannot_be_listed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager, done_steps = manager_of(tmp_path), layout.done_steps

    def stale(root: Path) -> list[int]:
        raise OSError(errno.ESTALE, "Stale file handle", str(root))

    monkeypatch.setattr(layout, "done_steps", stale)
    assert manager.save(1, make(), final=True).published
    assert "Stale file handle" in caplog.text
    assert done_steps(manager.root) == [1]


@pytest.mark.ranks
def test_a_fault_on_one_rank_keeps_its_errno_on_all(tmp_path: Path) -> None:
    def save(rank: int) -> tuple[bool, int | None, str]:
        once = FaultyFiles(At("fsync ", 1), error=errno.ESTALE) if rank == 1 else DISK
        manager = manager_of(tmp_path, once)
        published = manager.save(1, make(shard=True), final=True).published
        lasting = FaultyFiles(1, error=errno.EIO, lasting=True, operations=("fsync",))
        manager._direct.files = lasting if rank == 1 else DISK  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(DiskError) as caught:
            manager.save(2, make(shard=True), final=True)
        return published, caught.value.errno, classify(caught.value)

    def fails(rank: int) -> str:
        with pytest.raises((RunError, ZeroDivisionError)) as caught:
            manager_of(tmp_path)._ranks.from_main(lambda: 1 // 0)  # pyright: ignore[reportPrivateUsage]
        return classify(caught.value)

    assert run_on_ranks(save, 2) == [(True, errno.EIO, "disk")] * 2
    assert run_on_ranks(fails, 2) == ["bug"] * 2, "a rank that only hears of it must not call it a matter of setup"


@pytest.mark.ranks
def test_one_rank_failing_is_told_to_all(tmp_path: Path) -> None:
    def save(rank: int) -> tuple[str | None, str | None, bool]:
        files = FaultyFiles(5, error=errno.EDQUOT) if rank == 2 else DISK
        state = make(shard=True)
        manager = manager_of(tmp_path, files)
        failed = manager.save(1, state)
        return failed.error, manager.save(2, state).error, manager.has(1)

    for first, second, has_first in run_on_ranks(save, 3):
        assert first is not None
        assert "the disk quota is used up" in first
        assert second is None
        assert not has_first
    assert layout.done_steps(tmp_path / layout.CHECKPOINTS) == [2]


@pytest.mark.ranks
def test_a_bug_on_one_rank_ends_all(tmp_path: Path) -> None:
    def save(rank: int) -> str:
        state = make(shard=True)
        if rank == 1:
            state.per_rank = {"data": object()}
        with pytest.raises(RunError) as caught:
            manager_of(tmp_path).save(1, state)
        return str(caught.value)

    for message in run_on_ranks(save, 2):
        assert "rank 1 failed" in message
        assert "not JSON serializable" in message


def test_too_little_room_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.manager.free_bytes", lambda path: 1000)
    with pytest.raises(
        RunError, match=r"checkpoints take 1 x \d\d\.\d KiB = .* has 1000 B free and 0 B in .*; make room"
    ):
        manager_of(tmp_path).prepare(make())


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"dump_dir: cannot write to .*Not a directory"):
        manager_of(tmp_path / "file")


def test_a_published_step_is_not_written_again(tmp_path: Path) -> None:
    state = saved_run(tmp_path, 1)
    manager = manager_of(tmp_path, FaultyFiles(1))
    assert manager.has(1)
    assert manager.save(1, state, final=True).published


@pytest.mark.parametrize("in_background", [False, True])
def test_retention_runs_after_publishing(tmp_path: Path, in_background: bool) -> None:
    settings = CheckpointArgs(
        dump=SaveEvery(every=2, keep=1), eval=SaveEvery(every=3, keep=1), async_cleanup=in_background
    )
    state = make()
    manager = CheckpointManager(settings, tmp_path)
    assert [step for step in range(8) if manager.is_due(step)] == [2, 3, 4, 6]
    for step in range(8):
        if manager.is_due(step):
            manager.save(step, state)
    manager.close()
    assert layout.done_steps(tmp_path / layout.CHECKPOINTS) == [6]


def test_metrics(tmp_path: Path) -> None:
    clock = [1000.0]
    manager = CheckpointManager(args(), tmp_path, now=lambda: clock[0])
    clock[0] += 5
    assert manager.metrics()["checkpoint/lost_work_at_risk_s"] == 5.0
    manager.save(1, make())
    clock[0] += 2
    found = manager.metrics()
    assert found["checkpoint/age_of_newest_done_s"] == found["checkpoint/lost_work_at_risk_s"] == 2.0
    assert found["checkpoint/stall_s"] > 0
    assert found["checkpoint/drain_gb_per_s"] > 0
    assert found["checkpoint/synchronous"] == 1.0


def test_an_overtaken_start_does_not_publish(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with lock:
        manager = CheckpointManager(args(), tmp_path, lock=lock)
        assert manager.attempt == 1
        manager.save(1, make())
        write_json(tmp_path / "incarnations" / "0000000002.json", {})
        with pytest.raises(RunError, match="attempt 2 of this run has taken over"):
            manager.save(2, make())
    assert layout.done_steps(tmp_path / layout.CHECKPOINTS) == [1]


@pytest.mark.ranks
def test_an_overtaken_start_is_told_also_when_its_write_fails_first(tmp_path: Path) -> None:
    """Its staging dir is gone, so the disk's error comes first; training on with it would be in vain."""

    def save(rank: int) -> tuple[str, str]:
        lock = RunLock(tmp_path) if rank == 0 else None
        if lock is not None:
            lock.acquire()
        manager = CheckpointManager(args(), tmp_path, lock=lock)
        assert manager.save(1, make()).published
        if rank == 0:
            write_json(tmp_path / "incarnations" / "0000000002.json", {})
            publish.open_staging_dir(tmp_path / layout.CHECKPOINTS, 2)
        with pytest.raises(RunError) as caught:
            manager.save(2, make(), final=True)
        return classify(caught.value), str(caught.value)

    for kind, why in run_on_ranks(save, 2):
        assert kind == "occupied"
        assert "attempt 2 of this run has taken over" in why
    assert layout.done_steps(tmp_path / layout.CHECKPOINTS) == [1]


def test_a_start_that_was_overtaken_while_it_began_saves_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        write_json(tmp_path / "incarnations" / "0000000002.json", {})
        with pytest.raises(OvertakenError, match="attempt 2 of this run has taken over"):
            CheckpointManager(args(), tmp_path, lock=lock)


def test_two_runs_do_not_share_a_folder_of_checkpoints(tmp_path: Path) -> None:
    shared = args().model_copy(update={"path": str(tmp_path / "shared")})
    with RunLock(tmp_path / "a") as lock:
        assert CheckpointManager(shared, tmp_path / "a", lock=lock).save(1, make()).published
    with (
        RunLock(tmp_path / "b") as lock,
        pytest.raises(RunError, match=r"shared holds the checkpoints of another run, .*/a;"),
    ):
        CheckpointManager(shared, tmp_path / "b", lock=lock)


def test_readback_reads_what_the_disk_holds(tmp_path: Path) -> None:
    class LyingFiles(Files):
        def write(self, descriptor: int, data: Buffer) -> None:
            super().write(descriptor, bytes(reversed(bytes(data))))

    trusting = CheckpointManager(CheckpointArgs(), tmp_path / "trusting", files=LyingFiles())
    assert trusting.save(1, make()).published
    checking = CheckpointManager(CheckpointArgs(verify="readback"), tmp_path / "checking", files=LyingFiles())
    report = checking.save(1, make())
    assert not report.published
    assert "returned something else" in str(report.error)


def test_a_disk_without_inodes_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saved_run(tmp_path, 1)
    monkeypatch.setattr("lingua.checkpoint.publish.is_short_of_inodes", lambda path: True)
    report = manager_of(tmp_path, FaultyFiles(1, error=errno.ENOSPC, lasting=True, operations=("create",))).save(
        2, state
    )
    assert report.error is not None
    assert "the disk has no inodes left at" in report.error
    assert "full" not in report.error
