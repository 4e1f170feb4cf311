"""Generate text for batches of prompts of different lengths, with a key/value cache, until a stop string.

The greedy answers of a batch equal those of its prompts one by one (exactly in fp32, up to near-ties in bf16). An
answer ends before the first stop string, however it is split into tokens. The number of tokens cut off a long prompt is
reported. The cache holds keys and values of `max_tokens` positions. The host syncs once per token to check for the end.
All ranks of a sharded model must call this together.

Letters: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lingua.config.keys.generate import GeneratorArgs
from lingua.model.context import Cache
from lingua.tokenizer import Tokenizer

End = Literal["until", "eos", "length"]
ONE_THREAD_PARAMS = 10_000_000
"""Maximum parameters of a model that generates on one CPU thread: the products of a token are too small to split.

Measured with 5 million parameters on two cores, with the spinning that `lingua/__init__.py` sets: one thread is 2.3
times as fast as two, and 3.8 times next to a busy process.
"""


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt."""

    text: str
    end: End
    """until: a stop string; eos: an end token; length: max_gen_len or the model's max_seqlen was reached."""
    n_tokens: int
    """Tokens generated, including stop string and end token."""
    n_cut: int
    """Tokens cut off the start of a prompt that was too long."""
    infilled: bool = False
    """The prompt had gaps, and `text` is the prompt with them filled in."""


# -- pure decisions ------------------------------------------------------------------------------------------------


def cpu_threads(n_params: int, n_threads: int) -> int:
    """Return the number of CPU threads, of `n_threads`, that generates fastest."""
    return 1 if n_params <= ONE_THREAD_PARAMS else n_threads


