"""Data sets from the Hugging Face hub, at one commit, each file checked against the hub's own hash.

Promise: the branch is resolved to a commit once; that commit is recorded before the first byte and kept on every later
start. A file counts as there only when its size and hash are those the hub published (SHA-256 of large files, git's own
of small ones). Broken connections are tried again with growing pauses; started again, only what is missing is fetched.
Cost: one read of each file to hash it; a file that was cut off by a kill is fetched again from its beginning.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lingua.data.prepare.convert import SUFFIXES
from lingua.data.prepare.worker_pool import is_disk_full, need_space
from lingua.files import DISK, Files, RunError, make_folders, read_json, write_json

log = logging.getLogger(__name__)

STATE = ".download.json"
N_THREADS = 16
PAUSES_S = (1.0, 4.0, 15.0, 60.0, 240.0)


@dataclass(frozen=True)
class HubSet:
    """Where a data set lives on the hub."""

    repo: str
    pattern: str
    """Of the file names that belong to it, as in `fnmatch`."""


DATASETS = {
    "fineweb_edu": HubSet("HuggingFaceFW/fineweb-edu", "data/*"),
    "fineweb_edu_10bt": HubSet("HuggingFaceFW/fineweb-edu", "sample/10BT/*"),
    "dclm_baseline_1.0": HubSet("mlfoundations/dclm-baseline-1.0", "*.jsonl.zst"),
    "dclm_baseline_1.0_10prct": HubSet("mlfoundations/dclm-baseline-1.0", "global-shard_01_of_10/*.jsonl.zst"),
    "dclm_pool_1b_1x": HubSet("mlfoundations/dclm-pool-1b-1x", "*.jsonl.*"),
    "cosmopedia_v2": HubSet("HuggingFaceTB/smollm-corpus", "cosmopedia-v2/*"),
    "python_edu": HubSet("HuggingFaceTB/smollm-corpus", "python-edu/*"),
}


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it."""

    path: str
    n_bytes: int
    sha256: str | None
    """Of large files."""
    git_sha1: str
    """Of small files: git's hash of the content."""

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds this very content."""
        if not path.is_file() or path.stat().st_size != self.n_bytes:
            return False
        with path.open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            return hashlib.sha1(b"blob %d\0" % self.n_bytes + file.read()).hexdigest() == self.git_sha1


@dataclass(frozen=True)
class Snapshot:
    """A data set at one commit."""

    repo: str
    requested: str
    revision: str
    files: list[HubFile]
    complete: bool = False


def may_pass(error: Exception) -> bool:
    """Whether trying again can help: broken connections, time-outs, a busy hub; not refusals, not the local disk."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # the client's word for "could not reach the hub"
        return True
    if is_disk_full(error) or isinstance(error, ValueError | RunError | TypeError | LookupError | AttributeError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return not isinstance(error, OSError) or error.errno is None or isinstance(error, ConnectionError | TimeoutError)


def persist(action: Callable[[], Any], what: str, sleep: Callable[[float], None] = time.sleep) -> Any:
    """Result of `action`, tried again while the failure may pass. Raises RunError that says what failed at last."""
    from huggingface_hub import constants

    for pause_s in (*PAUSES_S, None):
        if constants.HF_HUB_OFFLINE:
            raise RunError(f"{what}: HF_HUB_OFFLINE is set, so nothing is asked of the hub; unset it")
        try:
            return action()
        except Exception as error:
            if is_disk_full(error) or isinstance(error, RunError):
                raise
            reason = f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if not may_pass(error):
                raise RunError(f"{reason}; check the name, the revision, and your access (HF_TOKEN)") from error
            if pause_s is None:
                raise RunError(
                    f"{reason}; tried {len(PAUSES_S) + 1} times. Start again: it goes on from here"
                ) from error
            log.warning("%s; trying again in %.0f s", reason, pause_s)
            sleep(pause_s)
    raise AssertionError


def fetch(
    dataset: str,
    folder: Path,
    revision: str | None,
    *,
    begin: Callable[[str, int], None],
    advance: Callable[[int], None],
    sleep: Callable[[float], None] = time.sleep,
    files: Files = DISK,
) -> Snapshot:
    """Have the whole data set in `folder`, checked; returns what it is. `revision`: branch, tag or commit."""
    if dataset not in DATASETS:
        raise ValueError(
            f"no data set {dataset!r}; there are {', '.join(sorted(DATASETS))}, and any name with --source FOLDER"
        )
    snapshot = _recorded(folder, revision) or _resolve(dataset, revision or "main", sleep)
    make_folders(folder, files=files)
    if snapshot.complete:
        cut = [f.path for f in snapshot.files if not _has_size(folder / f.path, f.n_bytes)]
        if not cut:
            return snapshot
        log.warning("%d files of %s are gone or cut off, %s first; fetching them again", len(cut), folder, cut[0])
    write_json(folder / STATE, asdict(snapshot), files=files)
    _get_all(snapshot, folder, begin, advance, sleep)
    snapshot = replace(snapshot, complete=True)
    write_json(folder / STATE, asdict(snapshot), files=files)
    return snapshot


def _recorded(folder: Path, revision: str | None) -> Snapshot | None:
    try:
        state = read_json(folder / STATE)
    except FileNotFoundError:
        return None
    snapshot = Snapshot(**state | {"files": [HubFile(**file) for file in state["files"]]})
    if revision not in (None, snapshot.requested, snapshot.revision):
        raise ValueError(
            f"{folder} was begun with revision {snapshot.requested} ({snapshot.revision}), not {revision}; "
            "leave --revision out to go on with it, or remove that folder"
        )
    return snapshot


def _resolve(dataset: str, revision: str, sleep: Callable[[float], None]) -> Snapshot:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    place, api = DATASETS[dataset], HfApi()
    what = f"listing {place.repo} at {revision}"
    commit = persist(lambda: api.dataset_info(place.repo, revision=revision).sha, what, sleep)
    assert isinstance(commit, str)

    def listing() -> list[HubFile]:
        tree = api.list_repo_tree(place.repo, recursive=True, revision=commit, repo_type="dataset")
        return [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile) and fnmatchcase(entry.path, place.pattern) and entry.path.endswith(SUFFIXES)
        ]

    found = sorted(persist(listing, what, sleep), key=lambda file: file.path)
    if not found:
        raise RunError(f"{place.repo} at {commit} has no files {place.pattern}; try another --revision")
    return Snapshot(place.repo, revision, commit, found)


