"""`lingua drill`: what is done next, and the verdict, by tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from lingua.selfcheck.drill_plan import (
    LONGEST_PAUSE_S,
    Facts,
    Struck,
    blows,
    judge,
    report,
    text_lines,
)
from lingua.slurm import Limits

TERM = Struck("TERM", step=100, saved=101, safe_s=0.4, back_s=20.0)
KILL = Struck("KILL", step=150, saved=140, back_s=22.0)
GOOD = Facts(
    struck=(TERM, KILL),
    published=frozenset({20, 40, 101, 120, 140, 200}),
    last_step=200,
    differences=(),
    stayed_away=True,
    limits=Limits(grace_s=300.0, preempt_mode="REQUEUE", kill_wait_s=30.0),
)


def test_nothing_to_complain_of():
    verdict = judge(GOOD)
    assert verdict.kept
    assert verdict.limits == []
    told = report(GOOD, verdict)
    assert (told["checkpoints_published"], told["checkpoints_lost"], told["bitwise_equal"]) == (6, 0, True)
    assert (told["signal_to_safe_median_s"], told["signal_to_safe_max_s"]) == (0.4, 0.4), "a kill cannot be answered"
    assert (told["back_median_s"], told["back_max_s"]) == (21.0, 22.0)
    assert told["blows"] == {"KILL": 1, "TERM": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"struck": ()}, "no blow fell on a run that trained"),
        ({"struck": (Struck("requeue", 7, refused="denied"),)}, "no blow fell on a run that trained"),
        ({"struck": (replace(TERM, back_s=None),)}, "after TERM at step 100 the run did not train again"),
        (
            {"struck": (replace(KILL, ended="FileNotFoundError: stop.json"),)},
            "after KILL at step 150 the job did not go back into the queue: FileNotFoundError: stop.json",
        ),
        ({"struck": (replace(TERM, saved=80),)}, "TERM at step 100 was not answered by a checkpoint; the newest is 80"),
        ({"struck": (replace(TERM, kind="USR2", saved=None),)}, "the newest is None"),
        ({"lost": {140: "the newest is now 120"}}, "checkpoint 140 was published and is lost: the newest is now 120"),
        ({"holes": [7, 8]}, "2 steps were never trained, 7 the first of them"),
        ({"differences": None, "uncompared": "it came to step 3 of 200"}, "it came to step 3 of 200"),
        ({"differences": None, "last_step": 0}, "there is no checkpoint"),
        ({"differences": ["model.bin of checkpoint 200"]}, "not equal to the undisturbed run: model.bin of"),
        ({"stayed_away": False}, "the job was cancelled and came back"),
    ],
)
def test_a_broken_promise_fails_the_drill(changes: dict[str, Any], sentence: str):
    verdict = judge(replace(GOOD, **changes))
    assert not verdict.kept
    assert len(verdict.broken) == 1
    assert sentence in verdict.broken[0]
    assert report(GOOD, verdict)["kept"] is False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"private_shm": "a tmpfs of the job's own"}, "a tmpfs of the job's own"),
        ({"not_requeued": "Access denied"}, "goes on where it was (Access denied)"),
        ({"limits": Limits(grace_s=0.0, preempt_mode="REQUEUE")}, "0 s (GraceTime) and a save took up to 0.4 s"),
        ({"limits": Limits(grace_s=60.0, preempt_mode="CANCEL")}, "PreemptMode=CANCEL"),
        ({"limits": Limits(kill_wait_s=0.0)}, "leave 0 s (KillWait)"),
        ({"struck": (TERM, Struck("requeue", 7, refused="denied"))}, "requeue was refused: denied"),
    ],
)
def test_what_a_cluster_does_not_grant_is_told_and_is_no_failure(changes: dict[str, Any], sentence: str):
    verdict = judge(replace(GOOD, **changes))
    assert verdict.kept
    assert len(verdict.limits) == 1
    assert sentence in verdict.limits[0]


def test_without_preemption_its_grace_does_not_matter():
    assert judge(replace(GOOD, limits=Limits(grace_s=0.0, preempt_mode="OFF"))).limits == []
    assert judge(replace(GOOD, limits=Limits(), stayed_away=None)).limits == []


def test_what_requeue_and_kill_leave_unsaved_is_no_broken_promise():
    unsaved = (replace(KILL, saved=None), replace(KILL, kind="requeue", saved=20), replace(KILL, kind="service"))
    assert judge(replace(GOOD, struck=unsaved)).kept


def test_blows_are_at_random_but_none_is_left_out():
    kinds = ("a", "b", "c")
    several = list(islice(blows(kinds, seed=1), 30))
    for first in range(0, 30, 3):
        assert Counter(blow.kind for blow in several[first : first + 3]) == Counter(kinds)
    assert len({tuple(blow.kind for blow in several[i : i + 3]) for i in range(0, 30, 3)}) > 1
    assert all(0 < blow.after_s <= LONGEST_PAUSE_S for blow in several)
    assert several == list(islice(blows(kinds, seed=1), 30))
    assert several != list(islice(blows(kinds, seed=2), 30))


def test_the_text_is_the_same_every_time():
    first, again = list(text_lines(n_lines=5)), list(text_lines(n_lines=5))
    assert first == again
    assert first != list(text_lines(seed=2, n_lines=5))
    assert all(len(line["text"].split()) >= 20 for line in first)
