"""One helper for every stage of the data flow: a state restored is the stream going on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np


class Stream(Protocol):
    """What a stage looks like from here."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def state_dict(self) -> Any: ...


def assert_resumes_everywhere(make_iterator: Callable[[Any], Stream], n: int = 12, tail: int | None = None) -> None:
    """`make_iterator(state)` (None: from the start) restored at each of n + 1 states gives what going on gave.

    Compares the `tail` items after each state (default: all that are left of n) and the states behind them. States
    travel as JSON, as in a checkpoint, and keep their structure.
    """
    stream = make_iterator(None)
    states, items = [_travelled(stream.state_dict())], []
    for _ in range(n):
        items.append(next(stream))
        states.append(_travelled(stream.state_dict()))
    for start in range(n + 1):
        stop = n if tail is None else min(n, start + tail)
        again = make_iterator(states[start])
        assert _travelled(again.state_dict()) == states[start], f"state {start} changes by being restored"
        for index, item in zip(range(start, stop), itertools.islice(again, stop - start), strict=True):
            assert_same(item, items[index], f"restored at {start}, item {index}")
            assert _travelled(again.state_dict()) == states[index + 1], f"restored at {start}, state behind {index}"


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit, arrays and tuples of arrays included."""
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, where
        np.testing.assert_array_equal(left, right, err_msg=where)
    elif isinstance(left, tuple):
        assert len(left) == len(right), where
        for a, b in zip(left, right, strict=True):
            assert_same(a, b, where)
    else:
        assert left == right, where


def _travelled(state: Any) -> Any:
    return json.loads(json.dumps(state))
