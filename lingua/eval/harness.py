"""Run lm-evaluation-harness on our models through its `LM` interface.

The answers equal those of harness's own `hf` model with the same weights and tokens: prompts that are too long lose
their beginning, never the part that is scored; an answer ends before a stop string, however it is split into tokens.
Prompts begin as documents do in training. Ranks share the requests, and all get all answers. Importing this module does
not need lm-eval.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs, HarnessArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.train import TrainArgs
from lingua.data.held_out import ScoredRow, Wording, windows
from lingua.distributed.process_group import from_main, on_every_rank
from lingua.eval.harness_tasks import cleaned, lm_eval, load_tasks, task_manager, task_name
from lingua.eval.measures import Measure, MeasuredModel
from lingua.eval.scorer import Score, Scorer
from lingua.model.generate import Generator

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_GEN_LEN = 256
"""Maximum tokens of an answer if the task sets none, as in harness's `hf` (models/utils.py, normalize_gen_kwargs)."""
BLOCK = 64
"""Consecutive requests per rank: the answers to one question are adjacent, and share its forward pass."""
SHARES = ("acc_norm", "acc", "exact_match", "f1")
"""Shares of correct answers, where more is better: the first one that a task has counts in `eval/overall_avg`."""
HEADLINES = (*SHARES, "bits_per_byte")
"""The first of these that a task has represents it in `eval.core_metrics`."""


# -- the model for harness -----------------------------------------------------------------------------------------


def scored_rows(context: Sequence[int], continuation: Sequence[int], longest: int) -> Iterator[ScoredRow]:
    """Yield rows that score a continuation, with at most `longest` tokens before the last. `context` is not empty."""
    if len(continuation) <= longest:
        ids = [*context, *continuation][-(longest + 1) :]
        if continuation:
            yield ScoredRow(ids, len(ids) - len(continuation))
        return
    yield from whole_rows([context[-1], *continuation], longest)


def whole_rows(ids: Sequence[int], longest: int) -> Iterator[ScoredRow]:
    """Yield rows that score a whole text after its first token."""
    for start, end, first in windows(len(ids), longest, longest):
        yield ScoredRow(ids[start:end], first)


