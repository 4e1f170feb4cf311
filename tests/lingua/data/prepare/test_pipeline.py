"""The preparation: killed anywhere it goes on, and ends with the same bytes."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from lingua.config.base import ConfigError
from lingua.data.manifest import MANIFEST, check_manifest, read_manifest
from lingua.data.prepare import pipeline as prepare_module
from lingua.data.prepare import worker_pool
from lingua.data.prepare.convert import blocks, find_inputs
from lingua.data.prepare.pipeline import Job, prepare
from lingua.data.prepare.worker_pool import each
from lingua.files import Buffer, Files, RunError
from tests.fakes import FaultyFiles, KillFiles
from tests.ranks import exit_code_of

MEMORY_BYTES = 12 << 30
CHANGES = ("create", "write", "fsync", "mkdir", "rename", "fsync_dir", "remove", "rmdir")  # of the disk


def texts(n: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [orjson.dumps({"text": f"{seed}-{number} " + "y" * rng.randrange(200)}) for number in range(n)]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs with real fsyncs would take a minute on a disk."""
    try:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="test-prepare-"))
    except OSError:
        yield tmp_path
        return
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Three inputs of every packed kind, so that runs on disk are made; a copy on a final disk."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "about.json").write_text("{}")
    (source / ".hidden").mkdir()
    (source / ".hidden/x.jsonl").write_text("{}")
    (source / "b.jsonl").write_bytes(b"\n".join(texts(50, 1)))
    (source / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(texts(50, 2)) + b"\n"))
    packer = zstandard.ZstdCompressor()
    two_frames = [packer.compress(b"\n".join(texts(25, seed)) + b"\n") for seed in (3, 4)]
    (source / "sub/c.jsonl.zst").write_bytes(b"".join(two_frames))
    return Job(
        "mine", MEMORY_BYTES, tmp_path / "data", tmp_path / "fast", n_chunks=3,
        final_data_dir=tmp_path / "final", clear=True, source=source,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lines_in(files: dict[str, bytes]) -> Counter[bytes]:
    return Counter(line for name, data in files.items() if name.endswith("jsonl") for line in data.splitlines())


def elsewhere(job: Job, folder: Path) -> Job:
    return replace(job, data_dir=folder / "data", tmp_dir=folder / "fast", final_data_dir=folder / "final")


def result(job: Job) -> dict[str, bytes]:
    """The files of the final copy, or without one of the chunks."""
    return content(job.final or job.out)


def killed_at(job: Job, n: int) -> bool:
    """Prepare in a forked process that dies at operation n, as by kill -9; returns whether it did."""
    return exit_code_of(lambda: prepare(job, files=KillFiles(n, operations=CHANGES))) == KillFiles.KILLED


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_any_operation_it_ends_with_the_same_bytes(job: Job, tmp_path: Path, every: int) -> None:
    counting = FaultyFiles(operations=CHANGES)
    prepare(job, files=counting)
    expected = result(job)
    assert lines_in(expected) == Counter(texts(50, 1) + texts(50, 2) + texts(25, 3) + texts(25, 4))
    assert counting.n_done > 80
    for n in range(1, counting.n_done + 1, every):
        again = elsewhere(job, tmp_path / f"killed{n}")
        assert killed_at(again, n)
        prepare(again)
        assert result(again) == expected, n
        assert list(again.data_dir.iterdir()) == []
        assert list(again.tmp_dir.iterdir()) == []


def test_killed_again_and_again(job: Job, tmp_path: Path) -> None:
    prepare(job)
    again = elsewhere(job, tmp_path / "often")
    n_kills = 0
    while killed_at(again, 23 + n_kills % 5):
        n_kills += 1
    assert n_kills > 3
    assert result(again) == result(job)


def test_a_full_disk_is_a_sentence_and_costs_nothing(job: Job, tmp_path: Path) -> None:
    counting = FaultyFiles(operations=CHANGES)
    prepare(job, files=counting)
    for n in range(1, counting.n_done + 1, 3):
        again = elsewhere(job, tmp_path / f"full{n}")
        with pytest.raises((OSError, RunError)) as error:
            prepare(again, files=FaultyFiles(n, operations=CHANGES))
        if error.type is RunError:  # else while sweeping, which needs no space
            assert "no space left for" in str(error.value), n
            assert "continues from here" in str(error.value), n
        prepare(again)
        assert result(again) == result(job), n


def test_too_little_space_is_said_before(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "free_bytes", lambda path: 10)
    with pytest.raises(RunError, match=r"fast/lingua-prepare.* needs .* bytes\) and has 10 B free; .*--tmp-dir"):
        prepare(job)


@pytest.mark.parametrize(
    "change",
    [{"n_workers": 3}, {"n_workers": 1}, {"memory_bytes": 6 << 30}, {"clear": False, "final_data_dir": None}],
)
def test_processes_and_memory_change_nothing(job: Job, tmp_path: Path, change: dict[str, object]) -> None:
    prepare(job)
    other = replace(elsewhere(job, tmp_path / "other"), **change)
    prepare(other)
    assert result(other) == result(job)


def test_plain_files_need_no_runs_and_give_the_same(job: Job, tmp_path: Path) -> None:
    prepare(job)
    assert job.source
    plain = tmp_path / "plain"
    for name in find_inputs(job.source):
        target = plain / name.removesuffix(".gz").removesuffix(".zst")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(blocks(job.source / name)))
    mapped = replace(elsewhere(job, tmp_path / "other"), source=plain)
    prepare(mapped)
    assert not mapped.tmp_dir.exists()
    assert result(mapped) | {MANIFEST: b""} == result(job) | {MANIFEST: b""}


