"""Write the model card of a checkpoint from its run: data, tokens, curves, scores, config and commit. Torch-free.

It contains only what explains the model: no folders, hosts or Slurm accounts. Values that may be secrets are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lingua.config.frozen import dump_yaml, public_yaml
from lingua.console import duration, figure
from lingua.files import json_object_in
from lingua.logger import printable
from lingua.masking import public_text
from lingua.report.charts import pictures_of
from lingua.report.diff import flatten, shown
from lingua.report.figure import Picture
from lingua.report.history import TOKENS, History, Scores, keys_of
from lingua.report.series import STEP
from lingua.run.provenance import RUN_FILE

CARD_FILE, PICTURES = "README.md", "pictures"
_TELLING = ("model", "data", "optim", "loss", "distributed", "steps", "epochs", "global_batch_size", "grad_acc_steps")
_TELLING += ("seed", "deterministic", "app")
_HERE = ("root_dir", "stage_to", "path", "compile_cache")  # folders of the machine that trained
_MAX_COLUMNS = 6
_FENCE = "`" * 12  # longer than any fence in a sample


@dataclass(frozen=True)
class Pushed:
    """A checkpoint to publish, and where."""

    repo: str
    revision: str
    step: int
    n_params: int
    is_transformers: bool
    """AutoModelForCausalLM loads it; otherwise `lingua.load` does."""
    is_average: bool = False
    """The weights are the run's moving average (`optim.ema`)."""


def until(run: History, step: int) -> History:
    """Return the history up to a step."""

    def before(every: Sequence[Any]) -> list[Any]:
        return [one for one in every if one.step <= step]

    figures = {"validations": before(run.validations), "evaluations": before(run.evaluations)}
    metrics = run.metrics[run.metrics[STEP] <= step]
    return replace(run, metrics=metrics, undone=run.undone[:0], samples=before(run.samples), **figures)


def model_card(run: History, pushed: Pushed) -> tuple[str, list[Picture]]:
    """Return the card and its pictures, to be written beside it as PICTURES/<key>.png."""
    run = until(run, pushed.step)
    pictures = [one for one in pictures_of([run], [run.facts.name]) if one.key in ("loss", "held_out", "evaluations")]
    return public_text("\n".join(_lines(run, pushed, pictures))), pictures


def _lines(run: History, pushed: Pushed, pictures: Sequence[Picture]) -> Iterator[str]:
    config, record = run.facts.config, json_object_in(run.facts.path / RUN_FILE) or {}
    kind, name = str(_section(config, "model").get("type", "llama")), pushed.repo.rpartition("/")[2]
    library = {"library_name": "transformers"} if pushed.is_transformers else {}
    yield f"---\n{dump_yaml({**library, 'pipeline_tag': 'text-generation', 'tags': ['lingua', kind]})}---\n"
    yield f"# {_cell(name)}\n"
    yield f"A {kind} of {pushed.n_params:,} parameters, pretrained with lingua: step {pushed.step:,}{_of(config)}."
    if pushed.is_average:
        decay = _section(config, "optim").get("ema")
        yield f"The weights are a moving average (decay {decay}); losses and samples in training are not of them."
    if run.samples:
        yield f"\nIt continues a prompt so (step {run.samples[-1].step:,}):\n"
        yield f"{_FENCE}text\n{printable(run.samples[-1].prompt + run.samples[-1].text)}\n{_FENCE}"
    yield "\n## Use\n\n```python"
    where = f'"{pushed.repo}", revision="{pushed.revision}"'
    if pushed.is_transformers:
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        yield f"tokenizer = AutoTokenizer.from_pretrained({where})"
        yield f"model = AutoModelForCausalLM.from_pretrained({where})\n```"
    else:
        yield "import lingua\nfrom huggingface_hub import snapshot_download\n"
        yield f"model, tokenizer, config = lingua.load(snapshot_download({where}))\n```"
    yield "\n## Training\n"
    yield from _table(["", ""], _facts(run, record, pushed.step))
    for picture in pictures:
        yield f"\n![{picture.title}]({PICTURES}/{picture.key}.png)"
    for title, scores in (("Evaluations", run.evaluations), ("Held-out text", run.validations)):
        if scores:
            yield f"\n## {title}\n"
            yield from _scores(scores)
    yield "\n## Data\n"
    yield from _table(["source", "value"], _sources(config))
    yield f"\n## Config\n\n<details><summary>all that says what was trained</summary>\n\n{_FENCE}yaml"
    yield f"{public_yaml(telling(config))}{_FENCE}\n\n</details>"


def telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the training, without folders of the machine."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(each) for key, each in value.items() if key not in _HERE}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return {key: clean(config[key]) for key in _TELLING if config.get(key) is not None}


def _facts(run: History, record: Mapping[str, Any], step: int) -> Iterator[tuple[str, str]]:
    config, tokens = run.facts.config, float(run.at(np.array([step]), TOKENS)[0])
    optim, code = _section(config, "optim"), str(record.get("commit") or "unknown")
    rate = " ".join(str(optim.get(key, "")) for key in ("type", "lr", "scheduler")).strip()
    yield "steps", f"{step:,}{_of(config)}"
    if np.isfinite(tokens):
        yield "tokens", f"{tokens:,.0f}"
    yield "context", f"{_section(config, 'data').get('seq_len', '-')} tokens"
    yield "optimizer, peak rate, schedule", rate or "-"
    yield "precision", str(_section(config, "distributed").get("model_dtype", "-"))
    yield "hardware", f"{record.get('ranks', '?')} x {record.get('device', 'unknown')}"
    yield "time", f"{duration(run.seconds['training'] + run.seconds['loading'])} in {len(run.attempts)} attempts"
    yield "code", f"commit `{code}`" + (", with changes that are not committed" if record.get("dirty") else "")
    yield "torch", str(record.get("torch", "unknown"))


def _sources(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    sources = _section(config, "data").get("sources") or {"sample corpus (Python's standard library)": 1.0}
    if isinstance(sources, list):
        sources = {str(number): one for number, one in enumerate(sources, 1)}
    flat = flatten(telling({"data": {"sources": sources}})["data"]["sources"])
    return [(Path(key).name if "/" in key else key, shown(key, value)) for key, value in flat.items()]


def _scores(every: Sequence[Scores]) -> Iterator[str]:
    newest = every[-_MAX_COLUMNS:]
    rows = [(key, *(figure(one.values.get(key)) for one in newest)) for key in keys_of(newest)]
    yield from _table(["at step", *(f"{one.step:,}" for one in newest)], rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[tuple[str, str]]) -> Iterator[str]:
    for row in (heading, ["---"] * len(heading), *rows):
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(text: str) -> str:
    """Escape text that would end a cell or become markup."""
    text = printable(text).replace("\n", " ").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("![", "!\\[").replace("](", "]\\(")


def _of(config: Mapping[str, Any]) -> str:
    return f" of {config['steps']:,}" if isinstance(config.get("steps"), int) else ""


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
