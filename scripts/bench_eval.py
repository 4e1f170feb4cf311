"""Measure the speed of evaluations: our model in lm-evaluation-harness against its own `hf` model.

    uv run --extra harness python scripts/bench_eval.py [--json] [--rounds 5] [--documents 12] [--batch 16]

In one process, on the CPU and without a network: a checkpoint with random weights is made in a temporary folder (the
model of apps/main/configs/bytes.yaml; key=value change it) and exported for `hf`. Both answer the same questions, with
the same number of rows in a batch, taking turns in every round:

    choices      multiple choice, four answers of several tokens each
    letters      multiple choice, four answers of one token each, as in MMLU
    pages        likelihood of whole texts that are longer than the context
    answers      greedy text until a stop string
    validation   held-out documents, by `lingua eval` alone

Figures are medians over the rounds; the first round warms up. A speedup is `hf`'s seconds over ours in the same round,
so above 1 we are faster. Different answers are an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import torch
from bench_common import make_parser, print_figures, timed

from apps.cli.export import Format, make_export
from apps.main.args import TrainArgs
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.base import build_part
from lingua.config.command_line import run_main
from lingua.config.compose import compose
from lingua.config.frozen import dump_yaml, freeze
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.config.keys.eval import EvalArgs, HarnessArgs, HeldOutArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.data.held_out import Wording
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.eval.harness import make_lm, run_tasks
from lingua.eval.harness_tasks import be_offline
from lingua.eval.measures import MeasuredModel, build_held_out
from lingua.eval.scorer import Scorer
from lingua.files import RunError
from lingua.model.generate import Generator
from lingua.train.load_model import load_model

CONFIG = "apps/main/configs/bytes.yaml"
ANSWER_TOKENS = 32


def make_run(run_dir: Path, overrides: list[str]) -> None:
    """Make a run with one checkpoint of random weights."""
    args = compose(CONFIG, [], [*overrides, f"dump_dir={run_dir}"], TrainArgs).args
    sized = {"vocab_size": 258, "max_seqlen": args.data.seq_len}
    model = build_part(args.model.model_copy(update=sized))
    model.init_weights(1)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(freeze(args, {f"model.{k}": v for k, v in sized.items()})))
    manager = CheckpointManager(CheckpointArgs(), run_dir)
    manager.save(1, TrainState(model, torch.optim.AdamW(model.parameters())))
    manager.close()


def make_tasks(folder: Path, n_documents: int, context: int) -> list[dict[str, Any]]:
    """Make a task of each kind over a file of made-up text, with questions of lengths up to the context's."""
    draw, words = random.Random(1), ["return", "self", "import", "for", "in", "range", "lambda", "x", "def", "None"]

    def text(n_characters: int) -> str:
        found = ""
        while len(found) < n_characters:
            found += draw.choice(words) + " "
        return found[:n_characters].strip()

    lines = [
        {
            "question": text(draw.randrange(20, context - 60)),
            "gold": draw.randrange(4),
            "options": [text(draw.randrange(8, 40)) for _ in range(4)],
            "page": text(2 * context),
            "text": text(draw.randrange(50, 3 * context)),
        }
        for _ in range(n_documents)
    ]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_text": "{{question}}"}
    until = {"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
    page = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    answer = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{page}}"}
    return [
        common | choice | {"task": "choices", "doc_to_choice": "{{options}}"},
        common | choice | {"task": "letters", "doc_to_choice": ["A", "B", "C", "D"]},
        common | page | {"task": "pages", "metric_list": [{"metric": "bits_per_byte"}]},
        common | answer | {"task": "answers", "generation_kwargs": until, "metric_list": [{"metric": "exact_match"}]},
    ]


def answers_of(found: dict[str, Any], task: str) -> list[Any]:
    """Return a model's answers in a comparable form."""
    answers = [sample["resps"] for sample in found["samples"][task]]
    if task == "answers":  # bytes that are not UTF-8: hf shows each as one character, we as \\xNN
        return [re.sub(r"\\x[0-9a-f]{2}", "\N{REPLACEMENT CHARACTER}", answer) for ((answer,),) in answers]
    numbers = str(answers).replace("[", " ").replace("]", " ").replace("'", " ").replace(",", " ").split()
    return [float(word) for word in numbers if word not in ("True", "False")]


