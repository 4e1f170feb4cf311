"""What an export or import made, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Made:
    """A folder that was made."""

    folder: Path
    origin: str
    """What was converted, from where."""
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
