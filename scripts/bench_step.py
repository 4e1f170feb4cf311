"""Measure how fast one device trains: our updates against a plain `transformers` loop, and the real trainer.

    uv run python scripts/bench_step.py                      # this CPU: debug and a 30M model, ours and transformers
    uv run python scripts/bench_step.py --suite families     # this CPU: every model family at 1M and 5M parameters
    bash scripts/bench_gpu.sh                                # one GPU, in under ten minutes: everything below
    uv run python scripts/bench_step.py --list               # names the cases; --only NAME ... runs some of them

Suite `cpu`: both models in one process, alternating; `over_transformers` is the ratio of the medians. Suite `families`
does the same against transformers' model of that kind, if it has one, and our Llama of that size (`over_llama`), and
measures cached generation of one row at two positions, in tokens/s. The cases, here and in bench_gpu.py:

    attention ...      forward and backward of each kernel that runs here, on whole rows and on documents in them
    <model> ...        whole updates (forward, backward, clip, AdamW) on random tokens: tokens/s, MFU, memory, power
    transformers ...   LlamaForCausalLM, torch.compile, autocast, fused AdamW, clipping: as a user would write it
    loop ...           the real trainer from jsonl to checkpoints: start-up, tokens/s, saves; `outside_share` is the
                       part of a step that is not forward, backward or optimizer

    MFU = tokens/s * (6 N + 12 L H Q S) / peak    (PaLM, arXiv 2204.02311, appendix B; N without the embedding's lookup)

`mfu_causal_halved` counts 6 L H Q S for attention; `share_of_matmul` compares with an 8192^3 bf16 product measured in
the same run. The peak is the data sheet's (lingua/run/throughput.py); a device without one, such as a CPU, has no MFU.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import torch
from bench_budget import die_with_parent
from bench_cases import CPU_CASES, Case, checked, command_of, family_cases
from bench_common import format_figure, make_parser, timed, write_corpus
from bench_kernels import device_facts, pick_device, some_documents, step_seconds, synchronize

from lingua.config.base import build_part
from lingua.config.command_line import run_main
from lingua.config.keys.model import LlamaArgs
from lingua.console import show_table
from lingua.distributed.compile import let_length_vary
from lingua.distributed.parallelize import forward_precision, set_matmul_precision
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.files import RunError
from lingua.model.attention import RowDocuments
from lingua.model.context import Cache
from lingua.model.huggingface import translation_of
from lingua.optim.update import grad_norm_and_clip_coef, optimizer_step
from lingua.run.metrics import read_metrics
from lingua.train.build import build_loss, build_model, make_deterministic
from lingua.train.sizes import Resolved

ROOT = Path(__file__).parents[1]
FORMULA = "tokens/s * (6 N + 12 L H Q S) / peak, N = parameters without the input embedding's lookup"
WARM_UP_STEPS = 3
TIMED_S = 15.0  # per case on a GPU; its clock needs no more
LOOP = "loop debug"  # the case of the CPU suite
SAVE_EVERY = 20  # a loop trains undisturbed up to this step, and beside the save after it

# -- updates on random tokens --------------------------------------------------------------------------------------


class Trainer:
    """One model with its optimizer; `step` is an update on the same random rows."""

    def __init__(self, case: Case, batch: int, device: torch.device) -> None:
        found = checked(case, batch)
        self.args, self.size = found.args, found.resolved
        if self.args.deterministic:
            make_deterministic()
        set_matmul_precision(self.args.distributed)
        generator, shape = torch.Generator(device).manual_seed(0), (batch, case.seq_len)
        self._rows = [
            torch.randint(0, self.size.vocab_size, shape, device=device, generator=generator) for _ in range(2)
        ]
        self._documents: Iterator[RowDocuments | None] = itertools.repeat(None)
        if self.args.data.doc_mask:  # a different number in each step, as in training
            several = [some_documents(*shape, device, seed) for seed in range(4)]
            if self.args.distributed.compile:
                for each in several:
                    let_length_vary(each.bounds)
            self._documents = itertools.cycle(several)
        self.attn_impl = "sdpa"
        self._device = device
        self.step = self._theirs() if case.transformers else self._ours()

    def _ours(self) -> Callable[[], object]:
        args = self.args
        model = build_model(args, self.size, World(RankInfo(), self._device, mesh=None))
        self.attn_impl = str(getattr(getattr(model.args, "attention", None), "attn_impl", ""))
        model.train()
        loss, optimizer = build_loss(args), build_part(args.optim, list(model.named_parameters()))
        precision = forward_precision(model, args.distributed, self._device)
        parameters = list(model.parameters())
        tokens, labels = self._rows
        if args.model.n_labels > 1:
            labels = labels.expand(args.model.n_labels, *labels.shape)

        def step() -> None:
            with precision:
                loss_sum, _ = model(tokens, labels=labels, documents=next(self._documents), loss=loss)
            (loss_sum.sum() / labels.numel()).backward()
            _, finite, divisor = grad_norm_and_clip_coef(parameters, args.optim.clip)
            optimizer_step(optimizer, args.optim.lr, finite, divisor)
            optimizer.zero_grad()

        return step

    def _theirs(self) -> Callable[[], object]:
        """Build transformers' model of the same shape, with fp32 parameters and its own initial values."""
        args, tokens = self.args, self._rows[0]
        with self._device:
            model: Any = their_model(args.model, self.size)
        model.train()
        ours = args.model.model_copy(update={"vocab_size": self.size.vocab_size}).n_params()
        if (theirs := sum(parameter.numel() for parameter in model.parameters())) != ours:
            raise RunError(f"transformers' {type(model).__name__} has {theirs:,} parameters, and ours has {ours:,}")
        if args.distributed.compile:
            model = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.optim.lr, fused=True)
        half = args.distributed.model_dtype != "fp32"

        def step() -> None:
            with torch.autocast(self._device.type, dtype=torch.bfloat16) if half else nullcontext():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.optim.clip)
            optimizer.step()
            optimizer.zero_grad()

        return step


