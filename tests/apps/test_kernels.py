"""The kernels of other packages, by stand-ins with their signatures that compute the same by ours."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.main.args import TrainArgs
from lingua.config.base import ConfigError
from lingua.config.keys import model as keys
from lingua.config.keys.model import DecoderArgs, HybridArgs, KernelArgs
from lingua.model.attention import RowDocuments
from lingua.model.context import Cache
from lingua.model.kernels import kernels_in_use
from lingua.model.recurrence import decayed_attention, linear_scan, mlstm
from tests.families import FAMILIES, MAMBA, SHARED, build

calls: list[str] = []


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: None = None, z: None = None,  # noqa: N803
    dt_bias: None = None, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False, return_varlen_states: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    calls.append("mamba_ssm")
    assert A.shape == (x.shape[2],)
    assert return_final_states
    starts = None
    if seq_idx is not None:
        assert (seq_idx.shape, seq_idx.dtype) == (x.shape[:2], torch.int32)
        starts = seq_idx.diff(dim=1, prepend=seq_idx[:, :1] - 1) != 0
    state = None
    if initial_states is not None:
        assert initial_states.shape == (len(x), *x.shape[2:], B.shape[3])
        state = initial_states.transpose(-1, -2)
    y, last = decayed_attention(C, B, x * dt.unsqueeze(-1), dt * A, starts, state, chunk_size)
    return y.type_as(x), last.transpose(-1, -2)


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    calls.append("fla")
    assert g is not None
    assert q.shape[:3] == k.shape[:3] == v.shape[:3] == g.shape
    assert scale == 1.0
    assert output_final_state
    if cu_seqlens is None:
        y, last = decayed_attention(q, k, v, g, None, initial_state)
        return y.type_as(v), last
    assert len(q) == 1
    lengths = cu_seqlens.diff().tolist()
    parts = [decayed_attention(*each) for each in zip(*(x.split(lengths, dim=1) for x in (q, k, v, g)), strict=True)]
    return torch.cat([y for y, _ in parts], dim=1), torch.cat([last for _, last in parts])


def chunk_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    calls.append("fla")
    assert bool(g.isfinite().all())
    return linear_scan(g.exp(), x, initial_state), None


def get_mlstm_kernel(name: str) -> Any:
    assert name == "chunkwise--triton_xl_chunk"

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c_initial: None = None, n_initial: None = None,
        m_initial: None = None, return_last_states: bool = False, eps: float = 1e-6, chunk_size: int = 128,
        autocast_kernel_dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        calls.append("mlstm_kernels")
        assert q.shape[2] % chunk_size == 0
        assert i.shape == f.shape == q.shape[:3]
        assert (eps, autocast_kernel_dtype, return_last_states) == (1e-6, q.dtype, False)
        q, k, v, i, f = (each.transpose(1, 2) for each in (q, k, v, i, f))
        return mlstm(q, k, v, i, f, chunk=chunk_size)[0].transpose(1, 2)

    return kernel


STAND_INS: dict[str, Any] = {
    "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
    "fla.ops.simple_gla": chunk_simple_gla,
    "fla.ops.hgrn": chunk_hgrn,
    "mlstm_kernels.torch": get_mlstm_kernel,
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is installed, and the CPU counts as a GPU."""
    for path, function in STAND_INS.items():
        names = path.split(".")
        for end in range(1, len(names) + 1):
            monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(names[end - 1]))
        setattr(sys.modules[path], function.__name__, function)
    unfit = KernelArgs.kernel_unfit
    monkeypatch.setattr(keys, "INSTALLED_KERNELS", frozenset(keys.KERNELS))
    monkeypatch.setattr(KernelArgs, "kernel_unfit", lambda self, kernel, _, **here: unfit(self, kernel, "cuda", **here))
    calls.clear()
    yield
    calls.clear()


def of(name: str, **keys: Any) -> DecoderArgs:
    return FAMILIES[name].model_copy(update=keys)


MLSTM: dict[str, Any] = {"n_heads": 1, "chunk_size": 16}
CASES = [
    (of("mamba2"), "mamba_ssm"),
    (of("mamba2, every option"), "mamba_ssm"),
    (of("mamba2", kernel="fla"), "fla"),
    (of("mamba2, every option", kernel="fla"), "fla"),
    (of("mingru"), "fla"),
    (of("minlstm"), "fla"),
    (of("hawk"), "fla"),
    (of("mlstm", **MLSTM), "mlstm_kernels"),
]
every_kernel = pytest.mark.parametrize(("args", "kernel"), CASES, ids=[f"{args.type} {k}" for args, k in CASES])


