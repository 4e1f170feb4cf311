"""What the compiler makes of the loss and of an update on an H200, read from its code."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from lingua.model.loss import _loss_of_logits_in_one_pass
from lingua.optim.adamw import _move
from tests.gpu_code import triton_kernels

N = 1 << 20


def test_an_update_with_bf16_moments_is_one_kernel_that_reads_and_writes_each_tensor_once() -> None:
    def tensors() -> tuple[Tensor, ...]:
        moments = [torch.empty(N, dtype=torch.bfloat16) for _ in range(2)]
        scalars = [torch.empty(()) for _ in range(8)]
        return torch.empty(N), torch.empty(N), *moments, *scalars[:2], torch.empty((), dtype=torch.bool), *scalars[2:]

    assert has_triton() == torch.cuda.is_available()  # torch keeps this answer
    (kernel,) = triton_kernels(lambda *tensors: _move(*tensors) or (), tensors)
    assert len(re.findall(r"tl\.load\(in_ptr\d+ \+ \(x0\)", kernel)) == 4
    assert len(re.findall(r"tl\.store\(", kernel)) == 3
    assert "pow" not in kernel  # of a scalar, but computed for each element
    assert "float64" not in kernel


def test_loss_and_gradient_of_a_chunk_are_two_kernels_that_read_the_logits_three_times() -> None:
    vocabulary = 128_256

    def tensors() -> tuple[Tensor, ...]:
        return torch.empty(4096, vocabulary, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.int64)

    large, small = triton_kernels(
        lambda logits, labels: _loss_of_logits_in_one_pass(logits, labels, None, None, 1e-4, True), tensors
    )
    of_logits = re.compile(rf"tl\.(?:load|store)\(\w+ \+ \(r0_\d \+ {vocabulary}\*x0\)")
    assert len(of_logits.findall(large)) == 3 + 1
    assert not of_logits.findall(small)
