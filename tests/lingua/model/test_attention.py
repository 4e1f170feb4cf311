import inspect
import itertools
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lingua.config.base import ConfigError
from lingua.config.keys.model import LlamaArgs
from lingua.distributed.compile import let_length_vary
from lingua.model import attention
from lingua.model.attention import (
    KernelConditions,
    attend,
    build_mask,
    choose,
    document_bounds,
    refusal,
    resolve_attn_impl,
)
from tests import packed_kernels
from tests.packed_kernels import row_documents

NAMES = ["sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "varlen", "xformers", "flash_attn", "eager"]
BOTH = frozenset({"xformers", "flash_attn"})


def place(device_type: str = "cuda", **keys: object) -> KernelConditions:
    facts: dict[str, object] = {
        "capability": (9, 0) if device_type == "cuda" else (0, 0),
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "doc_mask": False,
        "window": False,
        "installed": BOTH,
        "varlen_windows": False,
    }
    return KernelConditions(device_type=device_type, **(facts | keys))  # pyright: ignore[reportArgumentType]


# -- the decision, by tables ---------------------------------------------------------------------------------------

PACKED = ["varlen", "xformers", "flash_attn"]
WORKING = [
    (place(), NAMES),
    (place(window=True), ["sdpa", "flex", "xformers", "flash_attn", "eager"]),
    (place(window=True, varlen_windows=True), ["sdpa", "flex", *PACKED, "eager"]),
    (place(doc_mask=True), ["sdpa", "flex", *PACKED, "eager"]),
    (place(doc_mask=True, window=True), ["sdpa", "flex", "xformers", "flash_attn", "eager"]),
    (place(doc_mask=True, window=True, varlen_windows=True), ["sdpa", "flex", *PACKED, "eager"]),
    (place(doc_mask=True, deterministic=True), ["sdpa", "flex", "varlen", "flash_attn", "eager"]),
    (place(doc_mask=True, installed=frozenset()), ["sdpa", "flex", "varlen", "eager"]),
    (place(doc_mask=True, dtype=torch.float32), ["sdpa", "flex", "eager"]),
    (place(doc_mask=True, capability=(7, 5)), ["sdpa", "flex", "eager"]),
    (place(doc_mask=True, head_dim=264), ["sdpa", "flex", "eager"]),
    (place(dtype=torch.float32), ["sdpa", "flex", "eager"]),
    (place(capability=(7, 0)), ["sdpa", "eager"]),
    (place(capability=(8, 0)), [name for name in NAMES if name != "sdpa_cudnn_first"]),
    (place(head_dim=192), [name for name in NAMES if name != "sdpa_cudnn"]),
    (place(head_dim=20), ["sdpa", "sdpa_cudnn_first", "flex", "eager"]),
    (place(installed=frozenset()), [name for name in NAMES if name not in BOTH]),
    (place(deterministic=True), ["sdpa", "sdpa_flash", "flex", "varlen", "flash_attn", "eager"]),
    (place("cpu"), ["sdpa", "sdpa_flash", "eager"]),
    (place("cpu", doc_mask=True), ["sdpa", "eager"]),
]


@pytest.mark.parametrize(("here", "working"), WORKING)
def test_what_works_where(here: KernelConditions, working: list[str]) -> None:
    assert [name for name in NAMES if refusal(name, here) is None] == working


@pytest.mark.parametrize(
    ("here", "best"),
    [
        (place(), "sdpa_cudnn_first"),
        (place(capability=(8, 0)), "sdpa"),
        (place(capability=(10, 0)), "sdpa"),
        (place(deterministic=True), "sdpa"),
        (place(dtype=torch.float32), "sdpa"),
        (place(doc_mask=True), "flex"),
        (place(window=True), "flex"),
        (place("cpu"), "sdpa"),
        (place("cpu", doc_mask=True, window=True), "sdpa"),
    ],
)
def test_auto_is_the_best_that_fits(here: KernelConditions, best: str) -> None:
    assert choose("auto", here) == best


@pytest.mark.parametrize(
    ("impl", "here", "sentence"),
    [
        ("flash_attn", place("cpu", installed=frozenset()), "the package flash_attn is not installed"),
        (
            "xformers",
            place("cpu"),
            "the device is cpu; here these work: sdpa, sdpa_flash, eager",
        ),
        ("flex", place(capability=(7, 0)), "needs compute capability 7.5, and this GPU has 7.0"),
        ("sdpa_flash", place(dtype=torch.float32), "computes in bf16 or fp16 only, and the model in torch.float32"),
        ("sdpa_cudnn", place(doc_mask=True), r"takes no document mask \(data.doc_mask\); here these work: sdpa, flex"),
        ("sdpa_flash", place(window=True), r"takes no sliding window \(model.sliding_window\)"),
        (
            "varlen",
            place(window=True),
            rf"that of torch {re.escape(torch.__version__)} takes no sliding window \(model.sliding_window\)",
        ),
        ("varlen", place("cpu"), "runs on CUDA only, and the device is cpu"),
        ("sdpa_cudnn", place(head_dim=256), "head_dim is 256; it needs a multiple of 8 up to 128"),
        (
            "xformers",
            place(deterministic=True),
            r"differ from run to run \(deterministic: true\); here these work: sdpa",
        ),
    ],
)
def test_what_is_asked_is_refused_with_reason_and_remedy(impl: str, here: KernelConditions, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attn_impl {impl}: .*{sentence}"):
        choose(impl, here)


def test_the_machine_is_looked_at_for_the_model() -> None:
    args = LlamaArgs(n_heads=8, sliding_window=4, attn_impl="sdpa_flash")
    with pytest.raises(ConfigError, match="sliding window"):
        resolve_attn_impl(args, "cpu", torch.float32, doc_mask=False)
    assert resolve_attn_impl(args.model_copy(update={"attn_impl": "auto"}), "cpu", torch.float32, True) == "sdpa"


# -- parity of all that run here -----------------------------------------------------------------------------------

ROWS, SEQ_LEN, HEADS, WIDTH = 2, 48, 4, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 1e-5 if DEVICE == "cpu" else 0.03
DOC_IDS = np.array([[0] * 20 + [1] * 1 + [2] * 27, [0] * 48])


def inputs(kv_heads: int, n_rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, upstream = (
        torch.randn(n_rows, SEQ_LEN, heads, WIDTH, generator=generator).to(DEVICE, DTYPE)
        for heads in (HEADS, kv_heads, kv_heads, HEADS)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: np.ndarray | None, window: int | None, causal: bool = True
) -> Tensor:
    """One query at a time, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    q, k, v = q.double(), k.double(), v.double()
    for row, s, head in itertools.product(range(ROWS), range(SEQ_LEN), range(HEADS)):
        seen = [t for t in range(s + 1 if causal else SEQ_LEN) if window is None or s - t < window]
        if doc_ids is not None:
            seen = [t for t in seen if doc_ids[row, t] == doc_ids[row, s]]
        group = head // (HEADS // k.shape[2])
        weights = torch.softmax(k[row, seen, group] @ q[row, s, head] / WIDTH**0.5, 0)
        out[row, s, head] = weights @ v[row, seen, group]
    return out


@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_all_kernels_that_run_here_agree(kv_heads: int, documents: bool, window: int | None) -> None:
    """On a GPU with varlen, and whatever of flash_attn and xformers is installed."""
    q, k, v, upstream = inputs(kv_heads)
    expected = by_hand(q, k, v, DOC_IDS if documents else None, window)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    here = KernelConditions(DEVICE, capability, DTYPE, WIDTH, documents, window is not None, attention.installed())
    for impl in NAMES:
        if refusal(impl, here) is not None:
            continue
        mask = build_mask(
            impl, (ROWS, SEQ_LEN), window, row_documents(DOC_IDS, DEVICE) if documents else None, q.device
        )
        out = attend(impl, q, k, v, mask, window)
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE, msg=impl)
        grads = torch.autograd.grad((out.float() * upstream).sum(), (q, k, v))
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=TOLERANCE, atol=TOLERANCE, msg=impl)


@pytest.mark.parametrize("documents", [False, True])
def test_kernels_that_look_both_ways_agree(documents: bool) -> None:
    q, k, v, _ = inputs(2)
    expected = by_hand(q, k, v, DOC_IDS if documents else None, None, causal=False)
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    here = KernelConditions(DEVICE, capability, DTYPE, WIDTH, documents, False, attention.installed())
    for impl in (name for name in NAMES if refusal(name, here) is None):
        own = row_documents(DOC_IDS, DEVICE) if documents else None
        mask = build_mask(impl, (ROWS, SEQ_LEN), None, own, q.device, causal=False)
        out = attend(impl, q, k, v, mask, None, causal=False)
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE, msg=impl)


def test_flex_is_told_to_look_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its eager form, which runs everywhere."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    q, k, v, _ = (each.detach() for each in inputs(2))
    for own, doc_ids in ((None, None), (row_documents(DOC_IDS, DEVICE), DOC_IDS)):
        mask = build_mask("flex", (ROWS, SEQ_LEN), None, own, q.device, causal=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on speed
            out = attend("flex", q, k, v, mask, None, causal=False)
        expected = by_hand(q, k, v, doc_ids, None, causal=False)
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_flex_builds_the_mask_of_plain_rows_once_and_that_of_documents_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[int] = []
    build = attention._block_mask

    def count(seq_len: int, *args: Any, **more: Any) -> Any:
        built.append(seq_len)
        return build(seq_len, *args, **more)

    monkeypatch.setattr(attention, "_block_mask", count)
    attention._lasting_block_mask.cache_clear()
    device = torch.device(DEVICE)
    own = row_documents(DOC_IDS, DEVICE)
    with torch.inference_mode():
        masks = [build_mask("flex", (rows, SEQ_LEN), None, None, device) for rows in (1, ROWS)]
    assert masks[0] is masks[1]
    assert built == [SEQ_LEN]
    assert not masks[0].kv_num_blocks.is_inference()  # a later step trains with it
    for _ in range(2):
        build_mask("flex", (ROWS, SEQ_LEN), 3, None, device)
        build_mask("flex", (1, 2 * SEQ_LEN), None, None, device)
        build_mask("flex", (ROWS, SEQ_LEN), None, own, device)
    assert built == [SEQ_LEN, SEQ_LEN, 2 * SEQ_LEN, SEQ_LEN, SEQ_LEN]


def test_an_order_of_kernels_is_one_graph_and_ends_with_its_call() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind()
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    traced = torch.compile(attend, backend="eager", fullgraph=True)
    out = traced("sdpa_cudnn_first", q, k, v, None, None)
    torch.testing.assert_close(out, attend("eager", q, k, v, None, None))
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


# -- documents, packed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doc_ids", "bounds"),
    [
        ([[0, 0, 0, 0]], [0, 4]),
        ([[0, 0, 1, 1], [0, 1, 2, 2]], [0, 2, 4, 5, 6, 8]),
        ([[3, 3], [3, 3]], [0, 2, 4]),  # what goes on in the next row begins anew
        ([[0], [0], [1]], [0, 1, 2, 3]),
    ],
)
def test_bounds_of_documents(doc_ids: list[list[int]], bounds: list[int]) -> None:
    found = document_bounds(np.array(doc_ids, dtype=np.int32))
    assert (found.dtype, found.tolist()) == (np.int32, bounds)


def test_the_documents_of_a_row_are_those_of_the_row_alone() -> None:
    generator = np.random.default_rng(0)
    doc_ids = np.sort(generator.integers(0, 5, (4, 9)), axis=1)
    doc_ids[2] = 0
    documents = row_documents(doc_ids)
    for number in range(4):
        row = documents.row(number)
        assert torch.equal(row.ids, documents.ids[number : number + 1])
        assert row.bounds.dtype == torch.int32
        assert row.bounds.tolist() == document_bounds(doc_ids[number : number + 1]).tolist()


@pytest.fixture(params=["varlen", "flash_attn", pytest.param("xformers", marks=pytest.mark.soak)])  # 3 s to import
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel for packed documents, its operator exchanged for an exact one."""
    if DEVICE == "cuda":
        pytest.skip("the real ones are tested above")
    if request.param == "varlen":
        packed_kernels.give_varlen_a_cpu()
    elif request.param == "xformers":
        packed_kernels.give_xformers_a_cpu(monkeypatch)
    else:
        packed_kernels.install_flash_attn(monkeypatch)
    return request.param


def assert_like_eager(
    impl: str, doc_ids: np.ndarray | None, kv_heads: int, window: int | None, n_rows: int, causal: bool = True
) -> None:
    q, k, v, upstream = inputs(kv_heads, n_rows)
    documents = None if doc_ids is None else row_documents(doc_ids, DEVICE)
    found = []
    for name in ("eager", impl):
        mask = build_mask(name, (n_rows, SEQ_LEN), window, documents, q.device, causal)
        out = attend(name, q, k, v, mask, window, causal)
        found.append([out, *torch.autograd.grad((out * upstream).sum(), (q, k, v))])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_packed_documents_are_those_of_the_mask_both_ways(packed: str) -> None:
    assert_like_eager(packed, DOC_IDS, 2, None, ROWS, causal=False)


@pytest.mark.parametrize("window", [None, 1, 7, SEQ_LEN])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_documents_are_those_of_the_mask(packed: str, kv_heads: int, window: int | None) -> None:
    if packed == "varlen" and window is not None and window < SEQ_LEN and not KernelConditions.varlen_windows:
        pytest.skip("refused with this torch")
    generator = np.random.default_rng(kv_heads)
    for n_rows, n_documents in ((1, 1), (2, 4), (3, SEQ_LEN)):  # the last: mostly of one position
        doc_ids = np.sort(generator.integers(0, n_documents, (n_rows, SEQ_LEN)), axis=1).astype(np.int32)
        assert_like_eager(packed, doc_ids, kv_heads, window, n_rows)


def test_varlen_takes_rows_for_documents_where_there_are_none() -> None:
    packed_kernels.give_varlen_a_cpu()
    assert_like_eager("varlen", None, 2, None, 3)


def later_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """With the arguments of torch 2.12 (docs.pytorch.org, torch.nn.attention.varlen)."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    return packed_kernels.Exact.apply(query, key, value, cu_seq_q, window_size[0])


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 7])
def test_later_torch_is_told_of_windows_and_shared_heads(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", later_varlen_attn)
    monkeypatch.setattr(attention, "_VARLEN_TAKES", frozenset(inspect.signature(later_varlen_attn).parameters))
    assert_like_eager("varlen", DOC_IDS, kv_heads, window, ROWS)


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_told_to_repeat_itself(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    packed_kernels.install_flash_attn(monkeypatch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert_like_eager("flash_attn", DOC_IDS, 4, 7, ROWS)
    assert packed_kernels.CALLS[-1] == {"deterministic": deterministic, "window_size": (6, 0)}


def test_what_stands_in_for_flash_attn_takes_what_it_takes() -> None:
    real = pytest.importorskip("flash_attn").flash_attn_varlen_func
    ours = inspect.signature(packed_kernels.flash_attn_varlen_func).parameters
    assert list(ours) == list(inspect.signature(real).parameters)


class Counting:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


def test_documents_in_any_number_are_one_graph(packed: str) -> None:
    """The real functions traced: what they look at on the host is the same for all batches."""
    if packed == "flash_attn":
        pytest.skip("not the real function")
    torch._dynamo.reset()
    backend = Counting()
    traced = torch.compile(attend, backend=backend, fullgraph=True)
    q, k, v, _ = inputs(2)
    for n_documents in (2, 5, 9, 3, 30):
        doc_ids = np.minimum(np.arange(SEQ_LEN), n_documents)[None].repeat(ROWS, axis=0)
        documents = row_documents(doc_ids, DEVICE)
        let_length_vary(documents.bounds)
        mask = build_mask(packed, (ROWS, SEQ_LEN), None, documents, q.device)
        expected = attend("eager", q, k, v, build_mask("eager", (ROWS, SEQ_LEN), None, documents, q.device), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while it traces
            out = traced(packed, q, k, v, mask, None)
        torch.testing.assert_close(out, expected)
    assert backend.graphs == 1
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("impl", ["flex", *PACKED])
def test_compiled_kernels_agree_on_documents_and_wait_for_nothing(impl: str, window: int | None) -> None:
    """In bf16, in one graph, with shared heads, at a size of which the kernels have several blocks."""
    n_rows, seq_len, width = 3, 512, 64
    here = KernelConditions(
        "cuda", torch.cuda.get_device_capability(), DTYPE, width, True, window is not None, attention.installed()
    )
    reason = refusal(impl, here)
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    backend = Counting()
    traced = torch.compile(attend, backend=backend, fullgraph=True)
    numbers = np.random.default_rng(0)
    q, k, v, upstream = (
        torch.randn(n_rows, seq_len, heads, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
        for heads in (8, 2, 2, 8)
    )
    for n_documents in (3, 40, 1, 7):
        doc_ids = np.sort(numbers.integers(0, n_documents, (n_rows, seq_len)), axis=1)
        documents, found = row_documents(doc_ids, DEVICE), []
        let_length_vary(documents.bounds)
        for name, attention_of in (("eager", attend), (impl, attend if impl == "flex" else traced)):
            mask = build_mask(name, (n_rows, seq_len), window, documents, q.device)
            torch.cuda.set_sync_debug_mode("error" if backend.graphs else "default")  # tracing may look at the device
            out = attention_of(name, q, k, v, mask, window)
            grads = torch.autograd.grad(out, (q, k, v), upstream)
            torch.cuda.set_sync_debug_mode("default")
            found.append([out, *grads])
        for theirs, ours in zip(*found, strict=True):
            assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    assert backend.graphs == (0 if impl == "flex" else 1)
