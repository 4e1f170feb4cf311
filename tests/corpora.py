"""Small corpora for the tests of the loader, with documents that can be told apart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lingua.config.keys.data import DataArgs


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
