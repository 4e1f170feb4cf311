from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.keys.data import TokenizerArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.model.generate import Answer, Generator, find_stop, group, prompt_room, sample
from lingua.tokenizer import ByteTokenizer, build_tokenizer
from tests.ranks import run_on_ranks

# -- pure decisions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_seqlen", "keys", "room"),
    [
        (2048, {"max_gen_len": 512}, 1536),
        (256, {"max_gen_len": 512}, 128),  # half of the context at least
        (256, {"max_gen_len": 200}, 128),
        (256, {"max_gen_len": 10, "max_prompt_len": 30}, 30),
        (256, {"max_gen_len": 200, "max_prompt_len": 1000}, 255),  # and room for one token
        (1, {}, 1),
    ],
)
def test_room_for_a_prompt(max_seqlen: int, keys: dict[str, Any], room: int) -> None:
    assert prompt_room(GeneratorArgs(**keys), max_seqlen) == room


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "batches"),
    [
        ([], 100, []),
        ([5, 9, 5], 100, [[1, 0, 2]]),
        ([5, 9, 5], 38, [[1, 0], [2]]),  # two rows of 9 + 10
        ([90, 3, 3, 3], 39, [[0], [1, 2, 3]]),  # a long prompt is answered all the same
    ],
)
def test_batches_fit_the_memory(lengths: list[int], max_tokens: int, batches: list[list[int]]) -> None:
    assert group(lengths, 10, max_tokens) == batches


@pytest.mark.parametrize(
    ("text", "until", "at"),
    [(b"abcabc", [b"ca", b"b"], 1), (b"abc", [b"d"], None), (b"abc", [], None), (b"aEND", [b"END"], 1)],
)
def test_the_first_stop_string_counts(text: bytes, until: list[bytes], at: int | None) -> None:
    assert find_stop(text, until) == at


