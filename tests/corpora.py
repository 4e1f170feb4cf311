"""Small corpora for the tests of the loader, with documents that can be told apart, and runs over them."""

from __future__ import annotations

import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lingua.config.keys.data import DataArgs
from lingua.data.loader import Loader, build_loader, merge_states
from lingua.tokenizer import ByteTokenizer
from tests.resume import assert_resumes_everywhere

G = 24  # rows per step: shared by 1, 2, 3, 4 and 8 ranks
Table = dict[int, list[int]]  # row used as the q-th of the run -> its inputs and last label


def write_source(folder: Path, name: str, documents: list[str], n_files: int = 2) -> Path:
    """Folder `name` with the documents dealt to `n_files` chunks."""
    source = folder / name
    source.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents[i::n_files]]
        (source / f"{name}.chunk.{i:02d}.jsonl").write_text("".join(lines))
    return source


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 7) -> Path:
    """A parquet file of these columns (lists, or arrays of pyarrow)."""
    from pyarrow import parquet, table

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(columns), path, row_group_size=row_group_size)
    return path


def write_dataset(folder: Path, columns: dict[str, Any], n_files: int = 2) -> Path:
    """What Hugging Face's datasets saves: arrow files, with a few rows in a batch."""
    from datasets import Dataset, config

    before, config.DEFAULT_MAX_BATCH_SIZE = config.DEFAULT_MAX_BATCH_SIZE, 7
    try:
        Dataset.from_dict(columns).save_to_disk(folder, num_shards=n_files)
    finally:
        config.DEFAULT_MAX_BATCH_SIZE = before
    return folder


def write_tokens(form: str, path: Path, documents: list[list[int]], width: int = 2) -> Path:
    """A token file as another trainer would write it (path without suffix), by the layout of its package."""
    ids = np.array([i for document in documents for i in document])
    ends = np.cumsum([len(document) for document in documents])
    begins = [0, *ends[:-1].tolist()]
    data = ids.astype(f"<u{width}" if form != "megatron" or width == 2 else "<i4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + {"megatron": ".bin"}.get(form, f".{form}"))
    if form == "pbin":
        index = [(width * begin, width * len(one)) for begin, one in zip(begins, documents, strict=True)]
        data = struct.pack("<QI", len(data), width) + data + pickle.dumps(index)
    elif form == "megatron":
        code, n = {2: 8, 4: 4}[width], len(documents)
        index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, n, n + 1)
        index += np.array([len(one) for one in documents], "<i4").tobytes()
        index += np.array([width * begin for begin in begins], "<i8").tobytes() + np.arange(n + 1).tobytes()
        file.with_suffix(".idx").write_bytes(index)
    elif form == "ds":
        file.with_name(f"{file.name}.index").write_bytes(ends.astype("<u8").tobytes())
    file.write_bytes(data)
    return file


def documents(tag: str, n: int, longest: int = 120, seed: int = 0) -> list[str]:
    """Texts `<tag><number>:...` of random length."""
    rng = random.Random(f"{tag}{seed}")
    return [f"{tag}{i}:" + "abc de\nfé"[: rng.randrange(9)] * rng.randrange(longest // 8 + 1) for i in range(n)]


def data_args(root: Path, **changed: Any) -> DataArgs:
    """Two sources of very different size, small rows."""
    plain: dict[str, Any] = {
        "root_dir": str(root),
        "sources": {"big": 3.0, "small": 1.0},
        "seq_len": 16,
        "batch_size": 2,
        "load_async": False,
    }
    return DataArgs(**{**plain, **changed})


def two_sources(root: Path) -> Path:
    """`big`: 200 documents in 3 files; `small`: 3 documents, one long."""
    write_source(root, "big", documents("b", 200), n_files=3)
    write_source(root, "small", ["s0", "s1:" + "xy " * 300, "s2"], n_files=1)
    return root


def run_steps(
    args: DataArgs, n_steps: int, dp: int = 1, state: dict[str, Any] | None = None, n_rows: int = G, **more: Any
) -> tuple[Table, dict[str, Any]]:
    """Rows of `n_steps` steps of `n_rows` on `dp` ranks, and the merged state, as it travels through a checkpoint."""
    table: Table = {}
    states = []
    start = state["row"] if state else 0
    for rank in range(dp):
        with build_loader(args, rows_per_step=n_rows, dp_rank=rank, dp_size=dp, state=state, **more) as loader:
            for micro in range(n_steps * n_rows // dp // args.batch_size):
                batch = next(loader)
                for i in range(args.batch_size):
                    q = start + (micro * args.batch_size + i) * dp + rank
                    table[q] = [*batch.views[0, i].tolist(), int(batch.views[-1, i, -1])]
                    assert args.skip_rows or batch.rows[i] == q
            states.append(json.loads(json.dumps(loader.state_dict())))
    return table, merge_states(states[::-1])


def assert_loader_resumes(args: DataArgs, n: int, tail: int, dp_rank: int = 1, dp_size: int = 2) -> None:
    """A loader restored after any of n batches goes on as the first one did."""
    loaders: list[Loader] = []

    def make(state: dict[str, Any] | None) -> Loader:
        loaders.append(build_loader(args, rows_per_step=4, dp_rank=dp_rank, dp_size=dp_size, state=state))
        return loaders[-1]

    try:
        assert_resumes_everywhere(make, n=n, tail=tail)
    finally:
        for loader in loaders:
            loader.close()


class PanicException(BaseException):
    """As a panic in Rust arrives."""


class FailingTokenizer(ByteTokenizer):
    """Fails on text with an `!`, as a tokenizer in Rust does."""

    def encode_text(self, text: str) -> np.ndarray:
        if "!" in text:
            raise PanicException("stack size exceeded")
        return super().encode_text(text)