def must_agree(task: str, ours: list[Any], theirs: list[Any]) -> None:
    """Raise RunError if the answers differ."""
    if task == "answers":
        same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        if same < 0.9:  # random weights: near-ties may fall either way
            raise RunError(f"answers: only {same:.0%} are those of hf")
        return
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    if worst > 1e-3:
        raise RunError(f"{task}: a likelihood differs from that of hf by {worst:.1e}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all rounds."""
    from lm_eval.models import huggingface

    hugging_face: Any = huggingface.HFLM  # its decorator hides its parameters
    make_run(folder / "run", options.overrides)
    args = compose(str(folder / "run" / "config.yaml"), [], [], TrainArgs).args
    make_export(str(folder / "run"), folder / "hf", Format.hf)
    context, batch = args.data.seq_len, options.batch
    tasks = make_tasks(folder, options.documents, context)
    model, tokenizer, _ = load_model(args, folder / "run", torch.device("cpu"), torch.float32)
    settings = GeneratorArgs(dtype="fp32", max_tokens=batch * context)
    wording = Wording(tokenizer, args.data.add_bos, args.data.add_eos)
    scorer = Scorer(model, settings.max_tokens)
    generator = Generator(model, tokenizer, settings, add_bos=args.data.add_bos)
    ours = make_lm(scorer, generator, wording)
    world = World(RankInfo(), torch.device("cpu"), mesh=None)
    measured = MeasuredModel(model, tokenizer, generator, wording, world, lambda: None)
    documents = HeldOutArgs(use_val_from_train_src=False, sources=[str(folder / "data.jsonl")])
    held_out = build_held_out(documents, args, EvalArgs())
    # hf scores a second begin token before whole texts if add_bos_token is set.
    theirs = {
        begins: hugging_face(
            pretrained=str(folder / "hf"), device="cpu", dtype="float32", max_length=context, batch_size=batch,
            add_bos_token=begins,
        )
        for begins in (True, False)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        for task in tasks:
            name, chosen = task["task"], HarnessArgs(tasks=[task], bootstrap_iters=0, verbosity="ERROR")
            pair = [("ours", ours), ("hf", theirs[name != "pages"])]
            found = {}
            for who, lm in pair if number % 2 else reversed(pair):
                taken_s, found[who] = timed(lambda lm=lm, chosen=chosen: run_tasks(lm, chosen, None))
                seconds.setdefault(f"{name}_{who}", []).append(taken_s)
            must_agree(name, answers_of(found["ours"], name), answers_of(found["hf"], name))
        taken_s, found = timed(lambda: held_out(measured))
        seconds.setdefault("validation", []).append(taken_s / found["documents/data/n_tokens"])
    counted = {name: values[1:] for name, values in seconds.items()}
    result: dict[str, Any] = {f"{name}_s": statistics.median(values) for name, values in counted.items()}
    result["validation_tokens_per_s"] = 1 / result.pop("validation_s")
    for task in tasks:
        name = task["task"]
        ratios = [b / a for a, b in zip(counted[f"{name}_ours"], counted[f"{name}_hf"], strict=True)]
        result[f"{name}_speedup"] = statistics.median(ratios)
    totals = [
        [sum(counted[f"{task['task']}_{who}"][n] for task in tasks) for n in range(options.rounds)]
        for who in ("ours", "hf")
    ]
    result["speedup"] = statistics.median(b / a for a, b in zip(*totals, strict=True))
    return {name: round(value, 4) for name, value in result.items()}


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value of the model's config")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=12, help="of each task")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.documents < 1 or options.batch < 1:
        parser.error("--rounds, --documents and --batch are at least 1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    be_offline()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TQDM_DISABLE": "1", "HF_HOME": f"{folder}/cache"}
        result = measure(options, Path(folder))
    threads = torch.get_num_threads()
    result["machine"] = f"{platform.machine()}, {threads} threads, torch {torch.__version__}"
    print_figures(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