def generator_args(base: GeneratorArgs, kwargs: Mapping[str, Any]) -> GeneratorArgs:
    """Translate harness's generation arguments. Raises ConfigError for unknown ones."""
    left = dict(kwargs)
    until = left.pop("until", None) or []
    lengths = [left.pop(key, None) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")]
    sampled, temperature = left.pop("do_sample", None), float(left.pop("temperature", 0.0) or 0.0)
    update: dict[str, Any] = {
        "until": [until] if isinstance(until, str) else [stop for stop in until if stop],
        "max_gen_len": int(next((n for n in lengths if n is not None), MAX_GEN_LEN)),
        "temperature": 0.0 if sampled is False else temperature or (1.0 if sampled else 0.0),
    }
    update |= {key: left.pop(key) for key in ("top_k", "top_p") if key in left}
    if left:
        raise ConfigError(f"eval.harness.gen_kwargs: {', '.join(left)} is not supported; remove it")
    return GeneratorArgs.model_validate(base.model_dump() | update)


def within_context(args: GeneratorArgs, context: int) -> GeneratorArgs:
    """Limit prompts as harness's `hf` model does, to the context minus max_gen_toks."""
    room = context - args.max_gen_len
    if room <= 0:
        raise ConfigError(
            f"eval.harness: answers of up to {args.max_gen_len} tokens leave no room for a prompt in a context of "
            f"{context}; set eval.harness.gen_kwargs: {{max_gen_toks: {max(1, context // 2)}}}, or remove the task"
        )
    return args.model_copy(update={"max_prompt_len": min(args.max_prompt_len or room, room)})


def make_lm(scorer: Scorer, generator: Generator, wording: Wording) -> Any:
    """Return a harness `LM` that answers with this model. Raises ConfigError if lm-eval is missing."""

    class LinguaLM(lm_eval(".api.model").TemplateLM):
        """Tokenizes text as training does; the rest of the tokenization is harness's own."""

        def __init__(self) -> None:
            super().__init__()
            self.scores: list[Score] = []
            """Scores of all answers and texts so far."""

        @property
        def eot_token_id(self) -> int:
            return _token(wording.tokenizer.eos_id)

        @property
        def prefix_token_id(self) -> int:
            return _token(wording.prefix)

        @property
        def tokenizer_name(self) -> str:
            return wording.tokenizer.fingerprint.replace("/", "_").replace(":", "_")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            begins = wording.begins and add_special_tokens is not False
            return wording.tokenizer.encode(string, add_bos=begins, add_eos=False).tolist()

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            scores = _shared(
                requests, lambda mine: _score([list(scored_rows(c, t, scorer.context)) for _, c, t in mine])
            )
            self.scores += scores
            found = [(-score.nats, score.is_greedy) for score in scores]
            self._cache("loglikelihood", [request for request, _, _ in requests], found)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            def score(mine: list[Any]) -> list[Score]:
                prefix = [] if wording.prefix is None else [wording.prefix]
                all_ids = [[*prefix, *self.tok_encode(request.args[0], False)] for request in mine]
                return _score([list(whole_rows(ids, scorer.context)) for ids in all_ids])

            scores = _shared(requests, score)
            self.scores += scores
            found = [-score.nats for score in scores]
            self._cache("loglikelihood_rolling", [request.args for request in requests], found)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers: dict[int, str] = {}
            alike: dict[str, list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                alike[json.dumps(request.args[1], sort_keys=True)].append(number)
            for numbers in alike.values():
                args = generator_args(generator.args, requests[numbers[0]].args[1])
                args = within_context(args, scorer.context)
                texts = _shared([requests[n].args[0] for n in numbers], lambda mine, args=args: _generate(mine, args))
                answers |= zip(numbers, texts, strict=True)
            found = [answers[n] for n in range(len(requests))]
            self._cache("generate_until", [request.args for request in requests], found)
            return found

        def _cache(self, kind: str, requests: list[Any], answers: list[Any]) -> None:
            for request, answer in zip(requests, answers, strict=True):
                if request is not None:
                    self.cache_hook.add_partial(kind, request, answer)

    def _score(rows_of: list[list[ScoredRow]]) -> list[Score]:
        """Return the score of each list of rows."""
        scores = iter(scorer.score([row for rows in rows_of for row in rows]))
        return [sum_of_scores([next(scores) for _ in rows]) for rows in rows_of]

    def _generate(prompts: list[str], args: GeneratorArgs) -> list[str]:
        scorer.beat()
        same = type(generator)(generator.model, generator.tokenizer, args, add_bos=generator.add_bos)
        # With a begin token a prompt is never empty; without one, an empty prompt becomes a space.
        answers = same.generate([prompt or ("" if generator.add_bos else " ") for prompt in prompts])
        begin = "" if wording.tokenizer.bos_id is None else wording.tokenizer.decode([wording.tokenizer.bos_id])
        return [answer.text.replace(begin, "") if begin else answer.text for answer in answers]  # not text, as in `hf`

    return LinguaLM()


def sum_of_scores(scores: Sequence[Score]) -> Score:
    """Return the score of a text from those of its rows."""
    nats, n_tokens, greedy, variance, n_samples = zip(*scores, strict=True) if scores else ((),) * 5
    return Score(sum(nats), sum(n_tokens), all(greedy), sum(variance), sum(n_samples))


def estimate_of(scores: Sequence[Score]) -> dict[str, float]:
    """Return metrics of the error of estimated log-likelihoods, none if all are exact."""
    estimated = [score for score in scores if score.n_samples]
    if not estimated:
        return {}
    errors = [math.sqrt(score.variance) for score in estimated]
    return {
        "eval_bound/n_answers": len(scores),
        "eval_bound/n_estimated": len(estimated),
        "eval_bound/samples_per_answer": sum(score.n_samples for score in estimated) / len(estimated),
        "eval_bound/stderr_nats": sum(errors) / len(errors),
        "eval_bound/stderr_nats_max": max(errors),
    }


def _token(token: int | None) -> int:
    if token is None:
        raise ConfigError("eval.harness: the tokenizer has neither a begin nor an end token to put before a text")
    return token


def _shared(items: Sequence[Any], act: Callable[[list[Any]], list[T]]) -> list[T]:
    """Call `act` with each rank's share of the items; return all results in order. Collective."""
    if not dist.is_initialized():
        return act(list(items))
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    shares = [[n for n in range(len(items)) if n // BLOCK % n_ranks == each] for each in range(n_ranks)]
    mine = on_every_rank(lambda: act([items[n] for n in shares[rank]]))
    of_all: list[list[T]] = [[]] * n_ranks
    dist.all_gather_object(of_all, mine)
    answers = {n: answer for share, found in zip(shares, of_all, strict=True) for n, answer in zip(share, found)}  # noqa: B905
    return [answers[n] for n in range(len(items))]


# -- results -------------------------------------------------------------------------------------------------------


def build_harness(args: HarnessArgs, run_args: TrainArgs, eval_args: EvalArgs) -> Measure:
    """Return the measure that runs the tasks. Raises ConfigError for missing tasks or data."""
    if not args.tasks:
        raise ConfigError("eval.measures: an entry of type harness names no tasks; set its key `tasks`, or remove it")
    load_tasks(args)

    def measure(measured: MeasuredModel) -> dict[str, Any]:
        lm = make_lm(measured.scorer, measured.generator, measured.wording)
        return {**run_tasks(lm, args, eval_args.core_metrics), **estimate_of(lm.scores)}

    return measure


def run_tasks(lm: Any, args: HarnessArgs, core_metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the metrics of all tasks by name, harness's own tables in "details", and the samples. Collective."""
    if args.apply_chat_template:
        raise ConfigError("eval.harness.apply_chat_template is set, but a pretrained model has no template; remove it")
    settings = args.model_dump(exclude={"type", "tasks", "verbosity", "include_path"})
    tasks = cleaned(args.tasks)
    logging.getLogger("lm_eval").setLevel(args.verbosity.upper())
    answers = lm_eval().simple_evaluate(lm, tasks=tasks, task_manager=task_manager(args), **settings)
    answers = from_main(lambda: _plain(answers))  # harness computes averages on one rank per machine
    details = {key: answers[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in answers}
    metrics = metrics_of(answers["results"], [task_name(task) for task in args.tasks], core_metrics or {})
    return {**metrics, "details": {"harness": details}, "samples": answers.get("samples") or {}}


def _plain(answers: Any) -> Any:
    """Return a copy as JSON values, without numpy's numbers and the functions in configs."""

    def default(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    keys = ("results", "groups", "versions", "n-shot", "n-samples", "samples")
    return json.loads(json.dumps({key: answers[key] for key in keys if key in answers}, default=default))


def metrics_of(
    results: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], core_metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return `eval/<task>/<metric>`, `eval_stderr/...`, and averages.

    `eval/overall_avg`: mean of the tasks' shares of correct answers, without bits per byte. `core_eval/...`: the
    metrics that `core_metrics` names (<task>/<metric>, or a task for its headline), times their weights;
    `core_eval/overall_avg`: their weighted average.
    """
    found: dict[str, float] = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or name in ("alias", "sample_len"):
                continue
            prefix, name = ("eval_stderr", name.removesuffix("_stderr")) if name.endswith("_stderr") else ("eval", name)
            found[f"{prefix}/{task}/{name}" + (f",{kind}" if kind not in ("", "none") else "")] = value
    headlines = {task: name for task in results if (name := _first(found, task, HEADLINES)) is not None}
    if measured := [found[name] for task in tasks if (name := _first(found, task, SHARES)) is not None]:
        found["eval/overall_avg"] = sum(measured) / len(measured)
    chosen = {name: headlines.get(name, f"eval/{name}") for name in core_metrics}
    if missing := [name for name, metric in chosen.items() if metric not in found]:
        log.warning("eval.core_metrics: %s is not measured, so there is no core_eval", ", ".join(missing))
    elif total := sum(core_metrics.values()):
        core = {f"core_eval/{name}": found[metric] * core_metrics[name] for name, metric in chosen.items()}
        found |= core | {"core_eval/overall_avg": sum(core.values()) / total}
    return found


def _first(found: Mapping[str, float], task: str, metrics: Sequence[str]) -> str | None:
    for metric in metrics:
        for name in found:
            if name == f"eval/{task}/{metric}" or name.startswith(f"eval/{task}/{metric},"):
                return name
    return None
