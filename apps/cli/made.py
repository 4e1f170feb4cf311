"""The result of an export or import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Made:
    """A converted model in a new folder."""

    folder: Path
    origin: str
    """What was converted."""
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
