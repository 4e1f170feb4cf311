"""Which steps lie in a window; requests on their way from a file to a vote."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lingua.config.keys.profiling import ProfilerArgs
from lingua.files import RunError, write_json
from lingua.profiling.windows import (
    ALL,
    LIGHT,
    Request,
    Requests,
    allowed,
    ask_to_profile,
    lies_in,
    planned,
    request_file,
    request_in,
    take_request,
)
from lingua.run.lock import RunLock

WINDOWS = {
    "light_warmup": 1,
    "light_steps": 3,
    "mem_warmup": 2,
    "mem_steps": 1,
    "profile_warmup": 3,
    "profile_steps": 2,
}


@pytest.mark.parametrize(
    ("warmup", "n_steps", "every", "steps"),
    [
        (2, 3, 0, [2, 3, 4]),
        (0, 1, 0, [0]),
        (2, 0, 0, []),
        (2, 0, 4, []),
        (2, 2, 5, [2, 3, 7, 8]),
        (1, 4, 4, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_a_window_by_the_steps_done_before(warmup: int, n_steps: int, every: int, steps: list[int]):
    assert [done for done in range(10) if lies_in(done, warmup, n_steps, every)] == steps


@pytest.mark.parametrize(
    ("keys", "rank", "kinds"),
    [
        ({"run": False}, 0, ["", "", "", "", "", ""]),
        ({}, 0, ["", "light", "light memory", "light trace", "trace", ""]),
        ({}, 1, ["", "light", "light", "light", "", ""]),
        ({"ranks": [1]}, 1, ["", "light", "light memory", "light trace", "trace", ""]),
        ({"ranks": [1]}, 0, ["", "light", "light", "light", "", ""]),
        ({"ranks": "all", "light_steps": 0}, 7, ["", "", "memory", "trace", "trace", ""]),
        ({"every": 3}, 0, ["", "light", "light memory", "light trace", "light trace", "light memory"]),
    ],
)
def test_the_plan(keys: dict[str, Any], rank: int, kinds: list[str]):
    args = ProfilerArgs.model_validate({"run": True} | WINDOWS | keys)
    assert [" ".join(sorted(planned(args, done, rank))) for done in range(6)] == kinds


def test_who_may_write_traces():
    assert [allowed(ProfilerArgs(), rank) for rank in (0, 1)] == [ALL, LIGHT]


def test_windows_without_a_step_between_them_are_refused():
    with pytest.raises(ValidationError, match="every 4 leaves no step between heavy windows of 4; raise every"):
        ProfilerArgs(profile_steps=4, every=4)


# -- requests ------------------------------------------------------------------------------------------------------


def sums_of(*ranks: Requests) -> dict[str, float]:
    numbers = [requests.numbers() for requests in ranks]
    return {name: sum(each[name] for each in numbers) for name in numbers[0]}


def test_a_request_is_submitted_once_and_comes_back_with_its_id():
    main, other = Requests(), Requests()
    first, second = Request(3, True, "00000001"), Request(7, False, "00000002")
    main.ask(first)
    main.ask(second)
    reduced = [sums_of(main, other) for _ in range(3)]
    assert [list(sums.values()) for sums in reduced] == [[0, 7], [0, 14], [0, 0]]
    assert [main.agreed(sums, 5) for sums in reduced] == [first, second, None]
    assert [other.agreed(sums, 5) for sums in reduced] == [Request(3, True), Request(7, False), None]


def test_a_signal_at_any_number_of_ranks_is_one_request():
    ranks = [Requests() for _ in range(3)]
    for requests in ranks[1:]:
        requests.by_signal.note(10, None)
    sums = sums_of(*ranks)
    assert list(sums.values()) == [2, 0]
    assert [requests.agreed(sums, 5) for requests in ranks] == [Request(5, True)] * 3
    assert list(sums_of(*ranks).values()) == [0, 0]


def test_a_request_reaches_the_start_that_it_was_meant_for_once(tmp_path: Path):
    with RunLock(tmp_path) as lock:
        asked = ask_to_profile(tmp_path, lock.attempt, 5, heavy=False)
        with pytest.raises(RunError, match="has not heard the last request yet"):
            ask_to_profile(tmp_path, lock.attempt, 5, heavy=False)
        assert take_request(tmp_path, lock.attempt + 1) is None
        assert take_request(tmp_path, lock.attempt) == asked
        assert take_request(tmp_path, lock.attempt) is None


@pytest.mark.parametrize(("n_steps", "heavy"), [(0, False), (-1, True), (21, True), (10_001, False)])
def test_too_many_steps_are_refused(tmp_path: Path, n_steps: int, heavy: bool):
    with pytest.raises(RunError, match=f"--steps is {n_steps}, but a .*window has 1 to"):
        ask_to_profile(tmp_path, 1, n_steps, heavy)


GOOD = {"n_steps": 2, "heavy": True, "id": "0123abcd"}


def test_a_file_that_asks_for_nothing_is_removed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert request_in(GOOD) == Request(2, True, "0123abcd")
    path = request_file(tmp_path, 1)
    path.parent.mkdir()
    bad: list[Any] = [[], {}, GOOD | {"id": "../../x"}, GOOD | {"n_steps": True}, GOOD | {"n_steps": 10**9}]
    for record in [*bad, GOOD | {"heavy": 1}, GOOD | {"n_steps": 2.5}]:
        write_json(path, record)
        assert take_request(tmp_path, 1) is None
        assert not path.exists()
        assert "asks for no profile" in caplog.messages[-1]
    path.write_bytes(b"{")
    assert take_request(tmp_path, 1) is None
    assert "is not valid JSON" in caplog.messages[-1]