def test_another_seed_gives_another_order(job: Job, tmp_path: Path) -> None:
    other = replace(elsewhere(job, tmp_path / "other"), seed=43)
    for each_job in (job, other):
        prepare(each_job)
    assert lines_in(result(other)) == lines_in(result(job))
    assert result(other)["mine.chunk.00.jsonl"] != result(job)["mine.chunk.00.jsonl"]


@pytest.mark.parametrize("change", [{}, {"final_data_dir": None, "clear": False}])
def test_a_finished_preparation_is_left_alone_and_is_not_mixed_with_another(job: Job, change: dict[str, None]) -> None:
    job = replace(job, **change)
    manifest = prepare(job)
    folder = job.final or job.out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(job) == manifest
    with pytest.raises(ValueError, match=r"was prepared with seed 42, not 7; remove .*mine_shuffled"):
        prepare(replace(job, seed=7))
    with pytest.raises(ValueError, match="n_chunks 3, not 4"):
        prepare(replace(job, n_chunks=4))
    assert job.source
    (job.source / "new.jsonl").write_bytes(b"\n".join(texts(51, 1)))
    with pytest.raises(ValueError, match=r"input files changed since .* was begun \(new.jsonl\)"):
        prepare(job)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_changed_inputs_are_refused_midway(job: Job) -> None:
    assert killed_at(job, 40)
    assert job.source
    (job.source / "b.jsonl").write_bytes(b"\n".join(texts(51, 1)))
    with pytest.raises(ValueError, match=r"input files changed since .* was begun \(b.jsonl\)"):
        prepare(job)


def test_two_at_once_are_refused(job: Job) -> None:
    with (
        prepare_module._locked(job, job.data_dir / ".prepare-mine"),
        pytest.raises(RunError, match=r"mine_shuffled is being prepared by process \d+ on"),
    ):
        prepare(job)


def test_nothing_is_left_of_the_lock_after_success_or_refusal(job: Job) -> None:
    job = replace(job, final_data_dir=None, clear=False)
    (empty := job.data_dir.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        prepare(replace(job, source=empty))
    assert list(job.data_dir.iterdir()) == []
    assert killed_at(job, 40)
    assert (job.data_dir / ".prepare-mine").is_dir()
    prepare(job)
    assert [path.name for path in job.data_dir.iterdir()] == ["mine_shuffled"]


def test_work_is_not_cleared_while_the_copy_is_bad(job: Job) -> None:
    class Flipping(Files):
        final = False

        def create(self, path: Path) -> int:
            self.final = "final" in str(path)
            return super().create(path)

        def write(self, descriptor: int, data: Buffer) -> None:
            super().write(descriptor, bytes([data[0] ^ 1]) + bytes(data[1:]) if self.final else data)

    with pytest.raises(RunError, match=r"has other content than the manifest says; check both disks"):
        prepare(job, files=Flipping())
    assert result(job) == {}
    assert check_manifest(job.out, hashes=True) == []
    prepare(replace(job, clear=False))
    assert job.final
    chunk = job.final / "mine.chunk.01.jsonl"
    data = chunk.read_bytes()
    chunk.write_bytes(data[::-1])
    with pytest.raises(RunError, match=r"chunk.01.jsonl has another content"):
        prepare(job)
    assert check_manifest(job.out, hashes=True) == []
    chunk.write_bytes(data)
    prepare(job)
    assert not job.out.exists()
    assert job.source
    assert job.source.is_dir()


def test_chunks_from_elsewhere_are_not_mixed_in(job: Job) -> None:
    assert job.final
    for folder in (job.out, job.final):
        folder.mkdir(parents=True)
        stray = folder / "mine.chunk.31.jsonl"
        stray.write_bytes(b"{}\n")
        with pytest.raises((ValueError, RunError), match=r"holds mine.chunk.31.jsonl"):
            prepare(job)
        stray.unlink()
    prepare(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "no data set 'mine'; there are cosmopedia_v2"),
        ({"dataset": "a/b"}, "not a name for a data set"),
        ({"n_chunks": 0}, "--nchunks 0: give at least 1"),
        ({"final_data_dir": None}, "needs --final-data-dir"),
        ({"memory_bytes": 1 << 20}, "MEMORY is too small"),
        ({"source": Path("nowhere")}, "is not a folder"),
    ],
)
def test_impossible_requests(job: Job, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(job, **change))
    assert not job.data_dir.exists()


