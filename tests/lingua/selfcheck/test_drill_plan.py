"""`lingua drill`: what is done next, and the verdict, by tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from lingua.selfcheck.drill_plan import (
    LONGEST_PAUSE_S,
    Injected,
    Seen,
    broken,
    faults,
    not_granted,
    report,
    text_lines,
)
from lingua.slurm import Limits

TERM = Injected("TERM", step=100, saved=101, safe_s=0.4, back_s=20.0)
KILL = Injected("KILL", step=150, saved=140, back_s=22.0)
GOOD = Seen(
    injected=(TERM, KILL),
    published=frozenset({20, 40, 101, 120, 140, 200}),
    last_step=200,
    differences=(),
    stayed_away=True,
    limits=Limits(grace_s=300.0, preempt_mode="REQUEUE", kill_wait_s=30.0),
)


def test_nothing_to_complain_of():
    found = report(GOOD)
    assert (found["kept"], found["broken"], found["not_granted_here"]) == (True, [], [])
    assert (found["checkpoints_published"], found["checkpoints_lost"], found["bitwise_equal"]) == (6, 0, True)
    assert (found["signal_to_safe_median_s"], found["signal_to_safe_max_s"]) == (0.4, 0.4), "a kill cannot be answered"
    assert (found["back_median_s"], found["back_max_s"]) == (21.0, 22.0)
    assert found["blows"] == {"KILL": 1, "TERM": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"injected": ()}, "no fault was injected while the run was training"),
        ({"injected": (Injected("requeue", 7, refused="denied"),)}, "no fault was injected while the run was training"),
        ({"injected": (replace(TERM, back_s=None),)}, "after TERM at step 100 the run did not train again"),
        (
            {"injected": (replace(KILL, ended="FileNotFoundError: stop.json"),)},
            "after KILL at step 150 the job did not go back into the queue: FileNotFoundError: stop.json",
        ),
        (
            {"injected": (replace(TERM, saved=80),)},
            "TERM at step 100 was not answered by a checkpoint; the newest is 80",
        ),
        ({"injected": (replace(TERM, kind="USR2", saved=None),)}, "the newest is None"),
        ({"lost": {140: "the newest is now 120"}}, "checkpoint 140 was published and is lost: the newest is now 120"),
        ({"holes": [7, 8]}, "2 steps were never trained, the first is 7"),
        ({"differences": None, "uncompared": "it came to step 3 of 200"}, "it came to step 3 of 200"),
        ({"differences": None, "last_step": 0}, "there is no checkpoint"),
        ({"differences": ["model.bin of checkpoint 200"]}, "not equal to the undisturbed run: model.bin of"),
        ({"stayed_away": False}, "the job was cancelled and came back"),
    ],
)
def test_a_broken_promise_fails_the_drill(changes: dict[str, Any], sentence: str):
    seen = replace(GOOD, **changes)
    (problem,) = broken(seen)
    assert sentence in problem
    assert report(seen)["kept"] is False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"private_shm": "a tmpfs of the job's own"}, "a tmpfs of the job's own"),
        ({"not_requeued": "Access denied"}, "to resume (Access denied)"),
        ({"limits": Limits(grace_s=0.0, preempt_mode="REQUEUE")}, "0 s (GraceTime) and a save took up to 0.4 s"),
        ({"limits": Limits(grace_s=60.0, preempt_mode="CANCEL")}, "PreemptMode=CANCEL"),
        ({"limits": Limits(kill_wait_s=0.0)}, "leave 0 s (KillWait)"),
        ({"injected": (TERM, Injected("requeue", 7, refused="denied"))}, "requeue was refused: denied"),
    ],
)
def test_what_a_cluster_does_not_grant_is_told_and_is_no_failure(changes: dict[str, Any], sentence: str):
    seen = replace(GOOD, **changes)
    (limit,) = not_granted(seen)
    assert sentence in limit
    assert report(seen)["kept"]


def test_without_preemption_its_grace_does_not_matter():
    assert list(not_granted(replace(GOOD, limits=Limits(grace_s=0.0, preempt_mode="OFF")))) == []
    assert list(not_granted(replace(GOOD, limits=Limits(), stayed_away=None))) == []


def test_what_requeue_and_kill_leave_unsaved_is_no_broken_promise():
    unsaved = (replace(KILL, saved=None), replace(KILL, kind="requeue", saved=20), replace(KILL, kind="service"))
    assert not list(broken(replace(GOOD, injected=unsaved)))


def test_faults_are_at_random_but_none_is_left_out():
    kinds = ("a", "b", "c")
    several = list(islice(faults(kinds, seed=1), 30))
    for first in range(0, 30, 3):
        assert Counter(fault.kind for fault in several[first : first + 3]) == Counter(kinds)
    assert len({tuple(fault.kind for fault in several[i : i + 3]) for i in range(0, 30, 3)}) > 1
    assert all(0 < fault.after_s <= LONGEST_PAUSE_S for fault in several)
    assert several == list(islice(faults(kinds, seed=1), 30))
    assert several != list(islice(faults(kinds, seed=2), 30))


def test_the_text_is_the_same_every_time():
    first, again = list(text_lines(n_lines=5)), list(text_lines(n_lines=5))
    assert first == again
    assert first != list(text_lines(seed=2, n_lines=5))
    assert all(len(line["text"].split()) >= 20 for line in first)
