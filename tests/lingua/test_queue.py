"""What is read from Slurm's answers, and what is made of none."""

from collections.abc import Sequence

import lingua.slurm
from lingua.slurm import Job, ask_slurm, job_of, jobs_in_queue

SQUEUE = """\
7|RUNNING|None|1-02:03:04|n[1-2]|7_N/A
8|PENDING|Priority|2:00:00||8_N/A
9|CANCELLED|None|INVALID|n3|9_N/A
31|RUNNING|None|2:00:00|n4|30_1
30|PENDING|Priority|2:00:00||30_2
30|PENDING|Priority|2:00:00||30_3
"""
SACCT = """\
12|CANCELLED by 1000|None
12.batch|CANCELLED|
"""


def slurm(words: Sequence[str]) -> str | None:
    return {"squeue": SQUEUE, "sacct": SACCT}[words[0]]


def test_the_queue_is_read_at_once():
    queue = jobs_in_queue(slurm)
    assert queue["7"] == Job("7", "RUNNING", "", "1-02:03:04", "n[1-2]")
    assert queue["8"] == Job("8", "PENDING", "Priority", "2:00:00", "")
    assert [name for name, job in queue.items() if job.is_waiting] == ["8", "30", "30_2", "30_3"]
    assert [name for name, job in queue.items() if not job.is_there] == ["9"]
    assert queue["30_1"] is queue["31"], "a task that has started has an id of its own"


def test_a_job_that_left_the_queue_is_in_the_accounts():
    assert job_of("7", jobs_in_queue(slurm), slurm) == Job("7", "RUNNING", "", "1-02:03:04", "n[1-2]")
    assert job_of("12", {}, slurm) == Job("12", "CANCELLED by 1000")
    assert job_of("13", {}, slurm) is None
    assert job_of("", {}, slurm) is None


def test_no_slurm_is_no_answer(monkeypatch):
    assert ask_slurm(["no-such-command-as-this"]) is None
    assert ask_slurm(["false"]) is None
    monkeypatch.setattr(lingua.slurm, "PATIENCE_S", 0.01)
    assert ask_slurm(["sleep", "5"]) is None
    assert jobs_in_queue(lambda words: None) == {}
    assert job_of("7", {}, lambda words: None) is None
