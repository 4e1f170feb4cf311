"""Measure how fast data is read and prepared: the loader against the bare tokenizer, and the shuffle of preparation.

    uv run python scripts/bench_loader.py --tokenizer FILE              # the loader
    uv run python scripts/bench_loader.py --shuffle 0.2 8 --bytes 1e9   # the shuffle, with 0.2 and 8 GB of memory
    uv run python scripts/bench_loader.py --formats                     # each format of sources against jsonl

FILE is a tiktoken rank file, such as Llama 3's `tokenizer.model`. The wheel `llama-models` carries one:

    pip download --no-deps llama-models && unzip -j llama_models-*.whl llama_models/llama3/tokenizer.model

Without it only the figures of the bytes tokenizer are measured; the others are null. The loaders take turns over the
same text, and each figure is the median of the rounds. On a shared machine compare tokens per CPU second, which counts
all processes, rather than tokens per second. The shuffle runs the command that people use, in fresh processes.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import json
import os
import pickle
import resource
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import make_parser, print_figures, timed, work_folder, write_corpus

from lingua.config.command_line import run_main
from lingua.config.keys.data import DataArgs, SourceArgs, TokenizerArgs
from lingua.data.loader import Loader, build_loader
from lingua.data.sources import FORMATS
from lingua.data.token_files import tokenize_file
from lingua.data.token_formats import pickled_pairs
from lingua.files import RunError
from lingua.tokenizer import TiktokenTokenizer, build_tokenizer

ROWS = 16  # of a batch
END = 257  # the end token of bytes
PREPARE = Path(__file__).parents[1] / "setup" / "download_prepare_hf_data.py"


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Rates:
    """Tokens per second and per CPU second, one value per round."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def take(self, n_tokens: int, act: Callable[[], object]) -> None:
        start_cpu_s = cpu_s()
        wall_s, _ = timed(act)
        self.wall.append(n_tokens / wall_s)
        self.cpu.append(n_tokens / max(cpu_s() - start_cpu_s, 1e-9))


def read(rates: Rates, args: DataArgs, n_tokens: int, **more: Any) -> None:
    """Read this many tokens from the second batch on; the first one pays for opening files and starting workers."""
    n_batches = n_tokens // args.seq_len // ROWS
    with build_loader(args, rows_per_step=ROWS, **more) as loader:
        next(loader)
        rates.take(n_batches * ROWS * args.seq_len, lambda: [next(loader) for _ in range(n_batches)])