def both(args: DecoderArgs) -> Any:
    return build(args), build(args.model_copy(update={"kernel": "torch"}))


@every_kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_gives_what_torch_gives(args: DecoderArgs, kernel: str, packed: bool) -> None:
    tokens = torch.randint(0, args.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0] * 7 + [1] + [2] * 16, [0] * 16 + [1] * 8])
    documents = RowDocuments(ids, torch.tensor([0, 7, 8, 24, 40, 48], dtype=torch.int32)) if packed else None
    grads = []
    for model in both(args):
        model(tokens, documents=documents).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        assert set(calls) == (set() if args.type == "mlstm" and packed else {kernel})  # it knows no documents
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@every_kernel
@torch.no_grad()
@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_goes_on_from_the_state_of_padded_prompts(args: DecoderArgs, kernel: str) -> None:
    tokens = torch.randint(0, args.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    found = []
    for model in both(args):
        cache = Cache(n_slots=12, end=8)
        model(tokens[:, :8], cache=cache, positions=torch.arange(8).expand(2, 8), select=torch.tensor([7, 4]))
        found.append(model(tokens[:, 8:9], cache=cache, positions=torch.tensor([[8], [5]])))
    assert set(calls) <= {kernel}
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("keys_of_model", "others", "sentence"),
    [
        ({"type": "mamba2", "kernel": "mamba_ssm"}, {}, "install it with `uv pip install --no-build-isolation mamba"),
        ({"type": "mlstm", "kernel": "mlstm_kernels"}, {}, "install it with `uv pip install mlstm-kernels`"),
        ({"type": "hawk", "kernel": "fla"}, {}, "install it with `uv pip install flash-linear-attention`"),
        ({"type": "mamba2", "kernel": "torch"}, {"device": "cpu"}, None),
    ],
)  # fmt: skip
def test_a_kernel_that_is_missing_is_named_with_what_installs_it(
    keys_of_model: dict[str, Any], others: dict[str, Any], sentence: str | None
) -> None:
    args = TrainArgs.model_validate({"model": keys_of_model} | others)
    found = [says for key, says in args.model.conflicts(args) if key == "model.kernel"]
    assert len(found) == (0 if sentence is None else 1)
    assert all(str(sentence) in says for says in found)


def test_a_kernel_that_does_not_fit_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "INSTALLED_KERNELS", frozenset(keys.KERNELS))
    with pytest.raises(ConfigError, match=r"for hawk.*, but it runs on CUDA only, and the device is cpu"):
        list(kernels_in_use(of("hawk", kernel="fla"), "cpu", documents=False))
    named = of("mlstm", kernel="mlstm_kernels", **MLSTM)
    with pytest.raises(ConfigError, match="it cannot reset its memory where a document begins"):
        list(kernels_in_use(named, "cuda", documents=True))
    odd = named.model_copy(update={"chunk_size": 48})
    with pytest.raises(ConfigError, match=r"it needs powers of two from 16 on, and model\.chunk_size is 48"):
        list(kernels_in_use(odd, "cuda", documents=False))


def test_auto_is_torch_on_a_cpu_and_what_is_installed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = HybridArgs(**SHARED, layers=["mamba2", "hawk"], blocks={"mamba2": MAMBA})
    assert list(kernels_in_use(hybrid, "cuda", documents=False))[:2] == ["mamba2 by torch", "hawk by torch"]
    monkeypatch.setattr(keys, "INSTALLED_KERNELS", frozenset({"fla"}))
    assert list(kernels_in_use(hybrid, "cuda", documents=True))[:2] == ["mamba2 by fla", "hawk by fla"]
    assert list(kernels_in_use(hybrid, "cpu", documents=True))[:2] == ["mamba2 by torch", "hawk by torch"]
    torch.use_deterministic_algorithms(True)
    try:
        assert list(kernels_in_use(hybrid, "cuda", documents=True))[:2] == ["mamba2 by torch", "hawk by torch"]
    finally:
        torch.use_deterministic_algorithms(False)
