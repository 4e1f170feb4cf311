"""Text by masked diffusion: prompts, gaps, blocks, stop strings, and how often the model is asked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.diffusion.sample import DiffusionGenerator, surest
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.model import LlamaArgs
from lingua.model.generate import Answer
from lingua.tokenizer import ByteTokenizer
from tests.families import build

MASK = 258
MODEL = LlamaArgs(
    vocab_size=258, dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seqlen=32, causal=False, mask_token=True,
    init_base_std=0.5,
)  # fmt: skip


class Knows(nn.Module):
    """Knows one text, and is surer of later places; counts passes."""

    def __init__(self, text: bytes, spread: float = 20.0) -> None:
        super().__init__()
        self.args = MODEL
        self.weight = nn.Parameter(torch.eye(MASK + 1))
        self.text, self.spread = torch.tensor([256, *text]), spread
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor, *, labels: Tensor, loss: Any) -> Any:
        self.seen.append(tokens.clone())
        places = torch.arange(tokens.shape[1])
        hidden = torch.zeros(*tokens.shape, MASK + 1)
        hidden[:, places, self.text[: tokens.shape[1]]] = self.spread + places / 100
        return loss(hidden, self.weight, labels)


def answers(model: nn.Module, prompts: list[str], **keys: Any) -> list[Answer]:
    return DiffusionGenerator(model, ByteTokenizer(), GeneratorArgs(**keys)).generate(prompts)


@pytest.mark.parametrize("sampler", ["low_confidence", "ancestral"])
@pytest.mark.parametrize(("block", "steps"), [(None, None), (None, 3), (4, None), (4, 6), (3, 1)])
def test_what_is_hidden_is_filled_in(sampler: str, block: int | None, steps: int | None) -> None:
    model = Knows(b"hello world!")
    found = answers(
        model, ["hello", "he[MASK:3] w[MASK]rld!"], max_gen_len=7, sampler=sampler, block=block, diffusion_steps=steps
    )
    assert [one.text for one in found] == [" world!", "hello world!"]
    assert [one.infilled for one in found] == [False, True]
    assert [one.n_tokens for one in found] == [7, 4]
    assert all((tokens == MASK).any() for tokens in model.seen)  # never asked where nothing is hidden


def test_steps_and_blocks_say_how_often_the_model_is_asked() -> None:
    def passes(**keys: Any) -> list[list[int]]:
        model = Knows(b"0123456789ab")
        answers(model, ["0123"], max_gen_len=8, **keys)
        return [(tokens[0] == MASK).nonzero()[:, 0].tolist() for tokens in model.seen]

    assert len(passes()) == 8
    assert [len(hidden) for hidden in passes(diffusion_steps=4)] == [8, 6, 4, 2]
    assert passes()[1] == [5, 6, 7, 8, 9, 10, 11]  # it is surest of the last place
    in_blocks = passes(block=4)
    assert len(in_blocks) == 8
    assert in_blocks[1] == [5, 6, 7, 9, 10, 11, 12]
    assert in_blocks[4] == [9, 10, 11, 12]
    assert len(passes(sampler="ancestral", diffusion_steps=1000)) <= 8  # steps that fill nothing in cost nothing


def test_a_pass_where_nothing_is_filled_in_would_change_nothing() -> None:
    class AsksAlways(DiffusionGenerator):
        def rows_to_ask(self, left: Tensor) -> Tensor:
            return torch.ones(len(left), dtype=torch.bool)

    model, args = build(MODEL), GeneratorArgs(temperature=1.0, sampler="ancestral", diffusion_steps=30, max_gen_len=8)
    found = [kind(model, ByteTokenizer(), args).generate(["ab", "cd"]) for kind in (DiffusionGenerator, AsksAlways)]
    assert found[0] == found[1]


def test_an_answer_ends_and_its_later_blocks_are_not_asked_for() -> None:
    model = Knows(b"ab. cd. ef. gh.")
    (found,) = answers(model, ["ab"], max_gen_len=13, block=3, until=[" ef"])
    assert (found.text, found.end) == (". cd.", "until")
    assert len(model.seen) == 9
    model = Knows(bytes([*b"ab."]))
    model.text = torch.tensor([256, *b"ab.", 257, *b"zzzz"])
    (found,) = answers(model, ["a"], max_gen_len=6)
    assert (found.text, found.end, found.n_tokens) == ("b.", "eos", 3)


@torch.no_grad()
def test_sampling_is_repeatable_and_has_the_model_s_probabilities() -> None:
    model = build(MODEL)
    assert answers(model, ["ab"], temperature=1.0, max_gen_len=5) == answers(
        model, ["ab"], temperature=1.0, max_gen_len=5
    )
    tokens = torch.tensor([[256, *b"ab", MASK]])
    expected = model(tokens)[0, -1].softmax(-1)
    texts = answers(model, ["ab[MASK]"] * 3000, temperature=1.0, max_tokens=4000)
    assert len({one.text for one in texts}) > 20
    likeliest = int(expected[:127].argmax())
    share = sum(one.text.encode() == b"ab" + bytes([likeliest]) for one in texts) / 3000
    p = expected[likeliest].item()
    assert abs(share - p) < 4 * (p * (1 - p) / 3000) ** 0.5


def test_two_steps_of_ancestral_sampling_split_the_places_evenly() -> None:
    model = Knows(b"0123456789" * 2)
    answers(model, ["0[MASK:18]"] * 50, sampler="ancestral", diffusion_steps=2)
    first, second = ((tokens == MASK).sum().item() for tokens in model.seen[:2])
    assert first == 18 * min(50, 1024 // 20)
    assert 0.4 < second / first < 0.6


def test_the_surest_places_are_chosen() -> None:
    certainty = torch.tensor([[0.1, 0.9, 0.5, -1.0], [0.4, 0.4, 0.1, 0.2]])
    chosen = surest(certainty, torch.tensor([2, 1]))
    assert chosen.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_gaps_beyond_the_model_s_sight_are_refused() -> None:
    with pytest.raises(ValueError, match="are 43 tokens, but the model sees 32; shorten them"):
        answers(build(MODEL), ["ab[MASK:40]"])


def test_a_gap_of_no_tokens_is_text() -> None:
    generator = DiffusionGenerator(Knows(b"[MASK:0]!"), ByteTokenizer(), GeneratorArgs(max_gen_len=1), add_bos=False)
    assert [one.infilled for one in generator.generate(["[MASK:0]"])] == [False]