def their_model(model: Any, size: Resolved) -> Any:
    """Build transformers' model of the same shape."""
    import transformers

    translation = translation_of(model)
    assert translation is not None
    sizes = {"vocab_size": size.vocab_size, "max_seqlen": size.seq_len}
    theirs = translation.config_json(model, **sizes, dtype="float32", special={})
    if model.type == "mlstm":  # it trains only in this mode
        theirs |= {"mode": "train", "return_last_states": True, "use_cache": False}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**theirs))


@torch.no_grad()
def generation_rates(case: Case, positions: Sequence[int], repeats: int) -> dict[str, float]:
    """Return the tokens/s of cached generation of one row at these positions."""
    found = checked(case, 1)
    end = max(positions) + repeats
    size = replace(found.resolved, max_seqlen=max(end, found.resolved.max_seqlen))
    model = build_model(found.args, size, World(RankInfo(), torch.device("cpu"), mesh=None)).eval()
    cache, at, rates_at = Cache(n_slots=end), 0, {}

    def go(n_tokens: int) -> None:
        nonlocal at
        cache.end = at + n_tokens
        tokens = torch.randint(0, size.vocab_size, (1, n_tokens))
        model(tokens, cache=cache, positions=torch.arange(at, at + n_tokens)[None], select=torch.tensor([n_tokens - 1]))
        at += n_tokens

    for position in positions:
        while at < position:
            go(min(500, position - at))
        rates_at[f"generated_at_{position}"] = 1 / statistics.median(timed(partial(go, 1))[0] for _ in range(repeats))
    return rates_at