def resume_s(args: DataArgs, row: int) -> float:
    """Return the seconds to build a loader from a state at this row and read its first batch."""
    with build_loader(args, rows_per_step=ROWS) as loader:
        for _ in range(row // ROWS if row < 10_000 else 4):
            next(loader)
        state = as_if_at(loader, row)

    def resume() -> None:
        with build_loader(args, rows_per_step=ROWS, state=state) as loader:
            next(loader)

    return timed(resume)[0]


def as_if_at(loader: Loader, row: int) -> dict[str, Any]:
    """Return the loader's state; for a late row, its lanes are moved to their positions at that row."""
    state = json.loads(json.dumps(loader.state_dict()))
    if row >= 10_000:
        for lane in state["lanes"].values():
            turns = row // state["K"] - lane["rows"]
            lane["rows"] += turns
            lane["tapes"] = {name: [place + turns * state["K"], -1] for name, (place, _) in lane["tapes"].items()}
            lane["source"] = None
        state["row"] = row // state["K"] * state["K"]
    return state


def measure_loader(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus" / "corpus.chunk.00.jsonl"
    write_corpus(corpus, int(options.bytes))
    texts = [json.loads(line)["text"] for line in corpus.open()]
    plain = DataArgs(
        root_dir=str(folder),
        sources=[SourceArgs(path="corpus")],
        seq_len=options.seq_len,
        batch_size=ROWS,
        load_async=False,
        lanes=ROWS,  # each lane has an open document, which matters in a short run
        prefetch_size=4,  # little is ready when the clock starts
    )
    rates = {name: Rates() for name in ("loader", "bare", "workers_1", "workers_2", "bytes")}
    rounds: list[Callable[[], None]] = [partial(read, rates["bytes"], plain, sum(map(len, texts)) * 8 // 10)]
    main = plain
    if options.tokenizer is not None:
        ranks = TokenizerArgs(name="tiktoken", path=str(options.tokenizer), split=options.split)
        main = plain.model_copy(update={"tokenizer": ranks})
        encoder = build_tokenizer(main.tokenizer)
        assert isinstance(encoder, TiktokenTokenizer)
        encode = encoder._model.encode_ordinary
        n_tokens = sum(len(encode(text)) for text in texts)
        rounds.append(partial(read, rates["loader"], main, n_tokens * 8 // 10, tokenizer=encoder))
        rounds.append(lambda: rates["bare"].take(n_tokens, lambda: [encode(text) for text in texts]))
        for n_workers in (1, 2):
            args = main.model_copy(update={"load_async": True, "num_workers": n_workers})
            rounds.append(partial(read, rates[f"workers_{n_workers}"], args, n_tokens * 8 // 10))
    for _ in range(options.rounds):
        for measure in rounds:
            measure()
    figures: dict[str, Any] = {}
    for name, rate in rates.items():
        figures[f"{name}_tokens_per_s"] = statistics.median(rate.wall) if rate.wall else None
        figures[f"{name}_tokens_per_cpu_s"] = statistics.median(rate.cpu) if rate.cpu else None
    for name, own, base in (
        ("workers_2_speedup", rates["workers_2"].wall, rates["workers_1"].wall),
        ("loader_share_of_bare", rates["loader"].wall, rates["bare"].wall),
        ("loader_share_of_bare_by_cpu", rates["loader"].cpu, rates["bare"].cpu),
    ):
        figures[name] = statistics.median(a / b for a, b in zip(own, base, strict=True)) if own else None
    for name, row in (("10", 10), ("10m", 10_000_000)):
        figures[f"resume_s_row_{name}"] = statistics.median(resume_s(main, row) for _ in range(options.rounds))
    n_open = len(os.listdir("/proc/self/fd"))
    with build_loader(main, rows_per_step=ROWS) as loader:
        next(loader)
        state = loader.state_dict()
        figures["state_bytes_per_lane"] = len(json.dumps(state)) / state["K"]
        figures["open_files"] = len(os.listdir("/proc/self/fd")) - n_open
    return figures | {"tokenizer": options.tokenizer and str(options.tokenizer)}


def write_formats(corpus: Path, folder: Path) -> None:
    """Write the documents of a jsonl file in each format; token formats hold bytes."""
    from datasets import Dataset
    from pyarrow import parquet, table

    for form in FORMATS:
        (folder / form).mkdir()
    for form in ("jsonl", "mmap_jsonl"):
        os.link(corpus, folder / form / corpus.name)
    texts = [json.loads(line)["text"] for line in corpus.open()]
    rows = max(1, len(texts) // (16 * ROWS))  # a row group is then a block
    parquet.write_table(table({"text": texts}), folder / "parquet" / "x.parquet", row_group_size=rows)
    Dataset.from_dict({"text": texts}).save_to_disk(folder / "arrow")
    tokenize_file(corpus, folder / "tokens" / "x.jsonl.tokens", build_tokenizer(TokenizerArgs()))
    documents = [np.append(np.frombuffer(text.encode(), np.uint8), END).astype("<u2") for text in texts]
    ids = np.concatenate(documents)
    sizes = np.array([len(document) for document in documents])
    ends = np.cumsum(sizes)
    for form, name in (("npy", "x.npy"), ("ds", "x.ds"), ("megatron", "x.bin")):
        (folder / form / name).write_bytes(ids.tobytes())
    (folder / "ds" / "x.ds.index").write_bytes(ends.astype("<u8").tobytes())
    n, begins = len(sizes), ends - sizes
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, n, n + 1) + sizes.astype("<i4").tobytes()
    (folder / "megatron" / "x.idx").write_bytes(index + (2 * begins).tobytes() + np.arange(n + 1).tobytes())
    pairs = list(zip((2 * begins).tolist(), (2 * sizes).tolist(), strict=True))
    head = struct.pack("<QI", ids.nbytes, 2)
    (folder / "pbin" / "x.pbin").write_bytes(head + ids.tobytes() + pickle.dumps(pairs))


def measure_formats(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the text bytes per second of each format, and its share of jsonl's, with the bytes tokenizer."""
    corpus = folder / "corpus.chunk.00.jsonl"
    write_corpus(corpus, int(options.bytes))
    write_formats(corpus, folder)
    n_tokens, rates = int(options.bytes) * 7 // 10, {form: Rates() for form in FORMATS}
    for _ in range(options.rounds):
        for form, rate in rates.items():
            source = SourceArgs.model_validate({"path": str(folder / form), "format": form})
            keys = {"seq_len": options.seq_len, "batch_size": ROWS, "load_async": False, "lanes": ROWS}
            read(rate, DataArgs.model_validate({"sources": [source], **keys}), n_tokens)
    figures: dict[str, Any] = {}
    for form, rate in rates.items():
        figures[f"{form}_bytes_per_s"] = statistics.median(rate.wall)
        figures[f"{form}_bytes_per_cpu_s"] = statistics.median(rate.cpu)
        shares = [own / jsonl for own, jsonl in zip(rate.cpu, rates["jsonl"].cpu, strict=True)]
        figures[f"{form}_of_jsonl_by_cpu"] = statistics.median(shares)
    pairs = pickle.dumps([(2 * n, 2) for n in range(1_000_000)])
    figures["pbin_index_s_per_million_documents"] = timed(lambda: sum(1 for _ in pickled_pairs(pairs)))[0]
    return figures


def measure_shuffle(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the seconds (including fsync) and peak memory of preparing the corpus, for each memory budget."""
    corpus = folder / "source" / "corpus.jsonl"
    write_corpus(corpus, int(options.bytes), 100, 10_000)
    figures: dict[str, Any] = {"corpus_bytes": corpus.stat().st_size}
    for memory_gb in options.shuffle:
        with work_folder(folder) as work:
            command = [sys.executable, str(PREPARE), "bench", str(memory_gb), "--source", str(corpus.parent), "--json"]
            command += ["--data_dir", f"{work}/data", "--tmp_dir", f"{work}/tmp", "--nchunks", "8"]
            seconds, ended = timed(partial(subprocess.run, command, capture_output=True, text=True, check=False))
            if ended.returncode:
                raise RunError(ended.stderr.removeprefix("error: ").strip())
            figures[f"with_{memory_gb:g}_gb_s"] = seconds
            figures[f"with_{memory_gb:g}_gb_peak_rss_bytes"] = json.loads(ended.stdout)["peak_rss_bytes"]
    return figures


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, help="tiktoken rank file (see above)")
    parser.add_argument("--split", default="auto", help="how it splits text, as data.tokenizer.split (%(default)s)")
    parser.add_argument(
        "--shuffle", type=float, nargs="+", metavar="GB", help="measure the shuffle, with these budgets"
    )
    parser.add_argument("--formats", action="store_true", help="measure each format against jsonl")
    parser.add_argument("--bytes", type=float, default=6e7, help="size of the corpus (%(default)g)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each figure is their median (%(default)s)")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a row (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where to work (the system's temporary folder)")
    options = parser.parse_args(words)
    if not (options.shuffle or options.formats) and options.tokenizer is None:
        print("no --tokenizer: only the bytes tokenizer is measured (--help says where a file is)", file=sys.stderr)
    with work_folder(options.dir) as folder:
        measure = measure_formats if options.formats else measure_shuffle if options.shuffle else measure_loader
        figures = measure(options, folder)
    print_figures(figures | {"cores": len(os.sched_getaffinity(0))}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
