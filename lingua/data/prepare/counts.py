"""Which lines of a data set are documents, and what became of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from lingua.data.blocked_source import PLAIN_TEXT
from lingua.files import RunError, human_bytes

MAX_EXAMPLES = 10


@dataclass
class Counts:
    """What became of the lines of some files."""

    documents: int = 0
    blank: int = 0
    not_json: int = 0
    no_text: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)
    """`file:line: what is wrong` of the first few."""

    @property
    def bad(self) -> int:
        """Lines that should hold a document and do not."""
        return self.not_json + self.no_text + self.empty

    def add(self, other: Counts) -> None:
        for name in ("documents", "blank", "not_json", "no_text", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    @property
    def left_out(self) -> str:
        """Say what became of the lines that are no documents; empty if there are none."""
        kinds = {"blank lines": self.blank, "not JSON": self.not_json}
        kinds |= {"without text": self.no_text, "with empty text": self.empty}
        some = ", ".join(f"{n} {what}" for what, n in kinds.items() if n)
        return "; ".join([f"; left out: {some}", *self.examples[:3]]) if some else ""

    def __str__(self) -> str:
        return f"{self.documents} documents{self.left_out}"


class LongLineError(RunError):
    """A line is too long to be parsed within the memory that is left."""

    @classmethod
    def of(cls, name: str, n_bytes: int) -> LongLineError:
        return cls(
            f"{name}: a line of more than {human_bytes(n_bytes)} does not fit into the memory that was allowed; "
            "allow more (MEMORY)"
        )


def judge(line: memoryview, keys: Sequence[str] = PLAIN_TEXT.keys) -> str:
    """Return `documents`, or the name of the count that says why a line is not one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "not_json" if bytes(line).strip() else "blank"
    if not isinstance(value, dict):
        return "not_json"
    text = next((value[key] for key in keys if key in value), None)
    if not isinstance(text, str):
        return "no_text"
    return "documents" if text else "empty"


WRONG = {"not_json": "no JSON object", "no_text": "no string in {}", "empty": "empty text"}