def rates(case: Case, batch: int, times_s: Sequence[float], trainer: Trainer, peaks: Mapping[str, float]) -> dict:
    """Summarize the times of single steps."""
    size, median_s = trainer.size, statistics.median(times_s)
    tokens_per_s = batch * case.seq_len / median_s
    flops_per_s = halved = tokens_per_s * size.flops_per_token
    if isinstance(model := trainer.args.model, LlamaArgs):
        halved -= tokens_per_s * 6 * model.n_layers * model.heads * model.head_width * case.seq_len
    deciles = statistics.quantiles(times_s, n=10)
    sheet, matmul = peaks.get("sheet"), peaks.get("matmul")
    return {
        "n_params": size.n_params,
        "batch_size": batch,
        "seq_len": case.seq_len,
        "attention": trainer.attn_impl,
        "steps": len(times_s),
        "step_s": median_s,
        "step_s_p10_p90": [deciles[0], deciles[-1]],
        "tokens_per_s": tokens_per_s,
        **({"mfu": flops_per_s / sheet, "mfu_causal_halved": halved / sheet} if sheet else {}),
        **({"share_of_matmul": flops_per_s / matmul} if matmul else {}),
    }


def measure(
    case: Case, batch: int, peaks: Mapping[str, float], steps: int, trace: Path | None = None
) -> dict[str, Any]:
    """Measure the case in this process; with `trace`, also the longest kernels of one more step."""
    device = pick_device()
    if case.allocator and device.type == "cuda":
        torch._C._accelerator_setAllocatorSettings(case.allocator)  # before the first allocation
    trainer = Trainer(case, batch, device)
    first_step_s, _ = timed(lambda: (trainer.step(), synchronize(device)))
    step_s = statistics.median(step_seconds(trainer.step, device, 2, WARM_UP_STEPS))
    if device.type == "cuda":
        steps = n_timed(step_s, steps)
    times_s = step_seconds(trainer.step, device, steps, 0)
    found = rates(case, batch, times_s, trainer, peaks) | {"first_step_s": first_step_s}
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        for _ in range(3):  # keeps the GPU busy during the query
            trainer.step()
        with suppress(Exception):  # no NVML, or no permission: leave the figure out
            found["power_w"] = torch.cuda.power_draw(device) / 1000  # mW
    if trace is not None:
        found["kernels"] = longest_kernels(trainer.step, device, trace)
    return found


def n_timed(step_s: float, steps: int) -> int:
    """Return the number of steps to time: at most `steps` and those in TIMED_S, but at least eight."""
    return min(steps, max(8, int(TIMED_S / step_s)))


def expected_s(flops: float, steps: int, compiled: bool) -> float:
    """Return the expected seconds of a case on an H200 or H100: initialization, compiling, steps at 45% of the peak.

    12 and 40 s are guesses until a GPU is there: on two CPU cores, compiling a small model took 20 to 43 s.
    """
    step_s = flops / (0.45 * 989.5e12)
    return 12.0 + (40.0 if compiled else 0.0) + step_s * (WARM_UP_STEPS + 6 + n_timed(step_s, steps))


def longest_kernels(step: Callable[[], object], device: torch.device, trace: Path, n: int = 20) -> list[list[Any]]:
    """Return [name, ms, share] of the longest kernels of one step; the file `trace` has all of them."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        step()
        synchronize(device)
    profiled.export_chrome_trace(str(trace))
    of_kernel = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")  # microseconds
    kernels = sorted(profiled.key_averages(), key=of_kernel, reverse=True)
    total = sum(map(of_kernel, kernels)) or 1
    return [[kernel.key, of_kernel(kernel) / 1000, of_kernel(kernel) / total] for kernel in kernels[:n]]


# -- the real trainer ------------------------------------------------------------------------------------------------


def measure_loop(case: Case, batch: int, folder: Path, mode: str, steps: int) -> dict[str, Any]:
    """Run the trainer as users start it; `mode`: checkpoint.async_save_mode."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    if not (folder / "sources").is_dir():
        write_corpus(folder / "sources" / "sources.chunk.00.jsonl", 1 << 20 if case.seq_len < 2048 else 64 << 20)
    words = command_of(
        *(case, batch, run_dir, f"data.root_dir={folder}", "data.sources={sources: 1}", "logging.freq=1"),
        *(
            f"checkpoint.dump={{every: {SAVE_EVERY}, keep: 1}}",
            f"checkpoint.async_save_mode={mode}",
            "checkpoint.slots=1",
        ),
        *("checkpoint.eval.every=0", "sample_prompt=null", "validation.at_ends=false", f"steps={steps}"),
        *("profiling.run=true", f"profiling.light_steps={steps}", "profiling.mem_steps=0", "profiling.profile_steps=0"),
    )
    cache = folder / "cache"  # the first loop compiles, the second starts warm
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    started_s = time.time()
    command = [sys.executable, "-m", "apps.main.train", *words]
    ended = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, preexec_fn=die_with_parent
    )
    if ended.returncode != 0:
        return {"error": (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]}
    profile = next((run_dir / "profiling").glob("light_*_rank0.jsonl")).read_text()
    found = loop_figures(
        read_metrics(run_dir / "metrics.jsonl"), [json.loads(line) for line in profile.splitlines()], started_s
    )
    return found | {"batch_size": batch, "save": kind_of_save(mode, ended.stdout + ended.stderr)}


