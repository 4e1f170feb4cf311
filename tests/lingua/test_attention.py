import itertools

import pytest
import torch
from torch import Tensor

from lingua.args import ConfigError
from lingua.attention import Place, attend, build_mask, choose, refusal, resolve_attn_impl
from lingua.schema import LlamaArgs

NAMES = ["sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "xformers", "flash_attn", "eager"]
BOTH = frozenset({"xformers", "flash_attn"})


def place(device_type: str = "cuda", **keys: object) -> Place:
    facts: dict[str, object] = {
        "capability": (9, 0) if device_type == "cuda" else (0, 0),
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "doc_mask": False,
        "window": False,
        "installed": BOTH,
    }
    return Place(device_type=device_type, **(facts | keys))  # pyright: ignore[reportArgumentType]


# -- the decision, by tables ---------------------------------------------------------------------------------------

WORKING = [
    (place(), NAMES),
    (place(window=True), ["sdpa", "flex", "xformers", "flash_attn", "eager"]),
    (place(doc_mask=True), ["sdpa", "flex", "eager"]),
    (place(doc_mask=True, window=True), ["sdpa", "flex", "eager"]),
    (place(dtype=torch.float32), ["sdpa", "flex", "eager"]),
    (place(capability=(7, 0)), ["sdpa", "eager"]),
    (place(capability=(8, 0)), [name for name in NAMES if name != "sdpa_cudnn_first"]),
    (place(head_dim=192), ["sdpa", "sdpa_cudnn_first", "sdpa_flash", "flex", "xformers", "flash_attn", "eager"]),
    (place(head_dim=20), ["sdpa", "sdpa_cudnn_first", "flex", "eager"]),
    (place(installed=frozenset()), ["sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "eager"]),
    (place(deterministic=True), ["sdpa", "sdpa_flash", "flex", "flash_attn", "eager"]),
    (place("cpu"), ["sdpa", "sdpa_flash", "eager"]),
    (place("cpu", doc_mask=True), ["sdpa", "eager"]),
]


@pytest.mark.parametrize(("here", "working"), WORKING)
def test_what_works_where(here: Place, working: list[str]) -> None:
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
def test_auto_is_the_best_that_fits(here: Place, best: str) -> None:
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
        ("sdpa_cudnn", place(head_dim=256), "head_dim is 256; it needs a multiple of 8 up to 128"),
        (
            "xformers",
            place(deterministic=True),
            r"differ from run to run \(deterministic: true\); here these work: sdpa",
        ),
    ],
)
def test_what_is_asked_is_refused_with_reason_and_remedy(impl: str, here: Place, sentence: str) -> None:
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
DOC_IDS = torch.tensor([[0] * 20 + [1] * 1 + [2] * 27, [0] * 48])


def by_hand(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, window: int | None) -> Tensor:
    """One query at a time, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    q, k, v = q.double(), k.double(), v.double()
    for row, s, head in itertools.product(range(ROWS), range(SEQ_LEN), range(HEADS)):
        seen = [t for t in range(s + 1) if window is None or s - t < window]
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
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(ROWS, SEQ_LEN, heads, WIDTH, generator=generator).to(DEVICE, DTYPE).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    )
    upstream = torch.randn(q.shape, generator=generator).to(DEVICE)
    doc_ids = DOC_IDS.to(DEVICE) if documents else None
    expected = by_hand(q, k, v, doc_ids, window)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    here = Place(DEVICE, capability, DTYPE, WIDTH, documents, window is not None, frozenset())
    tolerance = 1e-5 if DEVICE == "cpu" else 0.03
    for impl in NAMES:
        if refusal(impl, here) is not None:
            continue
        mask = build_mask(impl, SEQ_LEN, window, doc_ids, q.device)
        out = attend(impl, q, k, v, mask, window)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, msg=impl)
        grads = torch.autograd.grad((out.float() * upstream).sum(), (q, k, v))
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance, msg=impl)


def test_an_order_of_kernels_is_one_graph_and_ends_with_its_call() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind()
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    traced = torch.compile(attend, backend="eager", fullgraph=True)
    out = traced("sdpa_cudnn_first", q, k, v, None, None)
    torch.testing.assert_close(out, attend("eager", q, k, v, None, None))
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before
