"""How fast one device trains, in figures that can be checked: ours against a plain `transformers` loop, and every mode.

    uv run python scripts/bench_step.py                      # on this CPU: debug and a 30M model, ours and transformers
    bash scripts/bench_gpu.sh                                # on one GPU, under ten minutes: everything below
    uv run python scripts/bench_step.py --suite gpu --list   # its cases; --only NAME ... runs some of them

Suite `cpu`: both models in one process, taking turns; the ratio is that of the medians. Suite `gpu`: each case in a
process of its own (forked, so torch is imported once), most wanted first, none begun that would outlast --budget-s;
what was left out is named. Its parts:

    matmul             8192^3 bf16 products of random numbers: the rate that shares of the peak are stated against
    attention ...      forward and backward of each kernel that runs here, of whole rows and of documents in them
    <model> ...        whole updates (forward, backward, clip, AdamW) on random tokens: tokens/s, MFU, memory, power
    transformers ...   LlamaForCausalLM, torch.compile, autocast, fused AdamW, clipping: as a user would write it
    loop ...           the real trainer from jsonl to checkpoints in /dev/shm and on the disk, started cold and warm

    MFU = tokens/s * (6 N + 12 L H Q S) / peak    (PaLM, arXiv 2204.02311, appendix B; N without the embedding's lookup)

The causal-halved value counts 6 L H Q S for attention. The peak is the data sheet's (lingua/run/throughput.py); a
device without one, such as a CPU, has no MFU. A goal that is missed is said, and is
no failure: figures are for people to judge.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lingua  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import numpy as np
import torch
from torch import nn

from lingua.config.base import build_part
from lingua.config.command_line import parse_command_line
from lingua.config.keys.model import LlamaArgs
from lingua.console import show_table
from lingua.distributed.compile import let_length_vary
from lingua.distributed.parallelize import forward_precision, set_matmul_precision
from lingua.distributed.process_group import Place, World
from lingua.model.attention import ALL_IMPLS, RowDocuments, attend, build_mask, document_bounds, resolve_attn_impl
from lingua.optim.adamw import measure_gradient, optimizer_step
from lingua.run.metrics import read_metrics
from lingua.run.throughput import find_peak
from lingua.train.build import build_loss, build_model, make_deterministic
from lingua.train.check import Checked, load

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "apps" / "main" / "configs"
FORMULA = "tokens/s * (6 N + 12 L H Q S) / peak, N = parameters without the input embedding's lookup"
VOCAB = 128_256  # Llama 3's, which the recipes train with
PEAK_NAMES = {"sheet": "data sheet", "matmul": "matrix product"}
WARM_UP_STEPS = 4
ALONE = Place()

# -- what is measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model in one mode; `batches` are tried from the largest on until one fits."""

    name: str
    model: str
    """File of configs/model, or keys of a small one."""
    words: tuple[str, ...] = ()
    seq_len: int = 2048
    batches: tuple[int, ...] = (8, 4, 2, 1)
    transformers: bool = False
    seconds: float = 45.0
    """What it takes, about: it is not begun with less left."""


class Loop(NamedTuple):
    """A run of the real trainer."""

    name: str
    words: tuple[str, ...]
    seconds: float = 90.0


FULL = "distributed.full_activation_checkpointing=true"
DOCUMENTS = "data.doc_mask=true"
MEAN_DOCUMENT = 512  # positions; our choice, near web text's
GPU_CASES = (
    Case("1B bf16 2048", "llama_1B"),
    Case("transformers 1B bf16 2048", "llama_1B", transformers=True),
    Case("7B bf16 2048", "llama_7B", (FULL,), batches=(8, 4, 2, 1)),
    Case("1B float8 rowwise 2048", "llama_1B", ("distributed.float8_recipe=rowwise",)),
    Case("1B deterministic 2048", "llama_1B", ("deterministic=true",)),
    Case("1B bf16 4096", "llama_1B", seq_len=4096, batches=(4, 2, 1)),
    Case("1B documents flex 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=flex")),
    Case("1B documents varlen 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=varlen")),
    Case("280M bf16 2048", "llama_280M", batches=(32, 16, 8)),
    Case("7B float8 rowwise 2048", "llama_7B", (FULL, "distributed.float8_recipe=rowwise"), batches=(8, 4, 2, 1)),
    Case("1B float8 tensorwise 2048", "llama_1B", ("distributed.float8_recipe=tensorwise",)),
    Case("7B bf16 4096", "llama_7B", (FULL,), seq_len=4096, batches=(4, 2, 1)),
    Case("280M bf16 4096", "llama_280M", seq_len=4096, batches=(16, 8, 4)),
    Case("transformers 280M bf16 2048", "llama_280M", batches=(32, 16, 8), transformers=True),
    Case("1B documents xformers 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=xformers")),
    Case("1B documents flash_attn 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=flash_attn")),
)
GPU_LOOPS = (
    # Steps 1-20 train undisturbed, those after the save of step 20 beside it: both in one run.
    Loop("loop 1B asynchronous", ("checkpoint.async_save_mode=shm", "steps=50"), seconds=120.0),
    Loop("loop 1B synchronous", ("checkpoint.async_save_mode=null", "steps=30"), seconds=110.0),
)
SAVE_EVERY = 20