def kind_of_save(mode: str, log: str) -> str:
    """Describe how the loop saved: as requested, or synchronously, and why."""
    if mode == "null":
        return "synchronous"
    if "staged in" in log and "copied synchronously" not in log:
        return "asynchronous"
    why = [line.strip() for line in log.splitlines() if "synchronous" in line]
    return f"synchronous, not as asked for: {why[0] if why else 'the log does not say why'}"


def loop_figures(
    records: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]], started_s: float
) -> dict[str, Any]:
    """Return the figures of a run from the metrics of every step and the light profile."""
    before = [record for record in records if SAVE_EVERY // 2 < record["global_step"] <= SAVE_EVERY]
    beside = [record for record in records if record["global_step"] > SAVE_EVERY]
    stalls = [record["checkpoint/stall_s"] for record in records if "checkpoint/stall_s" in record]
    step_s, beside_s = (statistics.median(r["speed/curr_iter_time"] for r in each) for each in (before, beside))
    return {
        "start_to_step_1_s": datetime.fromisoformat(records[0]["created_at"]).timestamp() - started_s,
        "step_s": step_s,
        "tokens_per_s": statistics.median(record["speed/wps"] for record in before),
        "outside_share": statistics.median(
            (times["time/data_s"] + times["time/rest_s"]) / times["time/step_s"] for times in phases
        ),
        "step_s_of_copy": beside[0]["speed/curr_iter_time"],  # the step during the copy to the host
        "step_s_beside_save": beside_s,
        "slowdown": beside_s / step_s - 1,
        "save_stall_s": stalls[0] if stalls else None,
        "drain_gb_per_s": records[-1].get("checkpoint/drain_gb_per_s"),
        "mfu": statistics.median(r["speed/mfu"] for r in records) if "speed/mfu" in records[-1] else None,
    }


# -- suites ----------------------------------------------------------------------------------------------------------


def cpu_suite(
    cases: Sequence[Case],
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    with_loop: bool = False,
    positions: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure a case and its rivals in turn, `steps` updates each; then generation at `positions`, and the trainer."""
    device = torch.device("cpu")
    facts = device_facts(device)
    found: dict[str, Any] = {}
    for case in cases:
        say(case.name)
        batch, group = case.batches[0], (case, *case.rivals)
        trainers = [Trainer(each, batch, device) for each in group]
        times_s: list[list[float]] = [[] for _ in group]
        for turn in range(rounds + 1):
            for mine, trainer in zip(times_s, trainers, strict=True):
                taken = step_seconds(trainer.step, device, steps, 0)
                mine += taken if turn else []  # the first round warms up
        measured = [
            rates(each, batch, mine, trainer, facts["peaks"])
            for each, mine, trainer in zip(group, times_s, trainers, strict=True)
        ]
        ours = measured[0]
        for rival, theirs in zip(case.rivals, measured[1:], strict=True):
            ours[f"over_{rival.name.split()[0]}"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
            if rival.transformers:
                found[rival.name] = theirs
        if positions:
            ours |= generation_rates(case, positions, rounds * steps)
        found[case.name] = ours
    if with_loop:
        say(LOOP)
        with tempfile.TemporaryDirectory(prefix="lingua-bench-") as folder:
            found[LOOP] = measure_loop(CPU_CASES[0], CPU_CASES[0].batches[0], Path(folder), "shm", 2 * SAVE_EVERY)
    return facts | {"formula": FORMULA, "cases": found}


# -- output ----------------------------------------------------------------------------------------------------------

UPDATES = ("n_params", "batch_size", "step_s", "tokens_per_s", "mfu", "mfu_causal_halved", "share_of_matmul")
RATIOS = ("over_transformers", "over_llama", *(f"generated_at_{n}" for n in (10, 20, 100, 10_000)))
DEVICE = ("peak_memory_gib", "power_w", "first_step_s", "attention", "error")
LOOPS = ("start_to_step_1_s", "step_s", "tokens_per_s", "outside_share", "step_s_of_copy", "step_s_beside_save")
KERNELS = ("tflops", "mask_ms", "error")
SAVES = ("slowdown", "save_stall_s", "drain_gb_per_s", "mfu", "save", "error")


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    facts, peaks, cases = result["machine"], result["peaks"], result["cases"]
    if facts:
        formula = f"; MFU = {result['formula']}" if "sheet" in peaks else ""
        print(f"{facts['device']}, torch {facts['torch']}{formula}")
    print(f"peak: {result['peak']}" + "".join(f"; {name} {rate / 1e12:.4g} TFLOP/s" for name, rate in peaks.items()))
    loops = {name: found for name, found in cases.items() if name.startswith("loop")}
    kernels = {
        name: {"": found} if "error" in found else found
        for name, found in cases.items()
        if name.startswith("attention")
    }
    updates = {name: found for name, found in cases.items() if name not in {*loops, *kernels}}
    tables = [("updates", updates, UPDATES), ("", updates, RATIOS), ("", updates, DEVICE)]
    tables += [("real trainer", loops, LOOPS), ("", loops, SAVES)]
    for title, some, wanted in [*tables, *((name, found, KERNELS) for name, found in kernels.items())]:
        columns = [column for column in wanted if any(found.get(column) is not None for found in some.values())]
        if columns:
            rows = [[name, *(format_figure(found.get(key)) for key in columns)] for name, found in some.items()]
            print()
            show_table((title, *columns), rows, columns)
    for name, found in cases.items():
        if "kernels" in found:
            rows = [(kernel[:100], format_figure(ms), f"{share:.1%}") for kernel, ms, share in found["kernels"]]
            print()
            show_table((f"longest kernels, {name}", "ms", "share"), rows, ("ms", "share"))
    print()
    for goal in result.get("goals", []):
        verdict = "met   " if goal["met"] else "MISSED"
        print(f"{verdict}  {goal['what']}: {format_figure(goal['value'])} (goal {goal['goal']})")
    if result.get("running"):
        print(f"ended during: {result['running']}")
    if result.get("left_out"):
        print("left out: " + ", ".join(result["left_out"]))


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--suite", choices=("cpu", "families"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases only")
    parser.add_argument("--list", action="store_true", help="name the cases of the suite")
    parser.add_argument("--steps", type=int, default=20, help="updates timed in each round (20)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--tiny", action="store_true", help="families: tiny models, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the JSON object there, too")
    options = parser.parse_args(words)
    families = options.suite == "families"
    cases = family_cases(options.tiny) if families else CPU_CASES
    known = [*(case.name for case in cases), *(() if families else (LOOP,))]
    check_options(parser, options, known)
    if options.list:
        print("\n".join(known))
        return 0
    say = partial(print, file=sys.stderr, flush=True)
    chosen = [case for case in cases if not options.only or case.name in options.only]
    positions = ((10, 20) if options.tiny else (100, 10_000)) if families else ()
    with_loop = not families and (not options.only or LOOP in options.only)
    result = cpu_suite(chosen, options.rounds, options.steps, say, with_loop, positions)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def check_options(parser: ArgumentParser, options: Namespace, known: Sequence[str]) -> None:
    """Refuse unknown names and bad numbers."""
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"no case {unknown[0]!r}; there are: {', '.join(known)}")
    if options.steps < 2:
        parser.error(f"--steps {options.steps} gives no spread; at least 2")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