def test_the_manifest_tells_what_is_wrong(job: Job) -> None:
    job = replace(job, final_data_dir=None, clear=False)
    manifest = prepare(job)
    assert (manifest["documents"], manifest["held_out"]) == (150, 1)
    assert check_manifest(job.out, hashes=True) == []
    assert check_manifest(job.out / "nowhere") == []
    chunk = job.out / "mine.chunk.00.jsonl"
    data = chunk.read_bytes()
    chunk.write_bytes(data[::-1])
    assert check_manifest(job.out) == []
    assert "another content" in check_manifest(job.out, hashes=True)[0]
    chunk.write_bytes(data[:-1])
    assert "its manifest says" in check_manifest(job.out)[0]
    chunk.rename(job.out / "mine.chunk.07.jsonl")
    problems = check_manifest(job.out)
    assert "chunk.07.jsonl is not named" in problems[0]
    assert "chunk.00.jsonl is missing" in problems[1]
    (job.out / MANIFEST).write_text("[]")
    with pytest.raises(RunError, match="is not a manifest"):
        read_manifest(job.out)
    assert "is not a manifest" in check_manifest(job.out)[0]


def test_parquet_keeps_text_and_id(tmp_path: Path) -> None:
    columns = {"text": ["a", None, "ü\n"], "id": ["1", "2", "3"], "score": [0.1, 0.2, 0.3]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=2)
    lines = b"".join(blocks(tmp_path / "x.parquet")).splitlines()
    assert [orjson.loads(line) for line in lines] == [
        {"text": "a", "id": "1"}, {"text": None, "id": "2"}, {"text": "ü\n", "id": "3"},
    ]  # fmt: skip
    job = Job("p", MEMORY_BYTES, tmp_path / "data", tmp_path / "fast", source=tmp_path)
    assert prepare(replace(job, max_bad_fraction=0.4))["counts"]["no_text"] == 1
    parquet.write_table(pyarrow.table({"blob_id": ["1"]}), tmp_path / "x.parquet")
    with pytest.raises(RunError, match=r"no column 'text' or 'content', only blob_id"):
        list(blocks(tmp_path / "x.parquet"))


def test_binary_text_of_parquet_is_decoded_and_a_row_that_is_no_utf8_is_counted(tmp_path: Path) -> None:
    binary = pyarrow.array([*["grün".encode()] * 299, b"\xff"], pyarrow.binary())
    struct = pyarrow.array([{"b": 1}] * 300)  # pyarrow finds its b under the name of the next column
    table = pyarrow.table({"a": struct, "a.b": binary, "a.b.c": list(range(300))})
    parquet.write_table(table, tmp_path / "x.parquet")
    job = Job("p", MEMORY_BYTES, tmp_path / "data", tmp_path / "fast", source=tmp_path, n_chunks=1, text_key="a.b")
    counts = prepare(job)["counts"]
    assert (counts["documents"], counts["not_json"]) == (299, 1)
    assert (job.out / "p.chunk.00.jsonl").read_text().splitlines()[0] == '{"a.b":"grün"}'


def test_many_lines_without_a_document_end_the_preparation_until_they_are_allowed(job: Job) -> None:
    assert job.source
    (job.source / "bad.jsonl").write_bytes(b'{"text": 3}\n{\n\n\n\n{"text": ""}\n' * 10)
    with pytest.raises(
        RunError, match=r"30 of 180 lines of .*source hold no document, .*--max-bad-fraction 0.01 \(150 documents; left"
    ):
        prepare(job)
    assert not job.final or not job.final.exists()
    assert prepare(replace(job, max_bad_fraction=0.2))["counts"]["blank"] == 30