SMALL = "dim=512 n_layers=8 n_heads=8 vocab_size=8192"  # 34M parameters with its untied embeddings
DEBUG = "dim=256 n_layers=6 n_heads=4 vocab_size=258"
CPU_CASES = (
    Case("debug", DEBUG, ("distributed.compile=false", "distributed.model_dtype=fp32"), seq_len=256, batches=(4,)),
    Case("30M", SMALL, ("distributed.compile=false", "distributed.model_dtype=fp32"), seq_len=256, batches=(2,)),
)

# Everything of the GPU suite at a size for which a CPU needs seconds: to see that it runs.
TINY = "dim=64 n_layers=2 n_heads=2 vocab_size=260"
_EAGER = ("distributed.compile=false", "distributed.model_dtype=fp32")
TINY_CASES = (
    Case("1B bf16 2048", TINY, _EAGER, seq_len=32, batches=(2,)),
    Case("transformers 1B bf16 2048", TINY, _EAGER, seq_len=32, batches=(2,), transformers=True),
    Case("7B bf16 2048", TINY, (*_EAGER, FULL), seq_len=32, batches=(2,)),
    Case("1B float8 rowwise 2048", TINY, (*_EAGER, "distributed.float8_recipe=rowwise"), seq_len=32, batches=(2,)),
    Case("1B deterministic 2048", TINY, (*_EAGER, "deterministic=true"), seq_len=32, batches=(2,)),
    Case("1B documents sdpa 2048", TINY, (*_EAGER, DOCUMENTS, "model.attn_impl=sdpa"), seq_len=32, batches=(2,)),
)


def words_of(case: Case, batch: int, folder: str) -> list[str]:
    """The command line of a run of this case, with nothing in it that is not training."""
    model = [f"model.{key}" for key in case.model.split()] if "=" in case.model else [f"model={case.model}"]
    return [
        str(CONFIGS / "base" / "recipe.yaml"),
        *([f"model.vocab_size={VOCAB}"] if "=" not in case.model else []),
        *model,
        *("data.tokenizer={name: bytes, path: null}", "async_eval_gpus=null", "slurm=null", "logging.wandb=null"),
        *(f"data.seq_len={case.seq_len}", f"data.batch_size={batch}", "grad_acc_steps=1", f"dump_dir={folder}/none"),
        *("steps=1000", *case.words),
    ]


def checked(case: Case, batch: int, folder: str) -> Checked:
    return load(parse_command_line(words_of(case, batch, folder)), world_size=1)


# -- one device ------------------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_s(act: Callable[[], object], device: torch.device, repeats: int, warm_up: int) -> list[float]:
    """Seconds of each of `repeats` calls. On a GPU by its own clock, so that the host never waits in between."""
    for _ in range(warm_up):
        act()
    synchronize(device)
    if device.type != "cuda":
        times_s = []
        for _ in range(repeats):
            start_s = time.perf_counter()
            act()
            times_s.append(time.perf_counter() - start_s)
        return times_s
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        act()
        mark.record()
    synchronize(device)
    return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]  # ms


