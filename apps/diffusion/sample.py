"""Generate text by masked diffusion: fill in masked tokens after a prompt, or gaps `[MASK]` in it.

Tokens are filled in over `diffusion_steps` steps; with `block`, blocks of tokens are filled in from left to right,
until the answer has ended. A step that fills in nothing needs no pass (the model does not know the time, so it would
return the same again). Only prompts of the same length are batched, since padding would be seen. Temperature is applied
in fp64, since Gumbel noise in fp32 makes unlikely tokens even rarer.

Letters: B rows, S positions, N places, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingua.config.keys.generate import GeneratorArgs
from lingua.model.decoder import full_tensor
from lingua.model.generate import Answer, Generator, Row, prompt_room, tempered, with_progress

GAP = re.compile(r"\[MASK(?::([1-9]\d*))?\]")
"""`[MASK]` in a prompt is one masked token, `[MASK:12]` twelve."""


@dataclass
class Canvas:
    """A prompt with its masked tokens."""

    ids: list[int]
    n_cut: int = 0
    answer: Row | None = None
    """The answer after the prompt; None for a prompt with gaps."""


def pick(args: GeneratorArgs, logits: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (tokens (N,), their probabilities (N,) at temperature 1) for logits (N, V)."""
    logits = logits.double()
    tokens = logits.argmax(-1)
    if args.temperature > 0:
        uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=random)
        tokens = (tempered(logits, args).log() - torch.log(-torch.log(uniform))).argmax(-1)
    return tokens, logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def surest(certainty: Tensor, n_chosen: Tensor) -> Tensor:
    """Return the places of the n_chosen (B,) largest values of each row of `certainty` (B, S), (B, S) bool."""
    order = certainty.argsort(dim=1, descending=True, stable=True)
    counted = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, counted)
    return ranks < n_chosen[:, None]


class DiffusionGenerator(Generator):
    """Answers prompts, and fills in the gaps of prompts that have some."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[str]) -> list[Answer]:
        """Return one answer per prompt, in order."""
        device = next(self.model.parameters()).device
        random = torch.Generator(device).manual_seed(self.args.seed)
        canvases = [self._canvas(number, prompt) for number, prompt in enumerate(prompts)]
        alike: dict[int, list[Canvas]] = defaultdict(list)
        for canvas in canvases:
            alike[len(canvas.ids)].append(canvas)
        batches = [
            chosen[start : start + n_rows]
            for length, chosen in alike.items()
            for n_rows in [max(1, self.args.max_tokens // length)]
            for start in range(0, len(chosen), n_rows)
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in with_progress(batches, self.args.show_progress):
                self._fill(batch, device, random)
        finally:
            self.model.train(was_training)
        return [self._answer_of(prompt, canvas) for prompt, canvas in zip(prompts, canvases, strict=True)]

    @property
    def _mask(self) -> int:
        return self.model.args.vocab_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def _canvas(self, number: int, prompt: str) -> Canvas:
        if GAP.search(prompt) is None:
            whole = self._encode(prompt)
            ids = whole[-prompt_room(self.args, self.max_seqlen) :]
            limit = min(self.args.max_gen_len, self.max_seqlen - len(ids))
            row = Row(number, ids, limit, self.tokenizer, self.args.until)
            return Canvas([*ids, *[self._mask] * limit], len(whole) - len(ids), row)
        ids, end, before = [], 0, ""
        for gap in [*GAP.finditer(prompt), None]:
            text = prompt[end : None if gap is None else gap.start()]
            ids += self.tokenizer.encode(text, self.add_bos and not ids, False, before).tolist()
            if gap is not None:
                ids += [self._mask] * int(gap[1] or 1)
                end, before = gap.end(), text[-1:] or before
        if len(ids) > self.max_seqlen:
            text = f"the prompt and its gaps are {len(ids)} tokens, but the model sees {self.max_seqlen}; shorten them"
            raise ValueError(text)
        return Canvas(ids)

    def _answer_of(self, prompt: str, canvas: Canvas) -> Answer:
        if (row := canvas.answer) is not None:
            return Answer(row.text, row.end or "length", len(row.ids), canvas.n_cut)
        ids = canvas.ids[1:] if self.add_bos else canvas.ids
        n_filled = sum(int(gap[1] or 1) for gap in GAP.finditer(prompt))
        return Answer(self.tokenizer.decode(ids), "length", n_filled, 0, infilled=True)

    def _fill(self, batch: list[Canvas], device: torch.device, random: torch.Generator) -> None:
        """Fill in the masked tokens of canvases of the same length."""
        x = torch.tensor([canvas.ids for canvas in batch], device=device)  # (B, S)
        hidden = x == self._mask
        place = hidden.cumsum(1) - 1  # index among the masked tokens of its row
        counts = hidden.sum(1).tolist()
        n_hidden = max(counts)
        width = min(self.args.block or n_hidden, n_hidden) or 1
        open_rows = torch.ones(len(batch), 1, dtype=torch.bool, device=device)
        for begin, n_steps in self._blocks(n_hidden, width):
            inside = hidden & (place >= begin) & (place < begin + width) & open_rows
            self._fill_block(x, inside, n_steps, random)
            for number, (canvas, ids, count) in enumerate(zip(batch, x.tolist(), counts, strict=True)):
                if (row := canvas.answer) is None:
                    canvas.ids = ids
                    continue
                first = len(ids) - count + begin  # all its masked tokens are at the end
                for token in ids[first : first + width]:
                    if row.end is None:
                        row.add(token)
                open_rows[number] = row.end is None
            if not open_rows.any():
                return

    def _blocks(self, n_hidden: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield (first masked token, steps) of each block."""
        begins = range(0, n_hidden, width)
        for number, begin in enumerate(begins):
            steps = self.args.diffusion_steps
            own = width if steps is None else steps * (number + 1) // len(begins) - steps * number // len(begins)
            yield begin, max(1, own)

    def _fill_block(self, x: Tensor, inside: Tensor, n_steps: int, random: torch.Generator) -> None:
        for steps_left in range(n_steps, 0, -1):
            left = inside & (x == self._mask)
            if self.args.sampler == "ancestral":  # t falls linearly from 1 to 0: a share 1/steps_left is filled in
                left &= torch.rand(left.shape, device=x.device, generator=random) < 1 / steps_left
            rows = self.rows_to_ask(left).nonzero().squeeze(1)
            if not len(rows):
                continue
            chosen, places = x[rows], left[rows]
            tokens, certainty = pick(self.args, self._logits(chosen, places), random)
            if self.args.sampler == "low_confidence":
                sure = torch.full(places.shape, -1.0, dtype=torch.float64, device=x.device)
                sure[places] = certainty
                n_chosen = (places.sum(1) + steps_left - 1) // steps_left
                kept = places & surest(sure, n_chosen)
                tokens, places = tokens[kept[places]], kept
            chosen[places] = tokens
            x[rows] = chosen

    def rows_to_ask(self, left: Tensor) -> Tensor:
        """Return which rows need a pass, (B,) bool; `left` (B, S): places that this step may fill in."""
        return left.any(1)

    def _logits(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the logits (N, V) of those places, in order, for the tokenizer's ids."""

        def head(hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None = None, **keys: Any) -> Tensor:
            found = (full_tensor(hidden)[places] @ full_tensor(weight).t().to(hidden.dtype)).double()
            return found if soft_cap is None else soft_cap * torch.tanh(found / soft_cap)

        return self.model(x, labels=x, loss=head)[:, : self.tokenizer.vocab_size]
