"""Sources at a fast place: the same rows, one copier, no leftovers, nothing of anybody else's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lingua.config.keys.data import DataArgs, SourceArgs
from lingua.data import local_copy
from lingua.data.blocked_source import DataError
from lingua.data.loader import build_loader
from lingua.data.local_copy import staged
from lingua.data.manifest import MANIFEST
from lingua.files import RunError
from tests.corpora import data_args, documents, run_steps, two_sources, write_source
from tests.trainer import TINY, train

G = 8


def fast_args(tmp_path: Path, **changed: Any) -> DataArgs:
    two_sources(tmp_path / "data")
    return data_args(tmp_path / "data", stage_to=str(tmp_path / "fast"), **changed)


def folders(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("fast/lingua-*/data-*"))


@pytest.mark.parametrize("form", ["jsonl", "mmap_jsonl", "file"])
def test_the_same_rows_and_nothing_left(tmp_path: Path, form: str) -> None:
    args = fast_args(tmp_path)
    (tmp_path / "data" / "big" / "big.val.jsonl").write_text('{"text": "held out"}\n')
    path = "small/small.chunk.00.jsonl" if form == "file" else "small"
    kind = "mmap_jsonl" if form == "mmap_jsonl" else "jsonl"
    args.sources = [SourceArgs(path="big", format=kind), SourceArgs(path=path, name="../odd name", format=kind)]
    plain = run_steps(args, 5, n_rows=G)
    with staged(args) as fast:
        (folder,) = folders(tmp_path)
        (tmp_path / "data").rename(tmp_path / "unplugged")
        assert fast.root_dir is fast.stage_to is None  # so a phase that begins again does not copy the copy
        assert run_steps(fast, 5, n_rows=G) == plain
        assert (folder / "000" / "odd").exists() is False
        assert len(list(folder.rglob("*.val.jsonl"))) == 1
        assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert folders(tmp_path) == []


def test_nothing_happens_without_the_key(tmp_path: Path) -> None:
    args = data_args(two_sources(tmp_path))
    with staged(args) as same:
        assert same is args


def test_one_process_copies_and_the_last_user_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, copy = fast_args(tmp_path), local_copy._copy
    inside, told = os.pipe()
    go_on, release = os.pipe()

    def copy_and_tell(*words: Any) -> None:
        os.write(told, b"C")
        copy(*words)

    monkeypatch.setattr(local_copy, "_copy", copy_and_tell)
    users = []
    for _ in range(4):
        users.append(os.fork())
        if users[-1] == 0:
            with staged(args):
                os.write(told, b"U")
                os.read(go_on, 1)
            os.write(told, b"E")
            os._exit(0)
    events = b"".join(os.read(inside, 1) for _ in range(5))
    assert sorted(events) == sorted(b"CUUUU")
    os.write(release, b"x")
    assert os.read(inside, 1) == b"E"
    assert len(folders(tmp_path)) == 1
    os.write(release, b"xxx")
    for user in users:
        os.waitpid(user, 0)
    for descriptor in (inside, told, go_on, release):
        os.close(descriptor)
    assert folders(tmp_path) == []


def die_with_a_copy(args: DataArgs) -> None:
    """A forked user is killed."""
    pid = os.fork()
    if pid == 0:
        with staged(args):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_a_killed_user_left_is_used_again_or_reclaimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = fast_args(tmp_path)
    die_with_a_copy(args)
    (left,) = folders(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(local_copy, "_copy", lambda *words: pytest.fail("it was there already"))
        with staged(args):
            assert folders(tmp_path) == [left]
    die_with_a_copy(args)
    write_source(tmp_path / "data", "small", documents("other", 9))
    with staged(args):
        (other,) = folders(tmp_path)
        assert other != left
        with staged(args.model_copy(update={"sources": {"big": 1.0}})):  # a neighbour's start leaves it alone
            assert len(folders(tmp_path)) == 2
        assert folders(tmp_path) == [other]


@pytest.mark.parametrize("spoil", ["complete", "000/big.chunk.01.jsonl"])
def test_an_unfinished_copy_is_made_again(tmp_path: Path, spoil: str) -> None:
    args = fast_args(tmp_path)
    die_with_a_copy(args)
    (left,) = folders(tmp_path)
    (left / spoil).write_text("of another boot")
    with staged(args) as fast:
        assert run_steps(fast, 5, n_rows=G) == run_steps(args, 5, n_rows=G)


def test_no_space_is_told_before_a_byte_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = fast_args(tmp_path)
    monkeypatch.setattr(local_copy, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(RunError, match=r"stage_to: .*fast has 1.0 MiB free and the sources take .* KiB; choose"):
        staged(args).__enter__()
    assert folders(tmp_path) == []


def test_a_folder_that_somebody_else_put_there_is_refused(tmp_path: Path) -> None:
    args = fast_args(tmp_path)
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / f"lingua-{os.getuid()}").symlink_to(tmp_path / "data")
    with pytest.raises(RunError, match="belongs to another user"):
        staged(args).__enter__()


@pytest.mark.parametrize("stage", [False, True])
def test_a_source_that_is_not_as_its_manifest_says_is_refused(tmp_path: Path, stage: bool) -> None:
    args = fast_args(tmp_path)
    folder = tmp_path / "data" / "big"
    facts = {path.name: {"bytes": path.stat().st_size, "xxh3_128": ""} for path in folder.glob("*.jsonl")}
    (folder / MANIFEST).write_text(json.dumps({"files": facts}))
    use = (lambda: staged(args).__enter__()) if stage else (lambda: build_loader(args, rows_per_step=G).close())
    use()
    with (folder / "big.chunk.01.jsonl").open("a") as file:
        file.write("\n")
    (folder / "stray.chunk.09.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"source big: .*stray.chunk.09.jsonl is not named in .* \(and 1 more\)"):
        use()


def test_a_run_reads_the_copy_and_is_the_same(tmp_path: Path) -> None:
    two_sources(tmp_path)
    words = [
        *TINY,
        "steps=2",
        f"data.root_dir={tmp_path}",
        "data.sources={big: 1.0}",
        "data.load_async=false",
        "global_batch_size=24",
    ]
    plain = train([*words, f"dump_dir={tmp_path / 'a'}"])
    assert plain.exit_code == 0
    fast = train([*words, f"dump_dir={tmp_path / 'b'}", f"data.stage_to={tmp_path / 'fast'}"], n_ranks=2)
    assert fast.exit_code == 0
    logs = [path.read_text() for path in (tmp_path / "b").rglob("*.log")]
    assert "".join(logs).count("copied the data to") == 1
    assert folders(tmp_path) == []
    state = "train_state.00000.json"
    states = [json.loads((tmp_path / run / "checkpoints/0000000002" / state).read_text()) for run in "ab"]
    before, after = (state["per_rank"]["data"] for state in states)
    assert before["sources"] == after["sources"]
    assert all(before["lanes"][lane] == after["lanes"][lane] for lane in ("0", "2"))  # after two rows each
