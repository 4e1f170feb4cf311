"""Turn a published data set into shuffled chunks for runs: download, convert, shuffle, split, hold out, copy.

Promise: the chunks are a pure function of (input files, seed, number of chunks). Killed at any point and started again
with the same command it continues, repeats no line, and ends with the same bytes. The memory budget covers the resident
memory of all processes. Work folders are cleared only after the copy on the final disk was read back and verified.
Cost: disk for the download, for sorted runs of all text under `tmp_dir` (none if plain jsonl fits the budget), and for
the chunks.

    <data_dir>/<ds>/                     the download            .download.json   commit and hashes
    <data_dir>/<ds>_shuffled/            <ds>.chunk.NN.jsonl, <ds>.val.jsonl, manifest.json (last)
                                         .prepare.json, .done-*.json   while it is being made
    <tmp_dir>/lingua-prepare-<uid>-*/    sorted runs             NNNNNN.done.json per input
    <final_data_dir>/<ds>_shuffled/      the copy                manifest.json (last)
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
import xxhash

from lingua.config.base import ConfigError
from lingua.console import Progress
from lingua.data.blocked_source import TextFields
from lingua.data.manifest import MANIFEST, check_manifest, hash_file, read_manifest, stray_files
from lingua.data.prepare import hub
from lingua.data.prepare.convert import (
    READ,
    as_units,
    blocks,
    input_sizes,
    is_plain,
    left_aside,
    readable_blocks,
    unpacking_bytes,
)
from lingua.data.prepare.counts import Counts, LongLineError, refuse
from lingua.data.prepare.external_sort import (
    DOC_BYTES,
    FIXED_BYTES,
    MappedRun,
    Output,
    SortedRun,
    drop_window,
    load_runs,
    map_file,
    mark_of,
    plan_outputs,
    sort_file,
    write_file,
    write_output,
)
from lingua.data.prepare.worker_pool import available_bytes, disk_of, each, need_space, rss_bytes
from lingua.files import DISK, Files, RunError, human_bytes, make_folders, read_json, write_json
from lingua.run.lock import OccupiedError, RunLock

log = logging.getLogger(__name__)

ORDER_VERSION = 1  # raised when the same input and seed would give another order
VAL_PER_CHUNK = 10_000
MAX_WORKERS = 16
_STATE = ".prepare.json"
_WORKER_BYTES = 192 << 20  # below this a process spends its memory on itself
_FORK_BYTES = 32 << 20  # private pages that a forked process soon has; also the smallest useful window
_SMALL_BYTES = 64 << 20  # below this a second process costs more than it saves


@dataclass(frozen=True)
class Job:
    """A request. Sizes are in bytes; folders need not exist yet."""

    dataset: str
    memory_bytes: int
    data_dir: Path = Path("data")
    tmp_dir: Path = Path("/tmp")
    seed: int = 42
    n_chunks: int = 32
    final_data_dir: Path | None = None
    clear: bool = False
    source: Path | None = None
    """A local folder, or a file, instead of the hub: plain text, jsonl, parquet, packed or not."""
    suffix: str = "_shuffled"
    """Suffix of the folder of chunks, after the name of the data set."""
    revision: str | None = None
    n_workers: int | None = None
    """Number of processes; None for as many as cores, inputs and memory allow."""
    val_per_chunk: int = VAL_PER_CHUNK
    text_key: str | None = None
    """Field (or column) with the text; None: `text`, else `content`."""
    max_bad_fraction: float = 0.01
    """Nothing is written if a larger share of lines has no document; blank lines do not count."""

    @property
    def fields(self) -> TextFields:
        return TextFields(self.text_key)

    @property
    def raw(self) -> Path:
        return self.data_dir / self.dataset

    @property
    def out(self) -> Path:
        return self.data_dir / f"{self.dataset}{self.suffix}"

    @property
    def final(self) -> Path | None:
        return self.final_data_dir / self.out.name if self.final_data_dir else None

    @property
    def repo(self) -> str:
        return "local" if self.source else hub.DATASETS[self.dataset].repo


def check_job(job: Job) -> None:
    """Raise ConfigError, with a remedy, for a job that cannot work, before anything is touched."""
    if job.source is None and job.dataset not in hub.DATASETS:
        known = ", ".join(sorted(hub.DATASETS))
        raise ConfigError(f"no data set {job.dataset!r}; there are {known}, and any name with --source FOLDER")
    if not job.dataset or "/" in job.dataset or job.dataset.startswith("."):
        raise ConfigError(f"{job.dataset!r} is not a name for a data set: it becomes a folder")
    if job.n_chunks < 1:
        raise ConfigError(f"--nchunks {job.n_chunks}: give at least 1")
    if job.clear and job.final is None:
        raise ConfigError("--clear-work-dir-after-transfer-to-final needs --final-data-dir, or nothing would remain")
    if job.final and job.final.resolve() == job.out.resolve():
        raise ConfigError(f"--final-data-dir is --data-dir ({job.data_dir}); leave it out")
    if job.source is not None:
        if not job.source.is_dir() and not job.source.is_file():
            raise ConfigError(f"{job.source} is not a folder, nor a file; check the path")
        if job.source.resolve() in (job.out.resolve(), job.final.resolve() if job.final else None):
            raise ConfigError(f"--source {job.source} is where the result goes; choose another --data-dir")
    _window_bytes(job.memory_bytes - rss_bytes(), 1)


def prepare(job: Job, *, files: Files = DISK, progress: Progress | None = None) -> dict[str, Any]:
    """Do all that is not done yet; return the manifest. Raises RunError or ConfigError with one sentence."""
    check_job(job)
    progress = progress or Progress()
    with progress, _locked(job, job.data_dir / f".prepare-{job.dataset}"):
        manifest = _finished(job, job.final) if job.final else None
        copied_now = manifest is None
        if manifest is None:
            manifest = _finished(job, job.out) or _make_or_leave_nothing(job, progress, files)
            _sweep(job, files)
            if job.final:
                with disk_of(job.final, "--final-data-dir"):
                    _copy(job.out, job.final, manifest, progress, files)
        if job.clear:
            _clear(job, files, verified=copied_now)
    return manifest


@contextmanager
def _locked(job: Job, folder: Path) -> Iterator[None]:
    lock = RunLock(folder)
    try:
        lock.acquire()
    except OccupiedError as error:
        owner = str(error).partition(" by ")[2].partition(";")[0]
        raise RunError(f"{job.out} is being prepared by {owner or 'another process'}; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release_and_remove()


# -- the request, now and at the first start -------------------------------------------------------------------------


def _recipe(job: Job, revision: str, requested: str, inputs: list[list[Any]]) -> dict[str, Any]:
    """Return all that the result depends on."""
    return {
        "version": ORDER_VERSION,
        "dataset": job.dataset,
        "repo": job.repo,
        "requested_revision": requested,
        "revision": revision,
        "seed": job.seed,
        "n_chunks": job.n_chunks,
        "val_per_chunk": job.val_per_chunk,
        **({} if job.text_key is None else {"text_key": job.text_key}),
        "inputs": inputs,
    }


def _refuse_other(job: Job, recipe: dict[str, Any], folder: Path, inputs: list[list[Any]] | None = None) -> None:
    """Raise ConfigError if the folder holds the result of another request."""
    revision, requested = recipe.get("revision", ""), recipe.get("requested_revision", "")
    asked = revision if job.revision in (None, requested) else job.revision
    wanted = _recipe(job, asked, requested, inputs or recipe.get("inputs", []))
    was, now = ({name: rest for name, *rest in listed} for listed in (recipe.get("inputs", []), wanted.pop("inputs")))
    remedy = f"remove {folder} to prepare it anew, or choose another folder"
    for key, value in ({"text_key": None} | wanted).items():
        if recipe.get(key) != value:
            raise ConfigError(f"{folder} was prepared with {key} {recipe.get(key)}, not {value}; {remedy}")
    if changed := sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        raise ConfigError(f"the input files changed since {folder} was begun ({', '.join(changed[:3])}); {remedy}")


def _finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished result of this request, or None. Raises if it is damaged or another's."""
    if (manifest := read_manifest(folder)) is not None:
        _refuse_other(job, manifest, folder, None if job.source is None else input_sizes(job.source))
        refuse(check_manifest(folder), "faults")
        log.info("%s is complete already", folder)
    return manifest


