"""lm-evaluation-harness asks, our model answers: the same as its own `hf` model with the same weights. Local files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.base import ConfigError
from lingua.config.keys.data import TokenizerArgs
from lingua.config.keys.eval import HarnessArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.data.held_out import ScoredRow, Wording
from lingua.eval import harness
from lingua.eval.harness import generator_args, make_lm, metrics_of, run_tasks, scored_rows
from lingua.eval.harness_tasks import be_offline, load_tasks
from lingua.eval.scorer import Scorer
from lingua.model.generate import Generator
from lingua.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer
from tests.conftest import own_environment
from tests.ranks import run_on_ranks

CONTEXT = 48


# -- pure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "continuation", "rows"),
    [
        ([1, 2], [3], [([1, 2, 3], 2)]),
        ([1, 2], [], []),
        ([0, 1, 2, 3], [4, 5], [([1, 2, 3, 4, 5], 3)]),  # the beginning goes, the scored part stays
        ([9, 0], [1, 2, 3, 4], [([0, 1, 2, 3, 4], 1)]),
        ([9, 0], [1, 2, 3, 4, 5, 6], [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3)]),
    ],
)
def test_rows_that_score_a_continuation(
    context: list[int], continuation: list[int], rows: list[tuple[list[int], int]]
) -> None:
    assert list(scored_rows(context, continuation, 4)) == [ScoredRow(*row) for row in rows]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"max_gen_len": 256, "temperature": 0.0, "until": []}),
        ({"until": "\n", "max_gen_toks": 5}, {"max_gen_len": 5, "until": ["\n"]}),
        ({"until": ["a", ""], "max_new_tokens": 7, "do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3}, {"temperature": 0.5, "top_p": 0.9}),
    ],
)
def test_how_to_answer(kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    args = generator_args(GeneratorArgs(max_tokens=99), kwargs)
    assert args.model_dump().items() >= (expected | {"max_tokens": 99}).items()


def test_unknown_ways_to_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_beams is not supported"):
        generator_args(GeneratorArgs(), {"num_beams": 4})


RESULTS = {
    "a": {"alias": "a", "acc,none": 0.25, "acc_norm,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
    "b": {"exact_match,first": 1.0, "exact_match,last": 0.0, "acc_stderr,none": "N/A"},
    "part": {"acc,none": 0.0},
    "pages": {"bits_per_byte,none": 3.0, "word_perplexity,none": 99.0},
}


def test_names_of_metrics_and_averages(caplog: pytest.LogCaptureFixture) -> None:
    assert metrics_of(RESULTS, ["a", "b", "pages"], {"a/acc": 3.0, "b": 1.0}) == {
        "eval/a/acc": 0.25,
        "eval/a/acc_norm": 0.5,
        "eval_stderr/a/acc": 0.1,
        "eval/b/exact_match,first": 1.0,
        "eval/b/exact_match,last": 0.0,
        "eval/part/acc": 0.0,
        "eval/pages/bits_per_byte": 3.0,
        "eval/pages/word_perplexity": 99.0,
        "eval/overall_avg": 0.75,
        "core_eval/a/acc": 0.75,
        "core_eval/b": 1.0,
        "core_eval/overall_avg": 1.75 / 4,
    }
    assert "eval/overall_avg" not in metrics_of(RESULTS, ["pages"], {}), "bits per byte are no share of right answers"
    assert "core_eval/overall_avg" not in metrics_of(RESULTS, ["a"], {"c": 1.0})
    assert "eval.core_metrics: c is not measured" in caplog.text


# -- with harness itself -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, without a network and without its words."""
    with pytest.MonkeyPatch.context() as patch, own_environment():
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TQDM_DISABLE", "1")
        be_offline()
        yield pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One of each kind: choices (of one token and of several), whole texts, answers."""
    draw, folder = random.Random(1), tmp_path_factory.mktemp("tasks")
    words = ["ab", "ba", "abba", "bab", "aab"]

    def text(n: int) -> str:
        return " ".join(draw.choice(words) for _ in range(n))

    lines = [{"question": text(draw.randrange(1, 30)), "gold": draw.randrange(3), "page": text(40)} for _ in range(9)]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_text": "{{question}}"}
    metrics = [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")]
    return [
        common | choice | {"task": "letters", "doc_to_choice": ["a", "b", " "], "metric_list": metrics},
        common | choice | {"task": "words", "doc_to_choice": ["abba ba", "b", "aaab"], "metric_list": metrics},
        common
        | {
            "task": "pages",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        common
        | {
            "task": "answers",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{page}}",
            "generation_kwargs": {"until": ["ab b", "\n\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        common
        | {
            "task": "long_answers",  # most of the context is kept for them
            "output_type": "generate_until",
            "doc_to_text": "{{page}}",
            "doc_to_target": "{{question}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": CONTEXT - 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A tokenizer of few words, whose stop strings are longer than its tokens, and its folder."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "a": 2, "b": 3, "Ġ": 4, "ab": 5, "Ċ": 6, "Ġa": 7}
    model = Model(models.BPE(vocab, [("a", "b"), ("Ġ", "a")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    begin = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    model.post_processor = begin
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    return build_tokenizer(TokenizerArgs(name="hf", path=str(folder))), folder


def tiny() -> LMTransformer:
    args = LMTransformerArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, vocab_size=8, max_seqlen=CONTEXT, init_base_std=0.3
    )
    model = LMTransformer(args)
    model.init_weights(1)
    return model


def lm_of(model: LMTransformer, tokenizer: Tokenizer, *, add_bos: bool = True, max_tokens: int = 500) -> Any:
    args = GeneratorArgs(dtype="fp32", max_tokens=max_tokens)
    scorer, generator = Scorer(model, max_tokens), Generator(model, tokenizer, args, add_bos=add_bos)
    return make_lm(scorer, generator, Wording(tokenizer, add_bos))


def hugging_face(model: LMTransformer, folder: Path, **more: Any) -> Any:
    """Harness's own `hf` model with the same weights."""
    pytest.importorskip("accelerate")
    model_of_harness = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lingua.model import huggingface

    args = model.args
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_width,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_seqlen,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    theirs = LlamaForCausalLM(config).eval()
    ours, llama = model.state_dict(), huggingface.Llama()
    into_theirs = llama.into_theirs(args)
    for name, tensor in theirs.state_dict().items():
        our_name = llama.our_name(name)
        tensor.copy_(into_theirs(our_name, ours[our_name]))
    spoken = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    return model_of_harness(pretrained=theirs, tokenizer=spoken, max_length=CONTEXT, batch_size=3, device="cpu", **more)


