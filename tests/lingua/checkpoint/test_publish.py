"""The publish protocol without torch: killed or failing at every single operation, nothing published is ever bad."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from lingua.checkpoint import layout, publish, retention
from lingua.checkpoint.publish import DamagedError
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.files import DISK, Files, RunError, read_json, write_json
from tests.fakes import NEEDS_ROOM, OPERATIONS, FaultyFiles, FrozenFiles, KillFiles
from tests.ranks import exit_code_of

NAMES = ("model.00000.distcp", "optim.00000.distcp", "train_state.00000.json")
KEEP_ONE = CheckpointArgs(dump=SaveEvery(every=1, keep=1), eval=SaveEvery(every=0))


@pytest.fixture
def tmp_path(shm: Path) -> Path:
    """In memory: thousands of fsyncs cost nothing there."""
    return shm


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step} ".encode() * 20


def write(root: Path, step: int, attempt: int, files: Files) -> None:
    folder = layout.coming(layout.folder(root, step), attempt)
    files.mkdir(folder)
    facts = {name: publish.write_hashed(folder / name, [content(step, name)], files=files) for name in NAMES}
    publish.publish(root, step, attempt, facts, files=files)


def retain(root: Path, attempt: int, files: Files) -> None:
    done = layout.done_steps(root)
    for step in retention.to_delete(done, KEEP_ONE, verified=done[-1:]):
        publish.retire(root, step, attempt, files=files)


def one_start(run_dir: Path, step: int, attempt: int, files: Files) -> None:
    """What a start does with checkpoints: clear, set damaged ones aside, save, let go of old ones."""
    root = run_dir / layout.CHECKPOINTS
    files.mkdir(root)
    publish.open_staging_dir(root, attempt, files=files)
    for found in layout.done_steps(root):
        if not intact(root, found):
            publish.set_aside(run_dir, root, found, "broken", files=files)
    if step not in layout.done_steps(root):
        write(root, step, attempt, files)
    retain(root, attempt, files)


def intact(root: Path, step: int) -> bool:
    try:
        return not publish.damage(layout.folder(root, step), publish.read_marked_manifest(root, step))
    except DamagedError:
        return False


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def run_with(run_dir: Path, *steps: int) -> Path:
    """A run with these checkpoints, all kept; returns their folder."""
    root = run_dir / layout.CHECKPOINTS
    root.mkdir(parents=True)
    publish.open_staging_dir(root, 1)
    for step in steps:
        write(root, step, 1, DISK)
    return root


def started(root: Path, attempt: int = 1) -> Path:
    publish.open_staging_dir(root, attempt)
    return root


def damaged_newest(run_dir: Path) -> Path:
    """A run with steps 1 and 2, of which 2 is damaged and has been evaluated."""
    root = run_with(run_dir, 1, 2)
    (layout.folder(root, 2) / NAMES[0]).write_bytes(b"x")
    layout.evaluation(run_dir, 2).mkdir(parents=True)
    return root


def n_operations(run_dir: Path, step: int) -> int:
    counting = FaultyFiles()
    one_start(run_dir, step, 2, counting)
    return counting.n_done


# -- the crash matrix ----------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("damaged", [False, True])
def test_killed_at_every_operation(tmp_path: Path, damaged: bool) -> None:
    prepare = damaged_newest if damaged else lambda run_dir: run_with(run_dir, 1)
    prepare(tmp_path / "count")
    n_all = n_operations(tmp_path / "count", 2)
    assert n_all > 35
    for kill_at in range(1, n_all + 1):
        run_dir = tmp_path / str(kill_at)
        root = prepare(run_dir)
        code = exit_code_of(lambda d=run_dir, n=kill_at: one_start(d, 2, 2, KillFiles(n)))
        assert code == KillFiles.KILLED
        check_after_a_death(root, damaged and kill_at < n_all, kill_at)

        if kill_at % 3 == 0:  # the next start dies as well, somewhere else
            exit_code_of(lambda d=run_dir, n=kill_at: one_start(d, 2, 3, KillFiles(n * 7 % n_all + 1)))
            check_after_a_death(root, damaged and kill_at < n_all, kill_at)
        one_start(run_dir, 2, 4, DISK)
        assert intact(root, 2)
        left = {name for name in names_in(root) if not (damaged and re.search(r"\.(unmarked|broken)-1$", name))}
        assert left == {"0000000002", "checkpoint_0000000002.done", "incarnation-4"}
        assert names_in(layout.staging_dir(root, 4)) == set()


def check_after_a_death(root: Path, damaged: bool, kill_at: int) -> None:
    done = layout.done_steps(root)
    good = [step for step in done if intact(root, step)]
    assert good, f"nothing left after a kill at {kill_at}"
    assert damaged or good == done, f"a bad mark after a kill at {kill_at}"
    assert good[0] == 1 or 2 in good, "the older one went before the newer one was there"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("lasting", [False, True])
def test_failing_at_every_operation(tmp_path: Path, error: int, lasting: bool) -> None:
    operations = NEEDS_ROOM if lasting and error != errno.EIO else OPERATIONS
    counting = FaultyFiles(operations=operations)
    run_with(tmp_path / "count", 1)
    one_start(tmp_path / "count", 2, 2, counting)
    for fail_at in range(1, counting.n_done + 1):
        run_dir = tmp_path / str(fail_at)
        root = run_with(run_dir, 1)
        files = FaultyFiles(fail_at, error=error, lasting=lasting, operations=operations)
        try:
            one_start(run_dir, 2, 2, files)
        except OSError:
            if 1 in layout.done_steps(root):  # it was the publishing that failed, not the retention
                publish.abandon(root, 2, 2, files=files)
        assert all(intact(root, step) for step in layout.done_steps(root))
        assert layout.done_steps(root), f"nothing left after a failure at {fail_at}"
        one_start(run_dir, 2, 3, DISK)
        assert layout.done_steps(root) == [2]
        assert names_in(layout.staging_dir(root, 3)) == set()
        shutil.rmtree(run_dir)


# -- publish -------------------------------------------------------------------------------------------------------


def test_the_mark_comes_last(tmp_path: Path) -> None:
    files = FaultyFiles()
    staging_dir = layout.staging_dir(started(tmp_path), 1)
    write(tmp_path, 5, 1, files)
    source, draft = staging_dir / "0000000005", staging_dir / "checkpoint_0000000005.done"
    assert files.log[-5:] == [
        f"fsync_dir {staging_dir}",
        f"rename {source} {layout.folder(tmp_path, 5)}",
        f"fsync_dir {tmp_path}",
        f"rename {draft} {layout.done_mark(tmp_path, 5)}",
        f"fsync_dir {tmp_path}",
    ]
    mark = read_json(layout.done_mark(tmp_path, 5))
    assert mark["step"] == 5
    assert mark["bytes"] == sum(path.stat().st_size for path in layout.folder(tmp_path, 5).iterdir())


def test_a_file_that_rank_0_does_not_see(tmp_path: Path) -> None:
    layout.coming(layout.folder(started(tmp_path), 1), 1).mkdir()
    facts = {"model.00001.distcp": publish.FileFacts(3, "0")}
    with pytest.raises(OSError, match="is the run folder on a shared disk"):
        publish.publish(tmp_path, 1, 1, facts)


def test_a_file_that_shrank(tmp_path: Path) -> None:
    folder = layout.coming(layout.folder(started(tmp_path), 1), 1)
    folder.mkdir()
    facts = {"a": publish.write_hashed(folder / "a", [b"1234"])}
    (folder / "a").write_bytes(b"123")
    with pytest.raises(OSError, match="has 3 bytes, 4 were written"):
        publish.publish(tmp_path, 1, 1, facts)


@pytest.mark.parametrize("direct_io", [True, False])
@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [4096], [4095, 2], [10_000, 64, 10_000], [3, 1 << 20], [500, 2 << 20, 500]]
)
def test_parts_of_any_size_are_written_and_hashed(tmp_path: Path, sizes: list[int], direct_io: bool) -> None:
    parts = [os.urandom(size) for size in sizes]
    whole = b"".join(parts)
    facts = publish.write_hashed(
        tmp_path / "file", publish.in_pages(parts) if direct_io else parts, direct_io=direct_io
    )
    assert (tmp_path / "file").read_bytes() == whole
    assert facts == publish.FileFacts(len(whole), xxhash.xxh3_128_hexdigest(whole))


def test_pieces_are_whole_pages_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "CHUNK_BYTES", 2 * mmap.PAGESIZE)
    parts = [bytes([n]) * size for n, size in enumerate((10, 3 * mmap.PAGESIZE, 5000, 0, mmap.PAGESIZE))]
    pieces = [bytes(piece) for piece in publish.in_pages(parts)]
    assert b"".join(pieces) == b"".join(parts)
    assert {len(piece) for piece in pieces[:-1]} == {2 * mmap.PAGESIZE}


def test_an_unmarked_folder_is_set_aside_not_deleted(tmp_path: Path) -> None:
    root = run_with(tmp_path, 1, 2)
    layout.done_mark(root, 2).unlink()
    publish.open_staging_dir(root, 2)
    assert layout.folder(root, 2).exists()
    assert layout.done_steps(root) == [1]
    write(root, 2, 2, DISK)
    assert (root / "0000000002.unmarked-1").is_dir()
    assert intact(root, 2)


def test_a_writer_that_wakes_up_after_a_newer_start_changes_nothing(tmp_path: Path) -> None:
    def old_start(run_dir: Path, files: Files) -> None:
        root = run_dir / layout.CHECKPOINTS
        (layout.folder(root, 3)).mkdir(exist_ok=True)  # in the way
        try:
            write(root, 3, 1, files)
            retain(root, 1, files)
        except OSError:
            publish.abandon(root, 3, 1, files=files)

    run_with(tmp_path / "count", 1)
    counting = FaultyFiles()
    old_start(tmp_path / "count", counting)
    outcomes = set()
    for freeze_at in range(1, counting.n_done + 1):
        root = run_with(tmp_path / str(freeze_at), 1)
        seen: list[set[str]] = []

        def newer_start(root: Path = root, seen: list[set[str]] = seen) -> None:
            publish.open_staging_dir(root, 2)
            seen.append({name for name in names_in(root) if "unmarked" not in name})

        old_start(root.parent, FrozenFiles(freeze_at, newer_start))
        left = {name for name in names_in(root) if "unmarked" not in name}
        assert left == seen[0], f"the old writer changed something after it was frozen at {freeze_at}"
        assert all(intact(root, step) for step in layout.done_steps(root))
        outcomes.add(tuple(layout.done_steps(root)))
    assert outcomes == {(1,), (1, 3), (3,)}


def test_a_newer_start_is_left_alone(tmp_path: Path) -> None:
    for name in ("incarnation-1", "incarnation-1.closed", "incarnation-9", "incarnation-x", "notes"):
        (tmp_path / name / "0000000003").mkdir(parents=True)
    publish.open_staging_dir(tmp_path, 2)
    assert names_in(tmp_path) == {"incarnation-2", "incarnation-9", "incarnation-x", "notes"}
    assert names_in(tmp_path / "incarnation-9") == {"0000000003"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    root = run_with(tmp_path / "run", 1)
    (layout.coming(layout.folder(root, 2), 1)).mkdir()
    (layout.coming(layout.folder(root, 2), 1) / "link").symlink_to(precious)
    publish.open_staging_dir(root, 2)
    assert (precious / "file").read_text() == "kept"
    (precious / "target").write_bytes(content(1, NAMES[0]))
    (layout.folder(root, 1) / NAMES[0]).unlink()
    (layout.folder(root, 1) / NAMES[0]).symlink_to(precious / "target")
    assert not intact(root, 1)
    with pytest.raises(OSError, match="symbolic link"):
        publish.write_hashed(layout.folder(root, 1) / NAMES[0], [b"x"])


@pytest.mark.parametrize("mounted", [True, False])
def test_of_a_checkpoint_that_was_moved_and_linked_back_only_the_link_is_deleted(tmp_path: Path, mounted: bool) -> None:
    root, archive = run_with(tmp_path / "run", 1), tmp_path / "archive"
    layout.folder(root, 1).rename(archive)
    kept = names_in(archive)
    layout.folder(root, 1).symlink_to(archive if mounted else tmp_path / "elsewhere")
    publish.retire(root, 1, 1)
    assert names_in(archive) == kept
    assert not layout.folder(root, 1).is_symlink()
    assert layout.done_steps(root) == []


@pytest.mark.parametrize("mounted", [True, False])
def test_a_link_in_the_way_of_a_checkpoint_is_set_aside(tmp_path: Path, mounted: bool) -> None:
    root = run_with(tmp_path / "run", 1)
    layout.folder(root, 2).symlink_to(tmp_path if mounted else tmp_path / "elsewhere")
    write(root, 2, 1, DISK)
    assert (root / "0000000002.unmarked-1").is_symlink()
    assert intact(root, 2)


def test_a_staging_dir_that_is_a_link_to_another_run_costs_that_run_nothing(tmp_path: Path) -> None:
    other = run_with(tmp_path / "other", 1)
    kept = names_in(other)
    root = run_with(tmp_path / "run", 2)
    (root / "incarnation-2").symlink_to(other)
    publish.open_staging_dir(root, 3)
    assert names_in(other) == kept
    assert layout.done_steps(other) == [1]
    assert not (root / "incarnation-2").is_symlink()


# -- judging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"files": 3}',
        b'{"files": {"a": 1}}',
        b'{"files": {"../a": {"bytes": 1, "xxh3_128": ""}}}',
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / layout.MANIFEST).write_bytes(text)
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        publish.read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"{}"])
def test_a_mark_that_is_none(tmp_path: Path, text: bytes) -> None:
    root = run_with(tmp_path, 1)
    layout.done_mark(root, 1).write_bytes(text)
    with pytest.raises(DamagedError, match="not a checkpoint's mark"):
        publish.read_marked_manifest(root, 1)


def test_a_mark_of_another_checkpoint(tmp_path: Path) -> None:
    root = run_with(tmp_path, 1, 2)
    shutil.copy(layout.done_mark(root, 1), layout.done_mark(root, 2))
    with pytest.raises(DamagedError, match="does not match the checksum"):
        publish.read_marked_manifest(root, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_judged_is_not_called_damaged(tmp_path: Path) -> None:
    root = run_with(tmp_path, 1)
    (layout.folder(root, 1) / NAMES[0]).chmod(0)
    with pytest.raises(PermissionError):
        intact(root, 1)


def test_pins(tmp_path: Path) -> None:
    publish.pin(tmp_path, 4, "eval-1", expires_at=100.0)
    publish.pin(tmp_path, 5, "eval-1", expires_at=50.0)
    assert publish.pinned_steps(tmp_path, now=70.0) == {4}
    (tmp_path / layout.PINS / "gone.json").symlink_to("nowhere")  # as if its reader ended after the listing
    assert publish.pinned_steps(tmp_path, now=70.0) == {4}
    for bad in ([], {"step": 4}, {"step": 4, "expires_at": None}, {"step": "x", "expires_at": 1}):
        write_json(tmp_path / layout.PINS / "bad.json", bad)
        with pytest.raises(RunError, match="is not a lease"):
            publish.pinned_steps(tmp_path, now=70.0)


def test_the_protocol_needs_no_torch() -> None:
    modules = "lingua.checkpoint.publish, lingua.checkpoint.retention, lingua.run.lock"
    probe = f"import sys, {modules}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