def drawn(keys: dict[str, Any], n: int = 2000) -> list[float]:
    """Shares of five tokens of probability .4 .3 .2 .08 .02 among n draws."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02]).log().expand(n, 5)
    tokens = sample(logits, GeneratorArgs(**keys), torch.Generator().manual_seed(0))
    return (torch.bincount(tokens, minlength=5) / n).tolist()


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.08, 0.02]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.4, 0.3, 0.2, 0.08, 0.02]),
        ({"temperature": 1.0, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        ({"temperature": 1.0, "top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.16 / 0.2968, 0.09 / 0.2968, 0.04 / 0.2968, 0.0064 / 0.2968, 0.0004 / 0.2968]),
    ],
)
def test_sampling_draws_from_the_stated_distribution(keys: dict[str, Any], shares: list[float]) -> None:
    assert drawn(keys) == pytest.approx(shares, abs=0.04)
    assert [share == 0 for share in drawn(keys)] == [share == 0 for share in shares]


# -- a model that says what it is told -----------------------------------------------------------------------------


class Script(nn.Module):
    """After any prompt that ends in byte c, the script of c follows, letter by letter."""

    def __init__(self, scripts: Mapping[str, str | bytes], max_seqlen: int = 64) -> None:
        super().__init__()
        self.args = LMTransformerArgs(n_heads=1, max_seqlen=max_seqlen)
        self.device_marker = nn.Parameter(torch.zeros(1))
        said = {first: script.encode() if isinstance(script, str) else script for first, script in scripts.items()}
        self.scripts = {ord(first): [*script, 257] for first, script in said.items()}

    def forward(self, tokens: Tensor, *, cache: Any, positions: Tensor, select: Tensor | None = None) -> Tensor:
        if select is not None:
            cache.layers[0] = (torch.stack([tokens[range(len(tokens)), select], select], dim=1),) * 2
        state = cache.layers[0][0]  # (B, 2): what the script hangs on, and where it began
        at = positions[:, -1] if select is None else select
        logits = torch.zeros(len(tokens), 1, 300)
        logits[:, 0, 299] = 2.0  # an id that the tokenizer does not know
        for row, (first, start) in enumerate(state.tolist()):
            logits[row, 0, self.scripts[first][int(at[row]) - start]] = 1.0
        return logits


def say(prompts: list[str], scripts: Mapping[str, str | bytes], max_seqlen: int = 64, **keys: Any) -> list[Answer]:
    return Generator(Script(scripts, max_seqlen), ByteTokenizer(), GeneratorArgs(**keys)).generate(prompts)


def test_answers_come_in_order_and_end_each_at_its_own_end() -> None:
    answers = say(["xa", "b", "long prompt a"], {"a": "one", "b": "a longer answer"}, max_gen_len=10)
    assert [(each.text, each.end, each.n_tokens) for each in answers] == [
        ("one", "eos", 4),
        ("a longer a", "length", 10),
        ("one", "eos", 4),
    ]


@pytest.mark.parametrize(
    ("until", "text", "n_tokens"),
    [
        (["\n\n"], "line\nnext", 11),
        (["\nQuestion:", "zzz"], "line\nnext\n", 20),
        (["é"], "line\nnext\n\nQuestion: ", 23),
        (["next\n", "line\nnext"], "", 9),
    ],
)
def test_a_stop_string_of_several_tokens_ends_the_answer_and_is_no_part_of_it(
    until: list[str], text: str, n_tokens: int
) -> None:
    (answer,) = say(["a"], {"a": "line\nnext\n\nQuestion: é and so on"}, until=until)
    assert (answer.text, answer.end, answer.n_tokens) == (text, "until", n_tokens)


def test_what_is_shown_for_bytes_that_are_no_character_is_no_stop_string() -> None:
    """A character comes byte by byte, and a model may say bytes that never become one."""
    for until in (["\\"], ["xe2"], ["\\xe2\\x86"], ["\ufffd"]):
        (answer,) = say(["a"], {"a": "go → on"}, until=until)
        assert (answer.text, answer.end) == ("go → on", "eos")
    (answer,) = say(["a"], {"a": b"\xff\\x41 END"}, until=["xff", "x41"])
    assert (answer.text, answer.end) == ("\\xff\\", "until")


def test_any_of_several_end_tokens_ends_the_answer() -> None:
    tokenizer = build_tokenizer(TokenizerArgs(end_ids=[257, ord("!")]))
    generator = Generator(Script({"a": "yes! and more", "b": "no"}), tokenizer, GeneratorArgs())
    assert [(each.text, each.end) for each in generator.generate(["a", "b"])] == [("yes", "eos"), ("no", "eos")]
    assert build_tokenizer(TokenizerArgs()).end_ids == ()


def test_long_prompts_keep_their_end_and_say_what_was_cut() -> None:
    short, long = say(["b", "x" * 40 + "a"], {"a": "yes", "b": "no"}, max_prompt_len=10)
    assert (short.text, short.n_cut) == ("no", 0)
    assert (long.text, long.n_cut) == ("yes", 32)  # 41 letters and the begin token, 10 kept


def test_the_end_of_the_context_ends_the_answer() -> None:
    (answer,) = say(["a"], {"a": "z" * 100}, max_seqlen=16, max_gen_len=12)
    assert (answer.text, answer.end) == ("z" * 12, "length")
    (answer,) = say(["x" * 30 + "a"], {"a": "z" * 100}, max_seqlen=16, max_gen_len=12)
    assert (answer.text, answer.n_cut) == ("z" * 8, 24)


def test_an_empty_prompt_starts_from_the_begin_token_or_is_refused() -> None:
    assert say([""], {"\u0100": "hello"})[0].text == "hello"
    generator = Generator(Script({}), ByteTokenizer(), GeneratorArgs(), add_bos=False)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.generate([""])
    assert generator.generate([]) == []


# -- a real model --------------------------------------------------------------------------------------------------


def real_model(**keys: Any) -> LMTransformer:
    args = LMTransformerArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=258, max_seqlen=48, **keys)
    with torch.device("meta"):
        model = LMTransformer(args)
    model.to_empty(device="cpu")
    model.init_weights(3)
    return model


PROMPTS = ["def main(", "a", "import os\nimport sys", "", "x = 1"]


@pytest.mark.parametrize("keys", [{}, {"sliding_window": 7}])
def test_greedy_answers_of_a_batch_equal_those_one_by_one_and_without_a_cache(keys: dict[str, Any]) -> None:
    model, tokenizer = real_model(**keys), ByteTokenizer()
    args = GeneratorArgs(max_gen_len=20, max_tokens=1000)
    together = Generator(model, tokenizer, args).generate(PROMPTS)
    one_by_one = [Generator(model, tokenizer, args).generate([prompt])[0] for prompt in PROMPTS]
    assert together == one_by_one
    in_small_batches = Generator(model, tokenizer, args.model_copy(update={"max_tokens": 70})).generate(PROMPTS)
    assert together == in_small_batches
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids, said = tokenizer.encode(prompt, True, False).tolist(), []
        for _ in range(answer.n_tokens):
            said.append(int(model(torch.tensor([ids + said]))[0, -1].argmax()))
        assert tokenizer.decode(said) == answer.text


def test_sampling_repeats_itself_and_leaves_the_global_random_state_alone() -> None:
    args = GeneratorArgs(temperature=1.0, max_gen_len=12)
    state = torch.get_rng_state()
    first, second, other = (
        Generator(real_model(), ByteTokenizer(), args.model_copy(update={"seed": seed})).generate(PROMPTS)
        for seed in (1, 1, 2)
    )
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = real_model()
    Generator(model, ByteTokenizer(), GeneratorArgs(max_gen_len=2)).generate(["a"])
    assert model.training


@pytest.mark.ranks
def test_ranks_of_a_sharded_model_say_the_same_as_one() -> None:
    args = GeneratorArgs(max_gen_len=8)
    expected = Generator(real_model(), ByteTokenizer(), args).generate(PROMPTS[:2])

    def on_rank(rank: int) -> list[Answer]:
        model = real_model()
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
        return Generator(model, ByteTokenizer(), args).generate(PROMPTS[:2])

    assert run_on_ranks(on_rank, 2) == [expected, expected]


def test_a_bf16_model_and_autocast_generate_too() -> None:
    args = GeneratorArgs(max_gen_len=3)
    assert len(Generator(real_model().bfloat16(), ByteTokenizer(), args).generate(PROMPTS)) == len(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(Generator(real_model(), ByteTokenizer(), args).generate(PROMPTS)) == len(PROMPTS)