def matmul_flops(device: torch.device) -> float:
    """Measure a GPU's FLOPs/s on a large bf16 product of random numbers, median of 20."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(timed_s(lambda: a @ b, device, 20, 5))


def power_w(device: torch.device) -> float | None:
    """Watts drawn now, where the driver tells."""
    if device.type != "cuda":
        return None
    with suppress(Exception):  # no NVML, no right to read it, a GPU that does not tell: then there is no such figure
        return torch.cuda.power_draw(device) / 1000  # mW
    return None


def machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "host_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
    }


def some_documents(batch: int, seq_len: int, device: torch.device, seed: int) -> RowDocuments:
    """Documents of random lengths, MEAN_DOCUMENT positions in the mean before rows cut them."""
    begins = np.random.default_rng(seed).random((batch, seq_len)) < 1 / MEAN_DOCUMENT
    doc_ids = begins.cumsum(axis=1).astype(np.int32)
    ids, bounds = (torch.from_numpy(array).to(device) for array in (doc_ids, document_bounds(doc_ids)))
    return RowDocuments(ids, bounds)


# -- updates on random tokens --------------------------------------------------------------------------------------


class Trainer:
    """One model with its optimizer; `step` is an update on the same random rows."""

    def __init__(self, case: Case, batch: int, device: torch.device, folder: str) -> None:
        found = checked(case, batch, folder)
        self.args, self.size = found.args, found.resolved
        if self.args.deterministic:
            make_deterministic()
        set_matmul_precision(self.args.distributed)
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, case.seq_len)
        self._rows = [
            torch.randint(0, self.size.vocab_size, shape, device=device, generator=generator) for _ in range(2)
        ]
        self._documents: Iterator[RowDocuments | None] = itertools.repeat(None)
        if self.args.data.doc_mask:  # of another number in each step, as they are when one trains
            several = [some_documents(*shape, device, seed) for seed in range(4)]
            if self.args.distributed.compile:
                for each in several:
                    let_length_vary(each.bounds)
            self._documents = itertools.cycle(several)
        self.attn_impl = "sdpa"
        self._device = device
        self.step = self._ours() if not case.transformers else self._theirs()

    def _ours(self) -> Callable[[], object]:
        args, world = self.args, World(ALONE, self._device, mesh=None)
        model = build_model(args, self.size, world)
        self.attn_impl = str(getattr(model, "attn_impl", ""))
        model.train()
        loss, optimizer = build_loss(args), build_part(args.optim, list(model.named_parameters()))
        precision = forward_precision(model, args.distributed, self._device)
        parameters = list(model.parameters())
        tokens, labels = self._rows

        def step() -> None:
            with precision:
                loss_sum, _ = model(tokens, labels=labels, documents=next(self._documents), loss=loss)
            (loss_sum / labels.numel()).backward()
            _, finite, divisor = measure_gradient(parameters, args.optim.clip)
            optimizer_step(optimizer, args.optim.lr, finite, divisor)
            optimizer.zero_grad()

        return step

    def _theirs(self) -> Callable[[], object]:
        args, tokens = self.args, self._rows[0]
        assert isinstance(args.model, LlamaArgs)
        model: Any = their_model(args.model, self.size.vocab_size, self._device)
        model.train()
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


def their_model(args: LlamaArgs, vocab_size: int, device: torch.device) -> nn.Module:
    """transformers' Llama of the same shape, fp32 parameters, its own initial values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_width,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_width,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.weight_tying,
    )
    with device:
        return LlamaForCausalLM(config)


def rates(case: Case, batch: int, times_s: Sequence[float], trainer: Trainer, peaks: Mapping[str, float]) -> dict:
    """What the times of single steps mean."""
    size, median_s = trainer.size, statistics.median(times_s)
    tokens_per_s = batch * case.seq_len / median_s
    flops_per_s = tokens_per_s * size.flops_per_token
    halved = flops_per_s
    if isinstance(trainer.args.model, LlamaArgs):
        model = trainer.args.model
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


def measure(case: Case, peaks: Mapping[str, float], folder: str, steps: int) -> dict[str, Any]:
    """The case at the largest batch that fits."""
    device = pick_device()
    too_large: list[int] = []
    for batch in case.batches:
        try:
            trainer = Trainer(case, batch, device, folder)
            start_s = time.perf_counter()
            trainer.step()
            synchronize(device)
            first_step_s = time.perf_counter() - start_s
            times_s = timed_s(trainer.step, device, steps, WARM_UP_STEPS)
        except torch.cuda.OutOfMemoryError:
            too_large.append(batch)
            trainer = None
            gc.collect()
            torch.cuda.empty_cache()
            continue
        found = rates(case, batch, times_s, trainer, peaks) | {"first_step_s": first_step_s, "too_large": too_large}
        if device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            for _ in range(3):  # the GPU is busy with these while it is asked
                trainer.step()
            found["power_w"] = power_w(device)
        return found
    return {"error": f"no batch of {case.batches} fits into the memory"}


