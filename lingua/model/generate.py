"""Generate text: prompts of different lengths in one batch, with a key/value cache, until a stop string.

The greedy answers of a batch are those of its prompts one by one (exactly in fp32, up to near-ties in bf16). An answer
ends before the first stop string, whatever tokens it is split into. Tokens cut off a long prompt are reported.
Memory holds the keys and values of `max_tokens` positions. The host syncs once per token, to look for the end. All
ranks of a sharded model must call this together.

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
"""A model of at most so many parameters is not split over CPU threads: a token's products are too small.

Measured with 5 million parameters on two cores, the threads spinning as `lingua/__init__.py` sets it: one thread
generates 2.3 times what two do, and 3.8 times beside a busy process.
"""


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt."""

    text: str
    end: End
    """until: a stop string came; eos: the document ended; length: max_gen_len or the model's max_seqlen was reached."""
    n_tokens: int
    """Tokens generated, stop string and end token included."""
    n_cut: int
    """Tokens cut off the left of the prompt because it was too long."""
    infilled: bool = False
    """The prompt had gaps, and `text` is the prompt with them filled in."""


# -- pure decisions ------------------------------------------------------------------------------------------------


def cpu_threads(n_params: int, n_threads: int) -> int:
    """Return how many of `n_threads` CPU threads generate fastest."""
    return 1 if n_params <= ONE_THREAD_PARAMS else n_threads


def prompt_room(args: GeneratorArgs, max_seqlen: int) -> int:
    """Tokens of a prompt that are kept: what max_gen_len leaves of the context, but at least half of it."""
    room = max(max_seqlen - args.max_gen_len, max_seqlen // 2)
    return max(1, min(args.max_prompt_len or room, max_seqlen - 1))


def group(lengths: Sequence[int], max_gen_len: int, max_tokens: int) -> list[list[int]]:
    """Numbers of the prompts of each batch, alike in length: rows * (longest prompt + answer) <= max_tokens.

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
    """Return where the first stop string begins, in UTF-8: the sign shown for half a character matches no text."""
    return min((at for stop in until if (at := text.find(stop)) >= 0), default=None)


def sample(logits: Tensor, args: GeneratorArgs, generator: torch.Generator | None) -> Tensor:
    """Next tokens (B,) from logits (B, V)."""
    if args.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(tempered(logits.float(), args), 1, generator=generator).squeeze(1)


def tempered(logits: Tensor, args: GeneratorArgs) -> Tensor:
    """Return probabilities to sample with, (B, V); with top_p they add up to less than 1. Temperature is above 0."""
    logits = logits / args.temperature
    if args.top_k is not None and args.top_k < logits.shape[-1]:
        least = logits.topk(args.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if args.top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all that is likelier
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= args.top_p, 0.0))
    return probabilities


# -- one row -------------------------------------------------------------------------------------------------------


class Row:
    """The growing answer to one prompt."""

    def __init__(self, number: int, prompt: list[int], limit: int, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self.number = number
        self.position = len(prompt)  # of the next token
        self.ids: list[int] = []
        self.text = ""
        self.end: End | None = None
        self._limit = limit
        self._tokenizer = tokenizer
        self._until = [stop.encode() for stop in until]
        # A stop string of n bytes is spelled by at most n tokens; a few more so that no character is cut in two.
        self._tail = max(map(len, self._until), default=0) + 4

    def add(self, token: int) -> None:
        """Take one token; sets `end` and `text` when the answer is complete."""
        self.ids.append(token)
        if token == self._tokenizer.eos_id or token in self._tokenizer.end_ids:
            self._finish("eos", self._tokenizer.decode(self.ids[:-1]))
            return
        if self._until and find_stop(self._tokenizer.decode_bytes(self.ids[-self._tail :]), self._until) is not None:
            # The tail can spell what the whole does not (a tokenizer may drop a leading blank): the whole decides.
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
    """Answers prompts with a model as it is: on its device, in its type, sharded or not.

    `model(tokens, cache=, positions=, select=)` gives logits (B, 1, V); `model.args.max_seqlen` is its context.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, args: GeneratorArgs, *, add_bos: bool = True) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.add_bos = add_bos and tokenizer.bos_id is not None
        self.max_seqlen: int = model.args.max_seqlen  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.on_text: Callable[[str], None] | None = None
        """Called after each token of a single prompt with the text so far, whose last character may not be whole."""
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
        """Return all answers of one batch: one pass over the padded prompts, then one token per row and pass."""
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
            # A vocabulary padded for the kernels has ids that mean nothing.
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
