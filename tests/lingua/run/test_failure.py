"""Kinds of failures, decided by a table; the files that tell of them."""

import errno
import pickle
import tempfile
from pathlib import Path

import orjson
import pytest
import torch

from lingua.config.base import ConfigError
from lingua.data.blocked_source import DataError
from lingua.files import DiskError, RunError, make_folder
from lingua.run.failure import (
    KINDS,
    HungError,
    RankError,
    TooLargeError,
    carried,
    classify,
    error_file,
    failure_of,
    fits,
    read_failures,
    record,
)
from lingua.run.lock import OccupiedError


class NonFiniteError(RunError):
    """As an app's own loop may have it."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("unknown key optim.lrr"), "config"),
        (ValueError("device: cuda, but torch sees no CUDA device here"), "config"),
        (RunError("none of the checkpoints verifies"), "setup"),
        (DataError("x.jsonl line 7: no text"), "data"),
        (NonFiniteError("step 7: the loss is nan"), "nan"),
        (RuntimeError("Function 'SqrtBackward0' returned nan values in its 0th output."), "nan"),
        (RuntimeError("Function 'MulBackward0' returned an invalid gradient at index 0 - got [2]"), "bug"),
        (OccupiedError("out/x is being trained by process 7"), "occupied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (RunError("checkpoint 4 is lost: the disk is full at out/x (0 B free); make room"), "disk_full"),
        (OSError(errno.EIO, "Input/output error"), "disk"),
        (DiskError("checkpoint 4 is lost: Input/output error", errno.EIO), "disk"),
        (DiskError("cannot lock out/x: Stale file handle", errno.ESTALE), "disk"),
        (DiskError("checkpoint 4 is lost", errno.ENOSPC), "disk_full"),
        (DiskError("dump_dir: cannot write to out/x", errno.EACCES), "setup"),
        (DiskError("dump_dir: cannot write to out/x", errno.ENOTDIR), "setup"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "disk"),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error"), "nccl"),
        (torch.distributed.DistNetworkError("Failed to recv"), "nccl"),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "nccl"),
        (ConnectionResetError("Connection reset by peer"), "nccl"),
        (RunError("rank 1 of 8 did not meet the others at n1:20000 within 600 s"), "nccl"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("CUDA error: device-side assert triggered"), "bug"),
        (RunError("loader worker 1 (pid 7) was killed by SIGKILL; start again to go on"), "worker"),
        (HungError("rank 1 hangs"), "hang"),
        (RankError("rank 1: DataError: x", "data"), "data"),
        (RankError("rank 0 is gone"), "nccl"),
        (AssertionError("rows"), "bug"),
        (TypeError("unsupported operand"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "bug"),
    ],
)
def test_every_error_has_one_kind(error: Exception, kind: str):
    assert classify(error) == kind


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in SqrtBackward0")
def test_the_nan_that_torchs_anomaly_detection_ends_at_is_one():
    x = torch.zeros(1, requires_grad=True)
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError) as caught:
        (x.sqrt() * 0).sum().backward()
    assert classify(caught.value) == "nan"


@pytest.mark.parametrize(
    ("error", "number", "path"),
    [
        (OSError(errno.EIO, "Input/output error", "/run/a"), errno.EIO, "/run/a"),
        (OSError(errno.ESTALE, "Stale file handle"), errno.ESTALE, None),
        (DiskError("it failed", errno.EIO, "/run/a"), errno.EIO, "/run/a"),
    ],
)
def test_an_error_of_the_disk_keeps_its_errno_and_path_on_its_way_to_other_ranks(
    error: Exception, number: int, path: str | None
):
    told = pickle.loads(pickle.dumps(carried(error, "checkpoint 4 is lost")))
    assert isinstance(told, DiskError)
    assert (str(told), told.errno, told.path, classify(told)) == ("checkpoint 4 is lost", number, path, "disk")


@pytest.mark.parametrize("error", [RunError("x"), OccupiedError("x"), DataError("x"), ValueError("x"), TypeError("x")])
def test_an_error_keeps_its_kind_on_its_way_to_other_ranks(error: Exception):
    assert classify(pickle.loads(pickle.dumps(carried(error)))) == classify(error)


def test_a_folder_that_cannot_be_written_for_a_moment_is_not_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(**more: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(more["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(DiskError, match=r"dump_dir: cannot write to .* \(Stale file handle\)") as caught:
        make_folder(tmp_path, "dump_dir")
    assert classify(caught.value) == "disk"


def test_what_would_loop_is_not_started_again():
    hopeless = {kind for kind, facts in KINDS.items() if not facts.restart_may_help}
    assert hopeless == {"config", "setup", "data", "nan", "oom", "too_large", "disk_full", "occupied"}


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_failure_is_kept_with_what_explains_it(tmp_path: Path):
    failure = failure_of(raised(DataError("line 7")), rank=3, step=12, incarnation=2)
    record(tmp_path, failure)
    facts = orjson.loads(error_file(tmp_path, 3).read_bytes())
    assert (facts["kind"], facts["type"], facts["message"], facts["step"]) == ("data", "DataError", "line 7", 12)
    assert facts["restart_may_help"] is False
    assert "in raised" in facts["traceback"]
    assert facts["host"]
    assert facts["time"]
    assert read_failures(tmp_path) == [failure]


def test_failures_come_by_rank_and_what_is_damaged_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for rank in (10, 2):
        record(tmp_path, failure_of(ValueError("x"), rank=rank, step=None, incarnation=None))
    error_file(tmp_path, 1).write_text("{")
    error_file(tmp_path, 5).write_text("{}")
    (tmp_path / "logs" / "error_2.0001.json").write_text("{}")  # of an earlier start
    assert [failure.rank for failure in read_failures(tmp_path)] == [2, 10]
    assert "error_1.json cannot be read" in caplog.text


def test_a_disk_that_refuses_the_file_hides_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "logs").write_text("")
    record(tmp_path, failure_of(ValueError("x"), rank=0, step=1, incarnation=1))
    assert "cannot write" in caplog.text


def test_what_does_not_fit_into_the_memory_is_a_sentence_that_does_not_advise_a_smaller_batch():
    said = "the model does not fit into the memory; take a smaller model"
    with pytest.raises(TooLargeError, match=said) as caught, fits("the model"):
        torch.empty(1 << 50)  # more than any process can address
    assert classify(caught.value) == classify(carried(caught.value)) == "too_large"
    with pytest.raises(ZeroDivisionError), fits("the model"):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="size"), fits("the model"):
        _ = torch.zeros(2) + torch.zeros(3)