def measure_attention(
    seq_len: int, heads: int = 16, head_dim: int = 128, batch: int = 8, *, packed: bool = False
) -> dict[str, Any]:
    """TFLOP/s of forward and backward of each kernel; causal, so half of each square is counted: of the rows', or, when
    documents are `packed` in them, of the documents'. And what their mask takes, made once per step for all layers."""
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, seq_len, heads, head_dim)
    documents = some_documents(batch, seq_len, device, seed=0) if packed else None
    lengths = [seq_len] * batch if documents is None else documents.bounds.diff().tolist()
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    out_grad = torch.randn(shape, device=device, dtype=dtype)
    squares = sum(length**2 for length in lengths)
    flops = 3.5 * 4 * heads * squares * head_dim / 2  # backward has 5 products where forward has 2
    found: dict[str, Any] = {}
    for impl in ALL_IMPLS:
        model = LlamaArgs(dim=heads * head_dim, n_heads=heads, attn_impl=impl)
        try:
            resolve_attn_impl(model, device.type, dtype, doc_mask=packed)
            make_mask = partial(build_mask, impl, (batch, seq_len), None, documents, device)
            mask = make_mask()

            def step(impl: str = impl, mask: Any = mask) -> None:
                attend(impl, q, k, v, mask, None).backward(out_grad)
                q.grad = k.grad = v.grad = None

            found[impl] = {
                "tflops": flops / statistics.median(timed_s(step, device, 10, 3)) / 1e12,
                "mask_ms": statistics.median(timed_s(make_mask, device, 10, 3)) * 1e3,
            }
        except Exception as error:  # a kernel that fails here is a finding, too
            found[impl] = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return found


