"""The parts of a start-up add up to all of it, whatever comes between them."""

import os
import time

import pytest

from lingua.run.startup import StartUp, in_words, parts_in, process_began_s, since_boot_s
from tests.fakes import Clock


@pytest.mark.parametrize(
    ("laps", "parts", "words"),
    [
        ([], {}, "start-up 0.0 s: "),
        ([(0.9, "python"), (2.1, "torch")], {"python": 0.9, "torch": 2.1}, "start-up 3.0 s: python 0.9, torch 2.1"),
        (
            [(1.0, "data"), (0.5, "ranks"), (0.25, "data")],
            {"data": 1.25, "ranks": 0.5},
            None,
        ),  # a part that comes twice
        ([(1.0, "data"), (60.0, None), (0.5, "first step")], {"data": 1.0, "first step": 0.5}, None),  # None: left out
        ([(-5.0, "python"), (1.0, "torch")], {"python": 0.0, "torch": 1.0}, None),  # a clock is never set back: a guard
    ],
)
def test_each_moment_belongs_to_one_part(
    laps: list[tuple[float, str | None]], parts: dict[str, float], words: str | None
):
    clock = Clock(100.0)
    startup = StartUp(100.0, clock.now)
    for seconds, part in laps:
        clock.sleep(seconds)
        startup.leave_out() if part is None else startup.reached(part)
    assert startup.parts == pytest.approx(parts)
    assert startup.seconds == pytest.approx(sum(parts.values()))
    assert words is None or str(startup) == words == in_words(parts)
    expected = {"startup/s": startup.seconds} | {f"startup/{p.replace(' ', '_')}_s": s for p, s in parts.items()}
    assert startup.metrics() == pytest.approx(expected)


def test_a_process_knows_when_it_began():
    before_s, ticks_s = since_boot_s(), 2 / os.sysconf("SC_CLK_TCK")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if before_s - ticks_s <= process_began_s() <= since_boot_s() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert process_began_s() < time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("note", [{}, {"parts": None}, {"parts": {"torch": "long"}}])
def test_a_line_of_another_form_has_no_parts(note: dict[str, object]):
    assert parts_in(note) == {}