@pytest.mark.parametrize("packed", [False, True])
def test_text_under_another_key(job: Job, packed: bool) -> None:
    assert job.source
    shutil.rmtree(job.source)
    job.source.mkdir()
    lines = b'{"body": "a", "text": 3}\n' * 4
    (job.source / ("a.jsonl.gz" if packed else "a.jsonl")).write_bytes(gzip.compress(lines) if packed else lines)
    with pytest.raises(RunError, match=r"no document in .* 4 without text; .*a.jsonl.*:1: no string in 'text' or 'con"):
        prepare(job)
    shutil.rmtree(job.data_dir)
    assert prepare(replace(job, text_key="body"))["documents"] == 4
    with pytest.raises(ValueError, match="was prepared with text_key body, not None"):
        prepare(job)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.jsonl.zst", "x.json.zstd", "x.parquet"])
def test_a_packed_file_of_0_bytes_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        list(blocks(tmp_path / name))


def test_a_link_to_data_that_leads_nowhere_is_an_error(job: Job) -> None:
    assert job.source
    (job.source / "z.jsonl").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"z\.jsonl cannot be opened; mend the link"):
        prepare(job)


def frames(text: bytes, **how: Any) -> bytes:
    """The text twice with what else a zst file may hold; content size left out of the first frame."""
    packer, skippable = zstandard.ZstdCompressor(**how), bytes.fromhex("502a4d18 05000000") + b"12345"
    stream = packer.compressobj()
    return skippable + stream.compress(text) + stream.flush() + skippable + packer.compress(text) + packer.compress(b"")


@pytest.mark.soak
@pytest.mark.parametrize("how", [{}, {"write_checksum": True}, {"write_content_size": False}])
def test_zst_is_unpacked_in_small_pieces_and_each_cut_is_found(tmp_path: Path, how: dict[str, Any]) -> None:
    path, text = tmp_path / "x.jsonl.zst", b"\n".join([*texts(3000, 1), b" " * 50_000_000])
    whole = frames(text, **how)
    path.write_bytes(whole)
    pieces = list(blocks(path))
    assert b"".join(pieces) == 2 * text
    assert max(map(len, pieces)) <= 1 << 17
    ends = {13, len(whole) - len(zstandard.ZstdCompressor(**how).compress(b""))}  # of frames: nothing tells
    for n in {*range(1, 40), *range(len(whole) - 40, len(whole)), len(whole) // 3} - ends:
        path.write_bytes(whole[:n])
        with pytest.raises(RunError, match=r"x.jsonl.zst is (cut off|damaged)"):
            list(blocks(path))


def test_a_zst_that_takes_much_memory_to_unpack_is_refused_with_little(tmp_path: Path) -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "x.jsonl.zst"
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    path.write_bytes(packer.compress(b"\n".join(texts(9, 1))) + packer.flush())
    job = Job("p", MEMORY_BYTES, tmp_path / "data", tmp_path / "fast", source=path.parent)
    with pytest.raises(ValueError, match="MEMORY is too small to work in"):
        prepare(replace(job, memory_bytes=worker_pool.rss_bytes() + (200 << 20)))
    assert prepare(job)["documents"] == 9
    narrow = zstandard.ZstdCompressor().compress(b"{}")
    path.write_bytes(narrow + path.read_bytes())
    with pytest.raises(RunError, match=r"a frame takes 128\.0 MiB to unpack, its first one less"):
        list(blocks(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_cut_off_files_are_named(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"x{suffix}"
    lines = b"\n".join(texts(500, 1))
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": ["abc"] * 500}), whole)
    else:
        whole.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else zstandard.compress(lines))
        assert b"".join(blocks(whole)) == lines
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(RunError, match=rf"x{suffix} is (damaged|cut off)"):
        list(blocks(whole))


def test_workers_start_where_the_kernel_does_not_reset_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(worker_pool, "_most_workers", 0)
    monkeypatch.setattr(worker_pool, "_peak_alone", 0)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert dict(each([1, 2], str, 2)) == {1: "1", 2: "2"}
    assert worker_pool.peak_rss_bytes() > 0


def test_a_dead_worker_is_told() -> None:
    with pytest.raises(RunError, match="a worker process was killed"):
        list(each([1, 2], lambda number: os._exit(number), 2))


def test_a_worker_whose_parent_died_before_it_began_ends() -> None:
    assert exit_code_of(lambda: worker_pool._die_with(os.getpid())) == 9


def test_a_column_of_another_name_gets_a_remedy_that_then_works(tmp_path: Path):
    (tmp_path / "source").mkdir()
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "source" / "x.parquet")
    job = Job(dataset="mine", memory_bytes=MEMORY_BYTES, data_dir=tmp_path, n_chunks=1, source=tmp_path / "source")
    with pytest.raises((ConfigError, RunError), match="only body; name the right one with --text-key"):
        prepare(job)
    assert not job.out.exists()
    assert prepare(replace(job, text_key="body"))["documents"] == 2