# -- the real trainer ------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, n_bytes: int = 64 << 20) -> None:
    """Python's own sources as jsonl, over and over."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    lines = [json.dumps({"text": path.read_text(errors="replace")}) + "\n" for path in sources]
    (folder / "sources").mkdir(parents=True)
    with (folder / "sources" / "sources.chunk.00.jsonl").open("w") as file:
        while file.tell() < n_bytes:
            file.writelines(lines)


def measure_loop(loop: Loop, case: Case, folder: Path, cache: Path) -> dict[str, Any]:
    """A run as a user starts it: seconds from the command to its first step, and steps beside and without a save."""
    run_dir = folder / loop.name.replace(" ", "_")
    words = [
        *words_of(case, case.batches[0], str(folder))[:-2],  # its dump_dir and its steps are another's
        *case.words,
        f"data.root_dir={folder}",
        *("data.sources={sources: 1}", f"checkpoint.dump={{every: {SAVE_EVERY}, keep: 1}}", "logging.freq=1"),
        *("checkpoint.eval.every=0", "sample_prompt=null", "validation.at_ends=false"),
        *loop.words,
        f"dump_dir={run_dir}",
    ]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    started_s = time.time()
    command = [sys.executable, "-m", "apps.main.train", *words]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        return {"error": (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]}
    return loop_figures(read_metrics(run_dir / "metrics.jsonl"), started_s)


def loop_figures(records: Sequence[Mapping[str, Any]], started_s: float) -> dict[str, Any]:
    """From the metrics of every step."""
    times_s = {record["global_step"]: record["speed/curr_iter_time"] for record in records}
    before = [value for step, value in times_s.items() if SAVE_EVERY // 2 < step <= SAVE_EVERY]
    beside = [value for step, value in times_s.items() if step > SAVE_EVERY + 1]
    saves = [record for record in records if "checkpoint/stall_s" in record]
    last = records[-1]
    return {
        "start_to_step_1_s": datetime.fromisoformat(records[0]["created_at"]).timestamp() - started_s,
        "step_s": statistics.median(before),
        "step_s_beside_save": statistics.median(beside),
        "slowdown": statistics.median(beside) / statistics.median(before) - 1,
        "save_stall_s": saves[0]["checkpoint/stall_s"] if saves else None,
        "drain_gb_per_s": last.get("checkpoint/drain_gb_per_s"),
        "data_load_share": statistics.median(record["speed/data_load_time"] for record in records)
        / statistics.median(times_s.values()),
        "mfu": statistics.median(record["speed/mfu"] for record in records) if "speed/mfu" in last else None,
    }


# -- suites ----------------------------------------------------------------------------------------------------------


def apart(act: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a forked process, so that its memory and its settings end with it."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sending.send(act(*args))
        except Exception as error:  # goes into the table as what this case came to
            sending.send({"error": f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"})

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        result = receiving.recv()
    except EOFError:
        result = None
    process.join()
    return {"error": f"the process ended with {process.exitcode}"} if result is None else result


def device_facts(device: torch.device | None = None) -> dict[str, Any]:
    """Describe `device` (by default the GPU, if there is one) and the peaks to state its rates against."""
    device = device or pick_device()
    facts = machine(device)
    peaks, source = {}, "not known"
    if device.type == "cuda":
        peaks["matmul"] = matmul_flops(device)
        peak = find_peak(facts["device"])
        if peak is not None:
            peaks["sheet"], source = peak.flops_per_s, peak.sheet
    return {"machine": facts, "peaks": peaks, "peak": source}


def gpu_plan(tiny: bool) -> list[tuple[str, float]]:
    """(name, seconds it takes), in the order in which they are measured."""
    cases = TINY_CASES if tiny else GPU_CASES
    first, rest = cases[:3], cases[3:]
    steps = [("attention 2048", 25.0), *((case.name, case.seconds) for case in first)]
    steps.append(("attention documents 2048", 30.0))
    steps += [(loop.name, loop.seconds) for loop in GPU_LOOPS]
    return [*steps, *((case.name, case.seconds) for case in rest)]


def gpu_suite(names: Sequence[str], tiny: bool, budget_s: float, steps: int, say: Callable[[str], None]) -> dict:
    """Measure what is named, or all, as far as the time goes."""
    began_s = time.monotonic()
    cases = {case.name: case for case in (TINY_CASES if tiny else GPU_CASES)}
    loops = {loop.name: loop for loop in GPU_LOOPS}
    result = apart(device_facts) | {"formula": FORMULA, "cases": {}, "left_out": []}
    if "error" in result:
        raise SystemExit(f"error: the device cannot be used: {result['error']}")
    with tempfile.TemporaryDirectory(prefix="lingua-bench-") as name:
        folder = Path(name)
        write_corpus(folder, 1 << 20 if tiny else 64 << 20)
        for what, seconds in gpu_plan(tiny):
            left_s = budget_s - (time.monotonic() - began_s)
            if (names and what not in names) or (not tiny and left_s < seconds):
                result["left_out"].append(what)
                continue
            say(f"{what} ({left_s:.0f} s left)")
            if what in cases:
                found = apart(measure, cases[what], result["peaks"], name, steps)
            elif what in loops:
                small = next(iter(cases.values()))
                loop = loops[what] if not tiny else loops[what]._replace(words=(loops[what].words[0], "steps=24"))
                found = measure_loop(loop, small, folder, folder / "cache")
                shutil.rmtree(folder / what.replace(" ", "_"), ignore_errors=True)
            else:
                sizes = (32, 2, 16, 2) if tiny else (2048,)
                found = apart(partial(measure_attention, *sizes, packed="documents" in what))
            result["cases"][what] = found
    return result | {"goals": goals(result["cases"]), "seconds": time.monotonic() - began_s}


def goals(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and what it came to; nothing of a case that was left out."""

    def value(case: str, key: str) -> float | None:
        return cases.get(case, {}).get(key)

    ours, plain = value("1B bf16 2048", "step_s"), value("1B deterministic 2048", "step_s")
    theirs = value("transformers 1B bf16 2048", "tokens_per_s")
    wanted: list[tuple[str, float | None, str, float]] = [
        ("MFU, 1B bf16 2048", value("1B bf16 2048", "mfu"), ">=", 0.55),
        ("share of the matrix product, 1B bf16 2048", value("1B bf16 2048", "share_of_matmul"), ">=", 0.70),
        ("MFU, 7B bf16 2048", value("7B bf16 2048", "mfu"), ">=", 0.55),
        ("deterministic over not, 1B", plain / ours if plain and ours else None, "<=", 1.05),
        ("save call, s, 1B asynchronous", value("loop 1B asynchronous", "save_stall_s"), "<=", 0.010),
        ("slow-down beside a save, 1B", value("loop 1B asynchronous", "slowdown"), "<=", 0.02),
    ]
    if theirs:
        wanted.append(("ours over transformers, 1B", (value("1B bf16 2048", "tokens_per_s") or 0) / theirs, ">=", 1.0))
    return [
        {
            "what": what,
            "value": found,
            "goal": f"{sign} {goal}",
            "met": found >= goal if sign == ">=" else found <= goal,
        }
        for what, found, sign, goal in wanted
        if found is not None
    ]


