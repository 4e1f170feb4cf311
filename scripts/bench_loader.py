"""How fast the loader is: `uv run python scripts/bench_loader.py --tokenizer FILE [--json]`.

FILE is a tiktoken rank file, such as Llama 3's `tokenizer.model`. The wheel `llama-models` carries one:

    pip download --no-deps llama-models && unzip -j llama_models-*.whl llama_models/llama3/tokenizer.model

Without it the figures that need one are null; those of the bytes tokenizer need none. Every figure is the median of
several rounds in which the things compared take turns, over the same text. Machines are shared: CPU seconds of all
processes stand beside wall seconds, and a rate per CPU second beside each rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lingua.config.keys.data import DataArgs, SourceArgs, TokenizerArgs
from lingua.data.loader import Loader, build_loader
from lingua.tokenizer import TiktokenTokenizer, build_tokenizer

ROWS = 16  # of a batch


def write_corpus(folder: Path, n_bytes: int) -> list[str]:
    """One source of source-code documents of 1 to 20 kB; returns the texts."""
    rng, texts = random.Random(0), []
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(errors="replace") for file in files)
    while n_bytes > 0:
        at, length = rng.randrange(len(text) - 20_000), int(1000 * 20 ** rng.random())
        texts.append(text[at : at + length])
        n_bytes -= length
    folder.mkdir()
    with (folder / "corpus.chunk.00.jsonl").open("w") as out:
        out.writelines(json.dumps({"text": each}) + "\n" for each in texts)
    return texts


class Lap(NamedTuple):
    """What one measurement took."""

    n_tokens: int
    wall_s: float
    cpu_s: float


def cpu_s() -> float:
    """CPU seconds of this process and of those of its children that have ended (from their start on)."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Clock:
    """Tokens per wall second and per CPU second of one round."""

    def __init__(self, measure: Callable[[], Lap]) -> None:
        self._measure = measure
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def round(self) -> None:
        lap = self._measure()
        self.wall.append(lap.n_tokens / lap.wall_s)
        self.cpu.append(lap.n_tokens / max(lap.cpu_s, 1e-9))

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"{name}_tokens_per_s": statistics.median(self.wall),
            f"{name}_tokens_per_cpu_s": statistics.median(self.cpu),
        }


