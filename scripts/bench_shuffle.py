"""How fast the shuffle is and how much memory it takes: `uv run python scripts/bench_shuffle.py [--json]`.

Writes a jsonl file, shuffles it in fresh processes through the command people use, once per memory budget, and prints
bytes, seconds (fsync included), the budget and the largest resident memory of all its processes together.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

SETUP = Path(__file__).resolve().parents[1] / "setup" / "download_prepare_hf_data.py"


def write_corpus(path: Path, n_bytes: int) -> int:
    """Lines of 100 B to 10 kB made of real source text; returns the bytes written."""
    rng = random.Random(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(errors="replace") for file in files)
    cuts = [(rng.randrange(len(text) - 10_000), int(100 * 100 ** rng.random())) for _ in range(4000)]
    lines = [json.dumps({"text": text[at : at + length]}).encode() + b"\n" for at, length in cuts]
    written = 0
    with path.open("wb") as file:
        while written < n_bytes:
            written += file.write(b"".join(rng.sample(lines, 1000)))
    return written


def measure(source: Path, folder: Path, memory_gb: float, workers: int | None) -> dict[str, float]:
    command = [sys.executable, str(SETUP), "bench", str(memory_gb), "--source", str(source), "--json"]
    command += ["--data_dir", str(folder / "data"), "--tmp_dir", str(folder / "tmp"), "--nchunks", "8"]
    command += ["--workers", str(workers)] if workers else []
    start_s = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start_s
    if ended.returncode:
        raise SystemExit(ended.stderr)
    facts = json.loads(ended.stdout)
    return {
        "seconds": seconds,
        "memory_budget_bytes": int(memory_gb * 1e9),
        "peak_rss_bytes": facts["peak_rss_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=0.97e9, help="size of the corpus (%(default)g)")
    parser.add_argument("--memory", type=float, nargs="+", default=[0.2, 8], help="budgets in GB (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes (as the command itself chooses)")
    parser.add_argument("--dir", type=Path, help="where to work (the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        (folder / "source").mkdir()
        n_bytes = write_corpus(folder / "source" / "corpus.jsonl", int(args.bytes))
        runs = []
        for memory_gb in args.memory:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                facts = measure(folder / "source", Path(work), memory_gb, args.workers)
                runs.append({"bytes": n_bytes, **facts})
    if args.json:
        print(json.dumps(runs))
        return
    for run in runs:
        gb, budget_gb, peak_gb = (run[key] / 1e9 for key in ("bytes", "memory_budget_bytes", "peak_rss_bytes"))
        rate = f"{run['seconds']:.1f} s, {1000 * gb / run['seconds']:.0f} MB/s"
        print(f"{gb:.2f} GB with {budget_gb:g} GB of memory: {rate}, at most {peak_gb:.2f} GB resident")


if __name__ == "__main__":
    main()
