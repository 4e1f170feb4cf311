"""Downloads from a small hub on loopback: pinned, checked, taken up again. Each in a process of its own, because the
hub's client reads HF_ENDPOINT when it is imported."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import orjson
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from lingua.data.prepare.hub import DATASETS, HubFile, asking_the_hub
from lingua.files import RunError
from tests.hub import FakeHub

RUN = """
import sys, time
time.sleep = lambda seconds: None  # the hub's client pauses before it tries again
sys.path.insert(0, "setup")
import download_prepare_hf_data as script
sys.exit(script.run_main(script.main, sys.argv[1:]))
"""


def test_without_a_network_the_command_says_so_at_once(tmp_path: Path):
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    silent.close()  # now nobody listens there, and connections are refused
    env = {**os.environ, "HF_ENDPOINT": f"http://{address}", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", RUN, "fineweb_edu_10bt", "1", "--data_dir", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"asking http://{address}" in done.stderr
    assert f"listing HuggingFaceFW/fineweb-edu at main: OSError: {address} cannot be reached (Connection" in done.stderr
    offline = subprocess.run([*command, "--offline"], env=env, capture_output=True, text=True, check=False)
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set, by --offline or the environment" in offline.stderr
    assert "asking" not in offline.stderr


def texts(n: int, name: str) -> list[dict[str, str]]:
    return [{"text": f"{name} {number} " + "z" * 50, "id": f"{name}-{number}"} for number in range(n)]


def parquet_bytes(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist([row | {"score": 0.5} for row in rows])
    parquet.write_table(table, sink, row_group_size=100, compression="none")
    return sink.getvalue()


def zst_bytes(rows: list[dict[str, str]]) -> bytes:
    return zstandard.compress(b"\n".join(orjson.dumps(row) for row in rows))


@dataclass
class Result:
    code: int
    error: str
    facts: dict[str, object]


def start(server: FakeHub, folder: Path, dataset: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, dataset, "1", "--data_dir", str(folder / "data"), "--nchunks", "2", "--json"]
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_secret"}
    command += ["--tmp_dir", str(folder / "tmp"), *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(server: FakeHub, folder: Path, dataset: str, *options: str) -> Result:
    process = start(server, folder, dataset, *options)
    out, error = process.communicate()
    assert "hf_secret" not in out + error
    assert not any(b"hf_secret" in path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file())
    return Result(process.returncode, error, json.loads(out) if out else {})


def lines_in(folder: Path) -> Counter[str]:
    return Counter(
        orjson.loads(line)["id"] for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_parquet_over_a_connection_that_breaks(tmp_path: Path) -> None:
    rows = [texts(300, "a"), texts(200, "b"), texts(9, "other")]
    files = {
        "README.md": b"# not data",
        "sample/10BT/000.parquet": parquet_bytes(rows[0]),
        "sample/10BT/001.parquet": parquet_bytes(rows[1]),
        "data/x.parquet": parquet_bytes(rows[2]),
    }
    with FakeHub(files, breaks=1, refusals=1) as server:
        server.wrong.add("sample/10BT/001.parquet")
        result = run(server, tmp_path, "fineweb_edu_10bt")
        assert result.code == 0, result.error
        assert "arrived damaged: 1 files, such as sample/10BT/001.parquet; fetching them again" in result.error
        assert (server.breaks, server.refusals, server.wrong) == (0, 0, set())
        assert server.keys == {"Bearer hf_secret"}
        assert not any("/resolve/" in request and "10BT" not in request for request in server.requests)
    out = tmp_path / "data/fineweb_edu_10bt_shuffled"
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"fineweb_edu_10bt.{name}.jsonl" for name in ("chunk.00", "chunk.01", "val")),
        "manifest.json",
    ]
    assert lines_in(out) == Counter(row["id"] for part in rows[:2] for row in part)
    assert (result.facts["repo"], result.facts["revision"]) == ("HuggingFaceFW/fineweb-edu", "a" * 40)
    assert result.facts["documents"] == 500


@pytest.mark.soak
def test_zst_and_the_commit_of_the_first_start_is_kept(tmp_path: Path) -> None:
    """The hub moves on and then goes away; what was begun is what is finished."""
    names = [f"global-shard_01_of_10/local-shard_{n}_of_10/s.jsonl.zst" for n in range(3)]
    files = {name: zst_bytes(texts(100, str(n))) for n, name in enumerate(names)}
    with FakeHub(files | {"global-shard_02_of_10/s.jsonl.zst": zst_bytes(texts(5, "no"))}) as server:
        short = dict(server.files)
        server.files[names[2]] = b""  # nothing comes for the third file: its connection breaks every time
        server._entry = lambda name, data: FakeHub._entry(server, name, short[name])  # type: ignore[method-assign]
        first = run(server, tmp_path, "dclm_baseline_1.0_10prct")
        assert first.code == 1
        assert "s.jsonl.zst" in first.error
        assert "it continues from here" in first.error
        server.files = short
        server.commit = "b" * 40
        n_requests = len(server.requests)
        second = run(server, tmp_path, "dclm_baseline_1.0_10prct")
        assert second.code == 1, "the hub has forgotten the commit"
        assert all("a" * 40 in request for request in server.requests[n_requests:])
        server.commit = "a" * 40
        n_requests = len(server.requests)
        third = run(server, tmp_path, "dclm_baseline_1.0_10prct")
        assert third.code == 0, third.error
        asked = server.requests[n_requests:]
        assert [name for name in names if any(r.startswith("GET") and r.endswith(name) for r in asked)] == names[2:]
        assert not any("/revision/" in request for request in asked)
    out = tmp_path / "data/dclm_baseline_1.0_10prct_shuffled"
    before = content(out)
    assert lines_in(out) == Counter(f"{n}-{number}" for n in range(3) for number in range(100))
    for path in out.iterdir():
        path.unlink()
    gone = run(server, tmp_path, "dclm_baseline_1.0_10prct")  # no hub there any more: the download is whole
    assert gone.code == 0, gone.error
    assert content(out) == before
    other = run(server, tmp_path, "dclm_baseline_1.0_10prct", "--revision", "v2")
    assert other.code == 2
    assert "revision aaaa" in other.error


def test_a_download_that_is_killed_fetches_only_what_is_missing(tmp_path: Path) -> None:
    names = [f"cosmopedia-v2/{n}.parquet" for n in range(2)]
    with FakeHub({name: parquet_bytes(texts(100, name)) for name in names}) as server:
        killed = threading.Event()

        def hang(request: BaseHTTPRequestHandler, name: str) -> None:
            if request.command == "GET" and name == names[1]:
                killed.wait()
            else:
                FakeHub._file(server, request, name)

        server._file = hang  # type: ignore[method-assign]
        process = start(server, tmp_path, "cosmopedia_v2")
        while not list((tmp_path / "data").rglob("0.parquet.metadata")):  # the client's mark of a whole file
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.communicate()
        killed.set()
        del server._file
        n_requests = len(server.requests)
        result = run(server, tmp_path, "cosmopedia_v2")
        assert result.code == 0, result.error
        asked = [request for request in server.requests[n_requests:] if request.startswith("GET")]
        assert len(asked) == 1
        assert asked[0].endswith(names[1])
    assert lines_in(tmp_path / "data/cosmopedia_v2_shuffled").total() == 200


def test_a_refusal_is_not_tried_again(tmp_path: Path) -> None:
    with FakeHub({}) as server:
        result = run(server, tmp_path, "cosmopedia_v2")
    assert result.code == 1
    assert result.error.splitlines()[-1].startswith("error: HuggingFaceTB/smollm-corpus at aaaa")
    assert "has no files cosmopedia-v2/*" in result.error


def test_the_known_data_sets() -> None:
    """The names that recipes use."""
    assert sorted(DATASETS) == [
        "cosmopedia_v2", "dclm_baseline_1.0", "dclm_baseline_1.0_10prct", "dclm_pool_1b_1x",
        "fineweb_edu", "fineweb_edu_10bt", "python_edu",
    ]  # fmt: skip


def test_content_is_checked(tmp_path: Path) -> None:
    small = HubFile("x", 6, None, "ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object
    large = HubFile("x", 6, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", "")  # sha256sum
    for content, right in ((b"hello\n", True), (b"hellO\n", False), (b"hello", False)):
        (tmp_path / "x").write_bytes(content)
        assert [file.is_in(tmp_path) for file in (small, large)] == [right, right]


def test_errors_of_the_hub_are_one_sentence_and_a_full_disk_stays_one() -> None:
    with (
        pytest.raises(
            RunError, match=r"^listing x: LookupError: no such one; check the network, .* continues from here$"
        ),
        asking_the_hub("listing x"),
    ):
        raise LookupError("no such one.\nmore")
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("Data processing error: No space left on device"),
    ):
        with pytest.raises(type(error)) as raised, asking_the_hub("listing x"):
            raise error
        assert raised.value is error


def test_an_offline_environment_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        pytest.raises(RunError, match=r"fetching x: HF_HUB_OFFLINE is set, .*; unset it"),
        asking_the_hub("fetching x"),
    ):
        pytest.fail("asked the hub")
