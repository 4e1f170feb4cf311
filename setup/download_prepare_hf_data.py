"""Download a data set, shuffle it and split it into chunks: `lingua.data.prepare.pipeline` from the command line.

    uv run python setup/download_prepare_hf_data.py fineweb_edu_10bt 8 --data_dir data --nchunks 8
    uv run python setup/download_prepare_hf_data.py mine 8 --source ~/texts --data_dir data

If it is interrupted, the same command continues. `data.sources: {fineweb_edu_10bt_shuffled: 100}` with
`data.root_dir: data` then reads the chunks.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import orjson

from lingua.config.command_line import run_main
from lingua.console import Progress
from lingua.data.prepare import hub
from lingua.data.prepare.convert import READ
from lingua.data.prepare.counts import Counts
from lingua.data.prepare.pipeline import Job, prepare
from lingua.data.prepare.worker_pool import peak_rss_bytes
from lingua.files import plural
from lingua.logger import start_logging


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type for numbers in a range."""

    def parse_number(text: str) -> float:
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse_number.__name__ = kind.__name__  # shown in argparse's messages
    return parse_number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", help=f"one of {', '.join(sorted(hub.DATASETS))}; with --source any name")
    add(
        "memory",
        type=number(float, 0, 1e6),
        metavar="MEMORY",
        help="GB (10^9 bytes) that all processes may hold together",
    )
    add("--data_dir", type=Path, default=Path("data"), help="work folder: the download and the chunks (%(default)s)")
    add("--tmp_dir", type=Path, default=Path("/tmp"), help="fast disk for sorted runs of all text (%(default)s)")
    add("--seed", type=number(int, -(1 << 63), 1 << 63), default=42, help="of the shuffle (%(default)s)")
    add("--nchunks", type=number(int, 1, 1 << 31), default=32, help="files to split into (%(default)s)")
    add("--final_data_dir", type=Path, help="copy the result there, checked")
    add("--clear_work_dir_after_transfer_to_final", action="store_true", help="then remove both work folders")
    add("--source", type=Path, help=f"folder or file of {READ} instead of the hub; needs no network")
    add("--text_key", help="field (or column) with the text (text, else content); data.sources needs it too")
    add("--max_bad_fraction", type=float, default=0.01, help="end if more lines hold no document (%(default)s)")
    add("--revision", help="branch, tag or commit of the data set (main, as it is at the first start)")
    add("--offline", action="store_true", help="ask no hub: use a complete download, or end at once")
    add("--workers", type=number(int, 1, 1 << 31), help="processes (as many as cores and memory allow)")
    add("--json", action="store_true", help="print the manifest, seconds per stage and peak memory as JSON")
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args(
        [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), w) for w in words]
    )


def main(words: list[str]) -> int:
    args = parse(words)
    start_logging()
    if args.offline:
        hub.stay_offline()
    job = Job(
        dataset=args.dataset,
        memory_bytes=int(args.memory * 1e9),
        data_dir=args.data_dir,
        tmp_dir=args.tmp_dir,
        seed=args.seed,
        n_chunks=args.nchunks,
        final_data_dir=args.final_data_dir,
        clear=args.clear_work_dir_after_transfer_to_final,
        source=args.source,
        revision=args.revision,
        n_workers=args.workers,
        text_key=args.text_key,
        max_bad_fraction=args.max_bad_fraction,
    )
    progress = Progress()
    manifest = prepare(job, progress=progress)
    if args.json:
        facts = {"seconds": progress.seconds, "peak_rss_bytes": peak_rss_bytes()}
        sys.stdout.buffer.write(orjson.dumps(manifest | facts) + b"\n")
    else:
        counts = Counts(**manifest["counts"])
        print(f"{plural(counts.documents, 'document')} in {job.final or job.out}{counts.left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
