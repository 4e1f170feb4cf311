"""Download data sets from the Hugging Face hub, at one commit, and check each file against the hub's hash.

Promise: the branch is resolved to a commit once; that commit is recorded before the first byte and kept on every later
start. A file counts as downloaded only if its size and hash are those that the hub published (SHA-256 for large files,
git's own for small ones). Killed and started again, the download continues: huggingface_hub resumes and retries it.
Cost: one read of each file to hash it, after all of them have arrived.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lingua.data.prepare.convert import SUFFIXES
from lingua.data.prepare.worker_pool import is_disk_full, need_space
from lingua.files import DISK, Files, RunError, make_folders, read_json, write_json

log = logging.getLogger(__name__)

STATE = ".download.json"
N_THREADS = 16
REACH_S = 5.0
"""Timeout for a connection to the hub."""


class HubSet(NamedTuple):
    """Where a data set lives on the hub."""

    repo: str
    pattern: str
    """Pattern of its file names, as in `fnmatch`."""


DATASETS = {
    "fineweb_edu": HubSet("HuggingFaceFW/fineweb-edu", "data/*.parquet"),
    "fineweb_edu_10bt": HubSet("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "dclm_baseline_1.0": HubSet("mlfoundations/dclm-baseline-1.0", "*.jsonl.zst"),
    "dclm_baseline_1.0_10prct": HubSet("mlfoundations/dclm-baseline-1.0", "global-shard_01_of_10/*.jsonl.zst"),
    "dclm_pool_1b_1x": HubSet("mlfoundations/dclm-pool-1b-1x", "*.jsonl.*"),
    "cosmopedia_v2": HubSet("HuggingFaceTB/smollm-corpus", "cosmopedia-v2/*.parquet"),
    "python_edu": HubSet("HuggingFaceTB/smollm-corpus", "python-edu/*.parquet"),
}


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it."""

    path: str
    n_bytes: int
    sha256: str | None
    """Hash of a large file; None for a small one."""
    git_sha1: str
    """Git's hash of the content; used for small files."""

    def has_size(self, folder: Path) -> bool:
        path = folder / self.path
        return path.is_file() and path.stat().st_size == self.n_bytes

    def is_in(self, folder: Path) -> bool:
        """Return whether `folder` holds the file with exactly this content."""
        if not self.has_size(folder):
            return False
        with (folder / self.path).open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            return hashlib.sha1(b"blob %d\0" % self.n_bytes + file.read()).hexdigest() == self.git_sha1


@dataclass(frozen=True)
class Snapshot:
    """A data set at one commit, as STATE records it."""

    repo: str
    requested: str
    revision: str
    files: list[HubFile]
    complete: bool = False
    """All files arrived and were checked."""


@contextmanager
def asking_the_hub(what: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence with a remedy. Raises RunError at once if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, by --offline or the environment"
        raise RunError(f"{what}: {why}, so the hub cannot be asked; unset it")
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise
        reason = (str(error).strip() or "no details").splitlines()[0].rstrip(".")
        raise RunError(
            f"{what}: {type(error).__name__}: {reason}; check the network, the name, the revision and your access "
            "(HF_TOKEN), then give the same command again: it continues from here"
        ) from error


def stay_offline() -> None:
    """Send no requests to the hub from now on, as if HF_HUB_OFFLINE had been set before the start."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def must_reach_hub() -> None:
    """Raise OSError unless the hub, or the proxy, accepts a connection: the hub's client would retry for minutes."""
    from huggingface_hub import constants

    log.info("asking %s", constants.ENDPOINT)
    place = urlsplit(constants.ENDPOINT)
    if (proxy := getproxies().get(place.scheme)) and not proxy_bypass(place.netloc):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = place.hostname or "", place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), REACH_S).close()
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be reached ({error.strerror or error})") from None


def fetch(
    dataset: str,
    folder: Path,
    revision: str | None,
    *,
    begin: Callable[[str, int], None],
    advance: Callable[[int], None],
    files: Files = DISK,
) -> Snapshot:
    """Download the whole data set into `folder` and check it. `revision`: branch, tag or commit."""
    snapshot = _recorded(folder, revision) or _resolve(dataset, revision or "main")
    make_folders(folder, files=files)
    missing = [file for file in snapshot.files if not file.has_size(folder)]
    if snapshot.complete and not missing:
        return snapshot
    if snapshot.complete:
        log.warning(
            "%d files are missing or cut off, the first is %s; fetching them again", len(missing), missing[0].path
        )
    write_json(folder / STATE, asdict(replace(snapshot, complete=False)), files=files)
    need_space(folder, sum(file.n_bytes for file in missing), "--data-dir")

    _download(snapshot, DATASETS[dataset], folder)
    begin(f"check {snapshot.repo}", sum(file.n_bytes for file in snapshot.files))
    if wrong := _remove_wrong(snapshot.files, folder, advance):
        log.warning("arrived damaged: %d files, such as %s; fetching them again", len(wrong), wrong[0].path)
        _download(snapshot, DATASETS[dataset], folder)
        if wrong := _remove_wrong(wrong, folder, advance):
            raise RunError(
                f"{wrong[0].path} of {snapshot.repo} arrived twice with other content than the hub says; "
                "give the same command again later: it continues from here"
            )
    snapshot = replace(snapshot, complete=True)
    write_json(folder / STATE, asdict(snapshot), files=files)
    return snapshot


def _recorded(folder: Path, revision: str | None) -> Snapshot | None:
    """Return what an earlier start resolved, or None if there was none."""
    try:
        state = read_json(folder / STATE)
    except FileNotFoundError:
        return None
    snapshot = Snapshot(**state | {"files": [HubFile(**file) for file in state["files"]]})
    if revision not in (None, snapshot.requested, snapshot.revision):
        raise ValueError(
            f"{folder} was begun with revision {snapshot.requested} ({snapshot.revision}), not {revision}; "
            "leave --revision out to continue with it, or remove that folder"
        )
    return snapshot


def _resolve(dataset: str, revision: str) -> Snapshot:
    """Ask the hub for the commit of a revision and for its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    place, api = DATASETS[dataset], HfApi()
    with asking_the_hub(f"listing {place.repo} at {revision}"):
        must_reach_hub()
        commit = api.dataset_info(place.repo, revision=revision).sha
        assert isinstance(commit, str)
        found = [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in api.list_repo_tree(place.repo, recursive=True, revision=commit, repo_type="dataset")
            if isinstance(entry, RepoFile) and fnmatchcase(entry.path, place.pattern) and entry.path.endswith(SUFFIXES)
        ]
    if not found:
        raise RunError(f"{place.repo} at {commit} has no files {place.pattern}; try another --revision")
    return Snapshot(place.repo, revision, commit, sorted(found, key=lambda file: file.path))


def _download(snapshot: Snapshot, place: HubSet, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with asking_the_hub(f"fetching {snapshot.repo}"):
        must_reach_hub()
        snapshot_download(
            snapshot.repo,
            repo_type="dataset",
            revision=snapshot.revision,
            allow_patterns=[place.pattern],
            local_dir=folder,
            max_workers=N_THREADS,
        )


def _remove_wrong(files: Sequence[HubFile], folder: Path, advance: Callable[[int], None]) -> list[HubFile]:
    """Hash the files; remove and return those with other content, since the hub's client trusts existing files."""
    wrong = []
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="hash") as pool:
        for file, right in zip(files, pool.map(lambda file: file.is_in(folder), files), strict=True):
            if right:
                advance(file.n_bytes)
            else:
                (folder / file.path).unlink(missing_ok=True)
                wrong.append(file)
    return wrong