def prompt_room(args: GeneratorArgs, max_seqlen: int) -> int:
    """Return how many tokens of a prompt are kept: what max_gen_len leaves of the context, but at least half of it."""
    room = max(max_seqlen - args.max_gen_len, max_seqlen // 2)
    return max(1, min(args.max_prompt_len or room, max_seqlen - 1))


def group(lengths: Sequence[int], max_gen_len: int, max_tokens: int) -> list[list[int]]:
    """Return batches of prompt indices of similar length, with rows * (longest prompt + answer) <= max_tokens.

    A batch has at least one row.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or (len(batches[-1]) + 1) * (longest + max_gen_len) > max_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def find_stop(text: bytes, until: Sequence[bytes]) -> int | None:
    """Return the start of the first stop string, in UTF-8 bytes, where an incomplete character matches nothing."""
    return min((at for stop in until if (at := text.find(stop)) >= 0), default=None)


def sample(logits: Tensor, args: GeneratorArgs, generator: torch.Generator | None) -> Tensor:
    """Return the next tokens (B,) from logits (B, V)."""
    if args.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(tempered(logits.float(), args), 1, generator=generator).squeeze(1)


def tempered(logits: Tensor, args: GeneratorArgs) -> Tensor:
    """Return sampling probabilities, (B, V), for a temperature above 0; with top_p they sum to less than 1."""
    logits = logits / args.temperature
    if args.top_k is not None and args.top_k < logits.shape[-1]:
        least = logits.topk(args.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if args.top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= args.top_p, 0.0))
    return probabilities


# -- one row -------------------------------------------------------------------------------------------------------


class Row:
    """The growing answer to one prompt."""

    def __init__(self, number: int, prompt: list[int], limit: int, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self.number = number
        self.position = len(prompt)  # position of the next token
        self.ids: list[int] = []
        self.text = ""
        self.end: End | None = None
        self._limit = limit
        self._tokenizer = tokenizer
        self._until = [stop.encode() for stop in until]
        # A stop string of n bytes has at most n tokens; a few more, so that no character is cut in two.
        self._tail = max(map(len, self._until), default=0) + 4

    def add(self, token: int) -> None:
        """Add one token; set `end` and `text` when the answer is complete."""
        self.ids.append(token)
        if token == self._tokenizer.eos_id or token in self._tokenizer.end_ids:
            self._finish("eos", self._tokenizer.decode(self.ids[:-1]))
            return
        if self._until and find_stop(self._tokenizer.decode_bytes(self.ids[-self._tail :]), self._until) is not None:
            # The tail may decode unlike the whole (a tokenizer may drop a leading space): the whole decides.
            whole = self._tokenizer.decode_bytes(self.ids)
            stop = find_stop(whole, self._until)
            if stop is not None:
                self._finish("until", whole[:stop].decode(errors=self._tokenizer.errors))
                return
        self.position += 1
        if len(self.ids) >= self._limit:
            self._finish("length", self._tokenizer.decode(self.ids))

    def _finish(self, end: End, text: str) -> None:
        self.end, self.text = end, text


# -- the generator -------------------------------------------------------------------------------------------------


class Generator:
    """Answers prompts with a model on its device, in its type, sharded or not.

    `model(tokens, cache=, positions=, select=)` returns logits (B, 1, V); `model.args.max_seqlen` is its context.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, args: GeneratorArgs, *, add_bos: bool = True) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.add_bos = add_bos and tokenizer.bos_id is not None
        self.max_seqlen: int = model.args.max_seqlen  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.on_text: Callable[[str], None] | None = None
        """Called after each token of a single prompt with the text so far; its last character may be incomplete."""
        self._prefill = _maybe_compiled(model, args.compile_prefilling)
        self._next = _maybe_compiled(model, args.reduce_generation_overhead)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str]) -> list[Answer]:
        """Return one answer per prompt, in order. Equal prompts give equal answers: sampling starts from args.seed."""
        room = prompt_room(self.args, self.max_seqlen)
        whole = [self._encode(prompt) for prompt in prompts]
        kept = [ids[-room:] for ids in whole]
        batches = group([len(ids) for ids in kept], self.args.max_gen_len, self.args.max_tokens)
        device = next(self.model.parameters()).device
        random = torch.Generator(device).manual_seed(self.args.seed)
        rows: dict[int, Row] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in with_progress(batches, self.args.show_progress):
                rows |= {row.number: row for row in self._answer({n: kept[n] for n in batch}, device, random)}
        finally:
            self.model.train(was_training)
        return [
            Answer(row.text, row.end or "length", len(row.ids), len(whole[n]) - len(kept[n]))
            for n, row in sorted(rows.items())
        ]

    def _encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt, self.add_bos, False).tolist()
        if not ids:
            raise ValueError("the prompt is empty, and this tokenizer has no begin token to start from; give a prompt")
        return ids

    def _answer(self, prompts: dict[int, list[int]], device: torch.device, random: torch.Generator) -> list[Row]:
        """Answer one batch: one pass over the padded prompts, then one token per row and pass."""
        args = self.args
        rows = [
            Row(n, ids, min(args.max_gen_len, self.max_seqlen - len(ids)), self.tokenizer, args.until)
            for n, ids in prompts.items()
        ]
        width = max(row.position for row in rows)
        cache = Cache(n_slots=min(width + args.max_gen_len, self.max_seqlen), end=width)
        padded = [ids + [0] * (width - len(ids)) for ids in prompts.values()]
        logits: Tensor = self._prefill(
            torch.tensor(padded, device=device),
            cache=cache,
            positions=torch.arange(width, device=device).expand(len(rows), width),
            select=torch.tensor([row.position - 1 for row in rows], device=device),
        )
        active = rows
        while True:
            # The ids of a padded vocabulary beyond the tokenizer's are not tokens.
            tokens = sample(logits[:, -1, : self.tokenizer.vocab_size], args, random)
            for row, token in zip(active, tokens.tolist(), strict=True):
                row.add(token)
            if self.on_text is not None and len(rows) == 1 and rows[0].end is None:
                self.on_text(self.tokenizer.decode(rows[0].ids))
            going = [at for at, row in enumerate(active) if row.end is None]
            if not going:
                return rows
            if len(going) < len(active):
                keep = torch.tensor(going, device=device)
                tokens, active = tokens[keep], [active[at] for at in going]
                cache.keep_rows(keep)
            positions = [[row.position - 1] for row in active]  # of the tokens just added
            cache.end = max(position for (position,) in positions) + 1
            logits = self._next(tokens[:, None], cache=cache, positions=torch.tensor(positions, device=device))


def _maybe_compiled(model: nn.Module, wanted: bool) -> Callable[..., Any]:
    return torch.compile(model, dynamic=True) if wanted else model


def with_progress(batches: Sequence[Any], shown: bool) -> Any:
    if not shown:
        return batches
    from rich.progress import track

    return track(batches, description="generating")