def answers_of(lm: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    args = HarnessArgs(tasks=list(tasks), bootstrap_iters=0, verbosity="ERROR")
    return run_tasks(lm, args, None)


def said(found: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_the_same_as_the_hf_model(lm_eval: Any, tasks: list[Any], tokenizer: tuple[Tokenizer, Path]) -> None:
    model = tiny()
    found = answers_of(lm_of(model, tokenizer[0]), tasks)
    # hf scores whole texts after its begin token as we do, but would score a second begin token if told to add one.
    asked, pages = [task for task in tasks if task["task"] != "pages"], tasks[2]
    expected = answers_of(hugging_face(model, tokenizer[1], add_bos_token=True), asked)
    alone = answers_of(hugging_face(model, tokenizer[1], add_bos_token=False), [pages])
    del expected["eval/overall_avg"]
    expected = {**alone, **expected}
    named = {"eval/letters/acc", "eval/words/acc_norm", "eval/pages/bits_per_byte", "eval/answers/exact_match"}
    assert named | {"eval/overall_avg"} <= found.keys()
    names = [name for name in expected if name not in ("details", "samples")]
    assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-5)
    ours, theirs = said(found), said(expected)
    assert (ours["answers"], ours["long_answers"]) == (theirs["answers"], theirs["long_answers"])
    assert any(len(answer) > 3 for ((answer,),) in ours["answers"])
    for task in ("letters", "words"):
        for mine, other in zip(ours[task], theirs[task], strict=True):
            for ((nats, greedy),), ((their_nats, their_greedy),) in zip(mine, other, strict=True):
                assert float(nats) == pytest.approx(float(their_nats), rel=1e-4)
                assert str(greedy) == str(their_greedy)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_batches_and_ranks_do_not_matter(lm_eval: Any, tasks: list[Any], tokenizer: tuple[Tokenizer, Path]) -> None:
    model = tiny()
    expected = answers_of(lm_of(model, tokenizer[0]), tasks)
    names = [name for name in expected if name.startswith("eval/")]
    alone = answers_of(lm_of(model, tokenizer[0], max_tokens=1), tasks)
    assert [alone[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-6)

    def on_rank(rank: int) -> dict[str, Any]:
        os.environ["LOCAL_RANK"] = str(rank)
        harness.BLOCK = 4
        return answers_of(lm_of(model, tokenizer[0]), tasks[:2])

    for found in run_on_ranks(on_rank, 2):
        for name in (name for name in names if "letters" in name or "words" in name):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)
        assert said(found).keys() == {"letters", "words"}


@pytest.mark.filterwarnings("ignore")
def test_prompts_begin_as_documents_do(lm_eval: Any, tokenizer: tuple[Tokenizer, Path]) -> None:
    lm = lm_of(tiny(), tokenizer[0])
    assert lm.tok_encode("ab") == [0, 5]
    assert lm.tok_encode("ab", add_special_tokens=False) == [5]
    assert lm_of(tiny(), tokenizer[0], add_bos=False).tok_encode("ab") == [5]
    request = [SimpleNamespace(args=("", "ab"))]
    (alone,) = lm.loglikelihood(request, disable_tqdm=True)
    (score,) = Scorer(tiny(), 10).score([ScoredRow([0, 5], 1)])
    assert alone == (pytest.approx(-score.nats), score.is_greedy)
    assert lm.loglikelihood_rolling([SimpleNamespace(args=("ab",))]) == [pytest.approx(-score.nats)]


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_loaded_is_named(lm_eval: Any, tmp_path: Path) -> None:
    gone = {"task": "gone", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}
    wrong = gone | {"output_type": "generate_until", "test_split": "test", "doc_to_text": "x", "doc_to_target": "y"}
    with pytest.raises(ConfigError) as caught:
        load_tasks(HarnessArgs(tasks=[wrong]))
    assert [problem.split(" cannot be loaded")[0] for problem in caught.value.problems] == [
        "eval.harness.tasks: gone",
    ]
    assert "lingua eval prefetch CONFIG" in caught.value.problems[0]


@pytest.mark.filterwarnings("ignore")
def test_a_template_of_a_task_reaches_nothing_of_this_process(lm_eval: Any, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"a": "xx"}\n')
    escape = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/ran') }}}}"
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    task = {"task": "t", "output_type": "generate_until", "test_split": "test", "doc_to_target": "{{a}}", **data}
    assert load_tasks(HarnessArgs(tasks=[task | {"doc_to_text": "{{ a | regex_replace('x', 'y') }}"}])) == ["t"]
    with pytest.raises(ConfigError, match=r"t cannot be loaded here \(SecurityError: access to attribute '__init__'"):
        load_tasks(HarnessArgs(tasks=[task | {"doc_to_text": escape}]))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_bytes_will_do(lm_eval: Any) -> None:
    model = LMTransformer(
        LMTransformerArgs(dim=16, n_layers=1, n_heads=2, multiple_of=8, vocab_size=258, max_seqlen=16)
    )
    model.init_weights(1)
    lm = lm_of(model, ByteTokenizer())
    requests = [SimpleNamespace(args=("x" * 40, {"until": ["never"], "max_gen_toks": 3})) for _ in range(2)]
    first, second = lm.generate_until(requests)
    assert first == second
    with pytest.raises(ConfigError, match=r"up to 16 tokens leave no room .*gen_kwargs: {max_gen_toks: 8}"):
        lm.generate_until([SimpleNamespace(args=("x", {"max_gen_toks": 16}))])
    assert torch.is_grad_enabled()