def read(args: DataArgs, n_rows: int, **more: Any) -> Lap:
    """Reading so many rows, from the second batch on; the first one pays for opening files and starting workers."""
    with build_loader(args, rows_per_step=ROWS, **more) as loader:
        next(loader)
        start_s, start_cpu_s = time.perf_counter(), cpu_s()
        for _ in range(n_rows // ROWS):
            next(loader)
        wall_s = time.perf_counter() - start_s
    return Lap(n_rows // ROWS * ROWS * args.seq_len, wall_s, cpu_s() - start_cpu_s)


def resume_s(args: DataArgs, row: int) -> float:
    """Seconds from nothing to the first batch, of a state at this row."""
    with build_loader(args, rows_per_step=ROWS) as loader:
        for _ in range(row // ROWS if row < 10_000 else 4):
            next(loader)
        state = as_if_at(loader, row)
    start = time.perf_counter()
    with build_loader(args, rows_per_step=ROWS, state=state) as loader:
        next(loader)
        return time.perf_counter() - start


def as_if_at(loader: Loader, row: int) -> dict[str, Any]:
    """The loader's state; for a late row its lanes moved there on the tape, which is how far they would have come."""
    state = json.loads(json.dumps(loader.state_dict()))
    if row >= 10_000:
        for lane in state["lanes"].values():
            turns = row // state["K"] - lane["rows"]
            lane["rows"] += turns
            lane["tapes"] = {name: [place + turns * state["K"], -1] for name, (place, _) in lane["tapes"].items()}
            lane["source"] = None
        state["row"] = row // state["K"] * state["K"]
    return state


def measure(tokenizer: Path | None, n_bytes: int, n_rounds: int, seq_len: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        texts = write_corpus(Path(name) / "corpus", n_bytes)
        plain = DataArgs(
            root_dir=name,
            sources=[SourceArgs(path="corpus")],
            seq_len=seq_len,
            batch_size=ROWS,
            load_async=False,
            lanes=ROWS,  # each lane has a document in hand, which counts in a short run
            prefetch_size=4,  # little is ready when the clock starts
        )
        clocks = {"bytes": Clock(lambda: read(plain, 8 * n_bytes // 10 // seq_len))}
        main = plain
        if tokenizer is not None:
            main = plain.model_copy(update={"tokenizer": TokenizerArgs(name="tiktoken", path=str(tokenizer))})
            encoder = build_tokenizer(main.tokenizer)
            assert isinstance(encoder, TiktokenTokenizer)
            encode = encoder._model.encode_ordinary
            n_tokens = sum(map(len, map(encode, texts)))
            n_rows = n_tokens * 8 // 10 // seq_len
            clocks |= {
                "loader": Clock(lambda: read(main, n_rows, tokenizer=encoder)),
                "bare": Clock(lambda: bare(encode, texts, n_tokens)),
                "workers_1": Clock(lambda: read(working(main, 1), n_rows)),
                "workers_2": Clock(lambda: read(working(main, 2), n_rows)),
            }
        for _ in range(n_rounds):
            for clock in clocks.values():
                clock.round()
        figures: dict[str, Any] = {}
        for key in ("loader", "bare", "workers_1", "workers_2", "bytes"):
            figures |= clocks[key].figures(key) if key in clocks else {f"{key}_tokens_per_s": None}
        one, two = figures["workers_1_tokens_per_s"], figures["workers_2_tokens_per_s"]
        figures["workers_2_speedup"] = two / one if one else None
        bare_rate = figures["bare_tokens_per_s"]
        figures["loader_share_of_bare"] = figures["loader_tokens_per_s"] / bare_rate if bare_rate else None
        if bare_rate:
            shares = [a / b for a, b in zip(clocks["loader"].cpu, clocks["bare"].cpu, strict=True)]
            figures["loader_share_of_bare_by_cpu"] = statistics.median(shares)
        figures["resume_s_row_10"] = statistics.median(resume_s(main, 10) for _ in range(n_rounds))
        figures["resume_s_row_10m"] = statistics.median(resume_s(main, 10_000_000) for _ in range(n_rounds))
        figures |= small_things(main)
    return {**figures, "tokenizer": str(tokenizer) if tokenizer else None, "cores": len(os.sched_getaffinity(0))}


def bare(encode: Callable[[str], list[int]], texts: list[str], n_tokens: int) -> Lap:
    start_s, start_cpu_s = time.perf_counter(), cpu_s()
    for text in texts:
        encode(text)
    return Lap(n_tokens, time.perf_counter() - start_s, cpu_s() - start_cpu_s)


def working(args: DataArgs, n_workers: int) -> DataArgs:
    return args.model_copy(update={"load_async": True, "num_workers": n_workers})


@contextlib.contextmanager
def counted_descriptors() -> Iterator[Callable[[], int]]:
    before = len(os.listdir("/proc/self/fd"))
    yield lambda: len(os.listdir("/proc/self/fd")) - before


def small_things(args: DataArgs) -> dict[str, float]:
    """Size of the state and descriptors of a loader in this process."""
    with counted_descriptors() as n_open, build_loader(args, rows_per_step=ROWS) as loader:
        for _ in range(8):
            next(loader)
        state = loader.state_dict()
        return {"state_bytes_per_lane": len(json.dumps(state)) / state["K"], "open_files": n_open()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tiktoken rank file (see above)")
    parser.add_argument("--bytes", type=float, default=6e7, help="text of the corpus (%(default)g)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which medians are told (%(default)s)")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a row (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.tokenizer is None:
        print(
            "no --tokenizer: figures of a tiktoken tokenizer are left out (--help tells where one is)", file=sys.stderr
        )
    figures = measure(args.tokenizer, int(args.bytes), args.rounds, args.seq_len)
    if args.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        print(f"{key:<28} {value:,.4g}" if isinstance(value, float) else f"{key:<28} {value}")


if __name__ == "__main__":
    main()
