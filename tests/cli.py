"""The command `lingua`, called in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lingua.config.command_line import run_main


class Lingua:
    """`lingua FIRST ...`: returns exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *first: str) -> None:
        self.capsys, self._first = capsys, first

    def __call__(self, *words: object) -> tuple[int, str, str]:
        from apps.cli.main import app

        given = [*self._first, *map(str, words)]
        code = run_main(lambda typed: app(typed, prog_name="lingua", standalone_mode=False), given)
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err

    def record(self, *words: object, code: int = 0) -> Any:
        """What --json prints; the exit code must be `code`."""
        found, out, err = self(*words, "--json")
        assert found == code, err
        return json.loads(out)