def cpu_suite(names: Sequence[str], rounds: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Ours and transformers' take turns, `steps` updates each; ratio of the medians."""
    device = torch.device("cpu")
    facts = device_facts(device)
    result: dict[str, Any] = facts | {"formula": FORMULA, "cases": {}}
    for case in CPU_CASES:
        if names and case.name not in names:
            continue
        say(case.name)
        with tempfile.TemporaryDirectory() as folder:
            batch = case.batches[0]
            both = [Trainer(each, batch, device, folder) for each in (case, replace(case, transformers=True))]
        times_s: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for mine, trainer in zip(times_s, both, strict=True):
                found = timed_s(trainer.step, device, steps, 0)
                mine += found if turn else []  # the first round warms up
        ours, theirs = (
            rates(case, batch, mine, trainer, facts["peaks"]) for mine, trainer in zip(times_s, both, strict=True)
        )
        result["cases"] |= {
            case.name: ours | {"over_transformers": ours["tokens_per_s"] / theirs["tokens_per_s"]},
            f"transformers {case.name}": theirs,
        }
    return result


# -- what is shown ---------------------------------------------------------------------------------------------------


def figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def rows_of(cases: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Iterator[list[str]]:
    for name, found in cases.items():
        if any(column in found for column in columns):
            yield [name, *(figure(found.get(column)) for column in columns)]


def show(result: Mapping[str, Any]) -> None:
    """Tables for people."""
    facts, peaks = result["machine"], result["peaks"]
    print(f"{facts['device']}, torch {facts['torch']}" + (f"; MFU = {result['formula']}" if "sheet" in peaks else ""))
    measured = [f"{name} {peaks[key] / 1e12:.4g} TFLOP/s" for key, name in PEAK_NAMES.items() if key in peaks]
    print(f"peak: {result['peak']}" + "".join(f"; {text}" for text in measured) + "\n")
    for columns in (
        ("batch_size", "step_s", "tokens_per_s", "mfu", "mfu_causal_halved", "share_of_matmul", "over_transformers"),
        ("peak_memory_gib", "power_w", "first_step_s", "attention", "error"),
        ("start_to_step_1_s", "step_s", "step_s_beside_save", "slowdown", "save_stall_s", "drain_gb_per_s"),
    ):
        picked = {
            name: found
            for name, found in result["cases"].items()
            if not name.startswith("attention") and (name.startswith("loop") == (columns[0] == "start_to_step_1_s"))
        }
        columns = [column for column in columns if any(found.get(column) is not None for found in picked.values())]
        rows = list(rows_of(picked, columns))
        if rows:
            show_table(("", *columns), rows, columns)
            print()
    for name, found in result["cases"].items():
        if name.startswith("attention"):
            show_table(
                (name, "TFLOP/s", "mask, ms", ""),
                [(k, figure(v.get("tflops")), figure(v.get("mask_ms")), v.get("error", "")) for k, v in found.items()],
            )
            print()
    for goal in result.get("goals", []):
        print(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['what']}: {figure(goal['value'])} (goal {goal['goal']})")
    if result.get("left_out"):
        print("left out: " + ", ".join(result["left_out"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases only")
    parser.add_argument("--list", action="store_true", help="name the cases of the suite")
    parser.add_argument("--budget-s", type=float, default=570.0, help="gpu: begin nothing that would take longer (570)")
    parser.add_argument("--steps", type=int, default=20, help="updates timed (20); cpu: in each round")
    parser.add_argument("--rounds", type=int, default=5, help="cpu: turns of each (5)")
    parser.add_argument(
        "--tiny", action="store_true", help="gpu: very small models, to see that it runs; also on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write that object there, too")
    options = parser.parse_args(argv)
    known = (
        [case.name for case in CPU_CASES] if options.suite == "cpu" else [name for name, _ in gpu_plan(options.tiny)]
    )
    if options.list:
        print("\n".join(known))
        return 0
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are: {', '.join(known)}")
    if options.steps < 2:
        parser.error(f"--steps {options.steps} gives no spread; at least 2")

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    if options.suite == "cpu":
        result = cpu_suite(options.only, options.rounds, options.steps, say)
    else:
        result = gpu_suite(options.only, options.tiny, options.budget_s, options.steps, say)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