def _has_size(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def _get_all(
    snapshot: Snapshot,
    folder: Path,
    begin: Callable[[str, int], None],
    advance: Callable[[int], None],
    sleep: Callable[[float], None],
) -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar of ours for everything
    missing_bytes = sum(f.n_bytes for f in snapshot.files if not _has_size(folder / f.path, f.n_bytes))
    need_space(folder, missing_bytes, "--data_dir")
    begin(f"download {snapshot.repo}", sum(f.n_bytes for f in snapshot.files))

    pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="download")
    try:
        waiting = [pool.submit(_get_one, snapshot, file, folder, sleep) for file in snapshot.files]
        for file, done in zip(snapshot.files, waiting, strict=True):
            done.result()
            advance(file.n_bytes)
    finally:
        pool.shutdown(cancel_futures=True)


def _get_one(snapshot: Snapshot, file: HubFile, folder: Path, sleep: Callable[[float], None]) -> None:
    from huggingface_hub import hf_hub_download

    path = folder / file.path
    if file.is_at(path):
        return

    def get() -> None:
        path.unlink(missing_ok=True)  # the hub's client trusts what it finds
        hf_hub_download(snapshot.repo, file.path, repo_type="dataset", revision=snapshot.revision, local_dir=folder)
        if not file.is_at(path):
            path.unlink(missing_ok=True)
            raise ConnectionError(f"{file.path} arrived with other content than the hub says")

    persist(get, f"fetching {file.path} of {snapshot.repo}", sleep)