# -- making the chunks -----------------------------------------------------------------------------------------------


def _make_or_leave_nothing(job: Job, progress: Progress, files: Files) -> dict[str, Any]:
    """Make the chunks. If that fails before one is begun, remove the folder, which would block other options."""
    was_there = job.out.exists()
    try:
        return _make(job, progress, files)
    except (ConfigError, RunError, ValueError):
        if not was_there and job.out.is_dir() and [path.name for path in job.out.iterdir()] == [_STATE]:
            files.remove_tree(job.out)
        raise


def _make(job: Job, progress: Progress, files: Files) -> dict[str, Any]:
    root, recipe = _inputs(job, progress, files)
    with disk_of(job.out, "--data-dir"):
        make_folders(job.out, files=files)
        try:
            recorded = read_json(job.out / _STATE)
        except FileNotFoundError:
            if stray := stray_files(job.out, set()):
                raise ConfigError(
                    f"{job.out} already holds {stray[0]}, from elsewhere; remove it, or choose another --data-dir"
                ) from None
            write_json(job.out / _STATE, recipe, files=files)
        else:
            _refuse_other(job, recorded, job.out, recipe["inputs"])
    memory_bytes = min(job.memory_bytes - rss_bytes(), available_bytes() * 4 // 5)
    if memory_bytes < job.memory_bytes - rss_bytes():
        log.info("the machine has %s of memory to spare; that is the budget", human_bytes(memory_bytes))
    runs, counts = _runs(job, root, recipe, memory_bytes, progress, files)
    if not counts.documents:
        raise RunError(f"no document in {job.source or root}: {counts}; add text, or name its field with --text-key")
    if counts.bad > job.max_bad_fraction * (counts.bad + counts.documents):
        raise RunError(
            f"{counts.bad} of {counts.bad + counts.documents} lines of {root} hold no document, more than "
            f"--max-bad-fraction {job.max_bad_fraction} ({counts}); fix the data or name its text with "
            "--text-key, or allow more: the same command with another --max-bad-fraction continues from here"
        )
    outputs = plan_outputs(runs, job.dataset, n_chunks=job.n_chunks, val_per_chunk=job.val_per_chunk)
    if (n_chunks := sum(".chunk." in output.name for output in outputs)) < job.n_chunks:
        log.warning("%d documents fill %d chunks, not %d", counts.documents, n_chunks, job.n_chunks)
    with disk_of(job.out, "--data-dir"):
        written = _write_all(job, runs, outputs, memory_bytes, progress, files)
        manifest = {
            **recipe,
            "tool": f"lingua {metadata.version('lingua')}",
            "documents": counts.documents,
            "held_out": sum(output.n_docs for output in outputs if output.name.endswith(".val.jsonl")),
            "counts": asdict(counts),
            "files": written,
        }
        write_json(job.out / MANIFEST, manifest, files=files)
    return manifest


def _inputs(job: Job, progress: Progress, files: Files) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the input files, and the recipe that names them."""
    if job.source is not None:
        inputs, others = input_sizes(job.source), left_aside(job.source)
        if not inputs:
            more = f" (only {others})" if others else ""
            raise ConfigError(f"{job.source} holds no file that can be read{more}; lingua reads {READ}")
        if strange := [name for name, _ in inputs if name.encode(errors="replace").decode() != name]:
            raise ConfigError(f"{job.source}: the name of the file {strange[0]!r} is not UTF-8; rename it")
        if others:
            log.warning("left aside: %s; lingua reads %s", others, READ)
        root = job.source if job.source.is_dir() else job.source.parent
        return root, _recipe(job, "local", "local", inputs)
    with disk_of(job.raw, "--data-dir"):
        snapshot = hub.fetch(
            job.dataset, job.raw, job.revision, begin=progress.begin, advance=progress.advance, files=files
        )
    inputs = [[file.path, file.n_bytes, file.sha256 or file.git_sha1] for file in snapshot.files]
    return job.raw, _recipe(job, snapshot.revision, snapshot.requested, inputs)


def _runs(
    job: Job, root: Path, recipe: dict[str, Any], memory_bytes: int, progress: Progress, files: Files
) -> tuple[Sequence[SortedRun], Counts]:
    """Return sorted runs of all inputs and the counts of their lines; `memory_bytes`: the rest of the budget."""
    names = [name for name, *_ in recipe["inputs"]]
    sizes = [size for _, size, *_ in recipe["inputs"]]
    if (mapped := _map_all(job, root, names, sizes, memory_bytes, progress)) is not None:
        return mapped
    folder = _scratch(job, recipe, files)
    units, sizes = as_units(names, sizes)
    todo = [number for number in range(len(units)) if not mark_of(folder, number).is_file()]
    reserve = max((unpacking_bytes(root / name) for number in todo for name in units[number]), default=0)
    n_workers = _n_workers(job, memory_bytes, len(todo), sum(sizes), reserve)
    window_bytes = _window_bytes(memory_bytes, n_workers, reserve)
    with disk_of(folder, "--tmp-dir"):
        todo_bytes = sum(sizes[number] for number in todo)
        need_space(folder, todo_bytes, "--tmp-dir")
        progress.begin("sort", sum(sizes), done=sum(sizes) - todo_bytes)

        def sort(number: int) -> list[str]:
            paths, problems = [root / name for name in units[number]], list[str]()
            try:
                sort_file(
                    readable_blocks(paths, job.fields, problems), str(paths[0]), number, folder,
                    seed=job.seed, memory_bytes=window_bytes, fields=job.fields, files=files,
                )  # fmt: skip
            except RunError:
                if not problems:
                    raise
            return problems

        unreadable: list[str] = []
        for number, problems in each(todo, sort, n_workers):
            if problems and not unreadable:
                log.warning("%s; the other files are read before this ends", problems[0])
            unreadable += problems
            progress.advance(sizes[number])
        refuse(sorted(unreadable))
    return load_runs(folder, len(units))


def _map_all(
    job: Job, root: Path, names: list[str], sizes: list[int], memory_bytes: int, progress: Progress
) -> tuple[Sequence[SortedRun], Counts] | None:
    """Return runs without a copy if everything is plain jsonl and fits the budget with its index, else None."""
    left_bytes = memory_bytes - FIXED_BYTES
    for name, size in zip(names, sizes, strict=True):
        if not is_plain(name) or (left_bytes := left_bytes - size) < 0:
            return None
        with (root / name).open("rb") as file:
            head = file.read(1 << 20)
        left_bytes -= DOC_BYTES * (1 + head.count(b"\n") * size // max(len(head), 1))
    if left_bytes < 0:
        return None
    progress.begin("scan", sum(sizes))
    runs: list[SortedRun] = []
    total = Counts()
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        try:
            run, counts = map_file(root / name, str(root / name), number, job.seed, job.fields, left_bytes)
        except LongLineError:  # it may fit if only a part of the data is in memory
            return None
        runs += [run] if run else []
        total.add(counts)
        progress.advance(size)
    return runs, total


def _write_all(
    job: Job, runs: Sequence[SortedRun], outputs: list[Output], memory_bytes: int, progress: Progress, files: Files
) -> dict[str, dict[str, Any]]:
    """Write the missing outputs; return size, count and hash of all by name."""
    written = {output.name: _mark_read(job.out, output) for output in outputs}
    todo = [number for number, output in enumerate(outputs) if written[output.name] is None]
    todo_bytes = sum(outputs[number].n_bytes for number in todo)
    need_space(job.out, todo_bytes, "--data-dir")
    mapped_bytes = sum(run.n_bytes for run in runs if isinstance(run, MappedRun))  # each process is charged for them
    n_workers = _n_workers(job, memory_bytes - mapped_bytes, len(todo), todo_bytes, mapped_bytes)
    if n_workers > 1:
        drop_window()
    window_bytes = max(_window_bytes(memory_bytes, n_workers) - (mapped_bytes if n_workers == 1 else 0), FIXED_BYTES)
    n_bytes = sum(output.n_bytes for output in outputs)
    progress.begin("write", n_bytes, done=n_bytes - todo_bytes)

    def write(number: int) -> dict[str, Any]:
        output = outputs[number]
        digest = write_output(runs, output, job.out / output.name, memory_bytes=window_bytes, files=files)
        facts = {"documents": output.n_docs, "bytes": output.n_bytes, "xxh3_128": digest}
        write_json(job.out / f".done-{output.name}.json", facts, files=files)
        return facts

    for number, facts in each(todo, write, n_workers):
        written[outputs[number].name] = facts
        progress.advance(outputs[number].n_bytes)
    return {name: facts for name, facts in written.items() if facts is not None}


def _mark_read(folder: Path, output: Output) -> dict[str, Any] | None:
    try:
        facts = read_json(folder / f".done-{output.name}.json")
        return facts if (folder / output.name).stat().st_size == facts["bytes"] == output.n_bytes else None
    except FileNotFoundError:
        return None


# -- folders ---------------------------------------------------------------------------------------------------------


def _scratch_root(job: Job) -> Path:
    place = xxhash.xxh3_64_hexdigest(str(job.out.resolve()).encode())
    return job.tmp_dir / f"lingua-prepare-{os.getuid()}-{place}"


def _scratch(job: Job, recipe: dict[str, Any], files: Files) -> Path:
    """Make the folder of this recipe's runs; remove those of other recipes."""
    root = _scratch_root(job)
    folder = root / xxhash.xxh3_64_hexdigest(orjson.dumps(recipe))
    with disk_of(root, "--tmp-dir"):
        make_folders(root, files=files)
        facts = root.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():  # /tmp belongs to everybody
            raise RunError(f"{root} belongs to another user; choose another --tmp-dir")
        root.chmod(0o700)
        for other in root.iterdir():
            if other != folder:
                files.remove_tree(other)
        make_folders(folder, files=files)
    return folder


def _sweep(job: Job, files: Files) -> None:
    """Remove files that only an unfinished preparation needs, and those that a killed one left half written."""
    for path in (*job.out.glob(".done-*.json"), *job.out.glob(".*.tmp*"), job.out / _STATE):
        if path.is_file():
            files.remove(path)
    if (root := _scratch_root(job)).is_dir() and root.lstat().st_uid == os.getuid():
        files.remove_tree(root)


def _copy(source: Path, target: Path, manifest: dict[str, Any], progress: Progress, files: Files) -> None:
    """Copy the result; each file gets its name only after it was read back from the target and verified."""
    make_folders(target, files=files)
    for left in target.glob(".*.tmp*"):
        files.remove(left)
    if stray := stray_files(target, set(manifest["files"])):
        raise RunError(
            f"{target} holds {stray[0]}, which is not of this preparation; remove it or choose another folder"
        )
    wanted = manifest["files"]
    todo = {name: facts for name, facts in wanted.items() if not _is_copied(target / name, facts)}
    n_bytes, todo_bytes = (sum(facts["bytes"] for facts in some.values()) for some in (wanted, todo))
    progress.begin(f"copy to {target}", n_bytes, done=n_bytes - todo_bytes)
    need_space(target, todo_bytes, "--final-data-dir")
    for name, facts in todo.items():
        temporary = target / f".{name}.tmp"
        try:
            write_file(temporary, blocks(source / name), files)
            if hash_file(temporary, past_cache=True) != facts["xxh3_128"]:
                raise RunError(
                    f"the copy of {source / name} in {target} has other content than the manifest says; check both "
                    "disks, then give the same command again"
                )
            files.rename(temporary, target / name)
        except (OSError, RunError):
            temporary.unlink(missing_ok=True)
            raise
        progress.advance(facts["bytes"])
    files.fsync_dir(target)
    write_json(target / MANIFEST, manifest, files=files)


def _is_copied(path: Path, facts: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and hash_file(path) == facts["xxh3_128"]


def _clear(job: Job, files: Files, *, verified: bool) -> None:
    """Remove both work folders; a `source` folder is the user's and stays."""
    assert job.final is not None
    folders = [folder for folder in (job.out, *(() if job.source else (job.raw,))) if folder.is_dir()]
    if folders and not verified:
        refuse(check_manifest(job.final, hashes=True), "faults")
    for folder in folders:
        log.info("removing %s", folder)
        files.remove_tree(folder)


# -- memory and processes --------------------------------------------------------------------------------------------


def _n_workers(job: Job, memory_bytes: int, n_tasks: int, n_bytes: int, reserve_bytes: int) -> int:
    """Return how many processes cores, tasks and memory allow, including this one."""
    if job.n_workers is None and n_bytes < _SMALL_BYTES:
        return 1
    wanted = job.n_workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    return max(min(wanted, n_tasks, memory_bytes // (_WORKER_BYTES + reserve_bytes)), 1)


def _window_bytes(memory_bytes: int, n_workers: int, reserve_bytes: int = 0) -> int:
    """Return the memory of one process for its work, without its reserve."""
    inherited_bytes = rss_bytes() if n_workers > 1 else 0
    n_bytes = memory_bytes // n_workers - inherited_bytes - (_FORK_BYTES if n_workers > 1 else 0) - reserve_bytes
    if n_bytes < FIXED_BYTES + _FORK_BYTES:
        more_gb = (FIXED_BYTES + _FORK_BYTES - n_bytes) / 1e9
        raise ConfigError(f"MEMORY is too small to work in; give at least {more_gb:.2f} GB more")
    return n_bytes
