"""Decide which lines of a data set are documents, and count the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from lingua.data.blocked_source import PLAIN_TEXT
from lingua.files import RunError, human_bytes, plural

MAX_EXAMPLES = 10


@dataclass
class Counts:
    """Numbers of lines by kind, for some files."""

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
        """Describe the lines that are not documents; "" if there are none."""
        blank = plural(self.blank, "blank line or empty file", "blank lines or empty files")
        bad = {"not JSON": self.not_json, "without text": self.no_text, "with empty text": self.empty}
        kinds = [blank] * (self.blank > 0) + [f"{n} {what}" for what, n in bad.items() if n]
        return "; ".join([f"; left out: {', '.join(kinds)}", *self.examples[:3]]) if kinds else ""

    def __str__(self) -> str:
        return f"{plural(self.documents, 'document')}{self.left_out}"


def refuse(problems: Sequence[str], what: str = "files cannot be read") -> None:
    """Raise RunError with the first problems and the number of them, if there are any."""
    if problems:
        more = [f"and {len(problems) - MAX_EXAMPLES} more"] if len(problems) > MAX_EXAMPLES else []
        several = "\n  ".join([f"{len(problems)} {what}:", *problems[:MAX_EXAMPLES], *more])
        raise RunError(several if len(problems) > 1 else problems[0])


class LongLineError(RunError):
    """A line is too long to be parsed within the memory that is left."""

    @classmethod
    def of(cls, name: str, n_bytes: int) -> LongLineError:
        return cls(
            f"{name}: a line of more than {human_bytes(n_bytes)} does not fit into the memory that was allowed; "
            "allow more (MEMORY)"
        )


def judge(line: memoryview, keys: Sequence[str] = PLAIN_TEXT.keys) -> str:
    """Return the name of the count for a line: `documents`, or why it is not a document."""
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
