"""The cases of bench_step.py: models, their sizes, and their rivals."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lingua.config.command_line import parse_command_line
from lingua.train.check import Checked, load

CONFIGS = Path(__file__).parents[1] / "apps" / "main" / "configs"


@dataclass(frozen=True)
class Case:
    """A model in one mode; `batches` are tried, largest first, until one fits."""

    name: str
    model: str
    """File of configs/model, or keys of a small model."""
    words: tuple[str, ...] = ()
    seq_len: int = 2048
    batches: tuple[int, ...] = (8, 4, 2, 1)
    transformers: bool = False
    allocator: str = ""
    """Value for PYTORCH_ALLOC_CONF."""
    rivals: tuple[Case, ...] = ()
    """Cases that alternate with it on a CPU; `over_<first word of the name>` is the ratio of tokens/s."""


FULL = "distributed.full_activation_checkpointing=true"
DOCUMENTS = "data.doc_mask=true"
ALL_1B = (24, 16, 8)
# Parameters, gradients and optimizer state take 120 of 141 GB at 7B: there the allocator's gaps count.
# CUDA semantics, "Optimizing memory usage with PYTORCH_ALLOC_CONF": expandable_segments.
NO_GAPS = "expandable_segments:True"
HALF_MOMENTS = "optim.state_dtype=bf16"
MAIN = Case("1B bf16 2048", "llama_1B", batches=ALL_1B)
GPU_CASES = (  # the most important first
    MAIN,
    Case("280M bf16 2048", "llama_280M", batches=(32, 16, 8)),
    Case("transformers 1B bf16 2048", "llama_1B", batches=(16, 8, 4), transformers=True),
    Case("7B bf16 moments 4096", "llama_7B", (HALF_MOMENTS,), seq_len=4096, batches=(2, 1), allocator=NO_GAPS),
    Case("7B bf16 4096", "llama_7B", (FULL,), seq_len=4096, batches=(4, 2, 1), allocator=NO_GAPS),
    Case(
        "7B bf16 moments budget 0.5 4096",
        "llama_7B",
        (HALF_MOMENTS, "distributed.activation_memory_budget=0.5"),
        seq_len=4096,
        batches=(4, 2, 1),
        allocator=NO_GAPS,
    ),
    Case("7B bf16 2048", "llama_7B", (FULL,), allocator=NO_GAPS),
    Case("1B float8 rowwise 2048", "llama_1B", ("distributed.float8_recipe=rowwise",), batches=ALL_1B),
    Case("1B documents flex 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=flex"), batches=ALL_1B),
    Case("1B documents varlen 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=varlen"), batches=ALL_1B),
    Case("1B deterministic 2048", "llama_1B", ("deterministic=true",), batches=ALL_1B),
    Case("1B bf16 4096", "llama_1B", seq_len=4096, batches=(12, 8, 4)),
    Case("1B float8 tensorwise 2048", "llama_1B", ("distributed.float8_recipe=tensorwise",), batches=ALL_1B),
    Case("7B float8 rowwise 2048", "llama_7B", (FULL, "distributed.float8_recipe=rowwise"), allocator=NO_GAPS),
    Case("280M bf16 4096", "llama_280M", seq_len=4096, batches=(16, 8, 4)),
    Case("transformers 280M bf16 2048", "llama_280M", batches=(32, 16, 8), transformers=True),
    Case("1B documents xformers 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=xformers"), batches=ALL_1B),
    Case("1B documents flash_attn 2048", "llama_1B", (DOCUMENTS, "model.attn_impl=flash_attn"), batches=ALL_1B),
)
EAGER = ("distributed.compile=false", "distributed.model_dtype=fp32")


def beside_theirs(case: Case) -> Case:
    """Return the case with transformers' model as a rival."""
    theirs = replace(case, name=f"transformers {case.name}", transformers=True)
    return replace(case, rivals=(theirs, *case.rivals))


CPU_CASES = tuple(
    map(
        beside_theirs,
        (
            Case("debug", "dim=256 n_layers=6 n_heads=4 vocab_size=258", EAGER, seq_len=256, batches=(4,)),
            Case("30M", "dim=512 n_layers=8 n_heads=8 vocab_size=8192", EAGER, seq_len=256, batches=(2,)),
        ),
    )
)
DIMS = {"1M": 128, "5M": 256}
MAMBA = "type=mamba2 conv_size=4 conv_bias=true dt_bias=true ssm_chunk_size=64"  # as in transformers
_IN_HYBRID = '{"mamba2":{"conv_size":4,"dt_bias":true,"ssm_chunk_size":64,"n_heads":8,"state_dim":%d}}'
HYBRID = f"type=hybrid layers=[attention,mamba2,mamba2] n_heads=4 n_layers=%d blocks={_IN_HYBRID}"
FAMILIES: dict[str, tuple[str, str]] = {  # keys at about 1M parameters, and at about 5M
    "llama": ("n_layers=4 n_heads=4", "n_layers=6 n_heads=4"),
    "mamba2": (f"{MAMBA} n_layers=9 n_heads=8 state_dim=32", f"{MAMBA} n_layers=12 n_heads=8 state_dim=64"),
    "mingru": ("type=mingru conv_size=4 n_layers=8", "type=mingru conv_size=4 n_layers=10"),
    "minlstm": ("type=minlstm conv_size=4 n_layers=6", "type=minlstm conv_size=4 n_layers=8"),
    "hawk": ("type=hawk conv_size=4 n_layers=3 multiple_of=64", "type=hawk conv_size=4 n_layers=4 multiple_of=64"),
    "mlstm": ("type=mlstm n_layers=5", "type=mlstm n_layers=6"),
    "mtp": ("type=mtp n_layers=4 n_heads=4 n_future_head=3", "type=mtp n_layers=6 n_heads=4 n_future_head=3"),
    "hybrid": (HYBRID % (6, 32), HYBRID % (9, 64)),
}


def family_cases(tiny: bool = False) -> list[Case]:
    """Return every family at both sizes; `tiny`: in a size that takes seconds on a CPU."""
    found: list[Case] = []
    for at, (size, dim) in enumerate(DIMS.items()):
        llama: tuple[Case, ...] = ()
        for name, keys in FAMILIES.items():
            words = EAGER + (("data.n_views=4",) if name == "mtp" else ())
            model = re.sub("n_layers=[0-9]+", "n_layers=2", keys[at]) if tiny else keys[at]
            model += f" dim={32 if tiny else dim} vocab_size=258"
            case = Case(f"{name} {size}", model, words, 64 if tiny else 256, (2,) if tiny else (4,), rivals=llama)
            llama = llama or (case,)
            found.append(beside_theirs(case) if name in ("llama", "mamba2", "mlstm") else case)
    return found


def in_small(case: Case) -> Case:
    """Return the case in a size that takes seconds on a CPU, to check that it runs."""
    words = tuple(word.replace("flex", "sdpa") for word in case.words)
    tiny = "dim=64 n_layers=2 n_heads=2 vocab_size=260"
    return replace(case, model=tiny, words=(*EAGER, *words), seq_len=32, batches=(2,))


_IN_SMALL = (
    *("1B bf16 2048", "transformers 1B", "7B bf16 2048", "7B bf16 moments 4096"),
    *("1B float8 rowwise", "1B documents flex", "1B deterministic"),
)
TINY_CASES = tuple(in_small(case) for case in GPU_CASES if case.name.startswith(_IN_SMALL))


def command_of(case: Case, batch: int, dump_dir: Path, *more: str) -> list[str]:
    """Return the command line of a run of this case, with training only."""
    is_file = "=" not in case.model
    model = ["model.vocab_size=128256", f"model={case.model}"] if is_file else []  # Llama 3's, as in the recipes
    return [
        str(CONFIGS / "base" / "recipe.yaml"),
        *(model or [f"model.{key}" for key in case.model.split()]),
        *("data.tokenizer={name: bytes, path: null}", "async_eval_gpus=null", "slurm=null", "logging.wandb=null"),
        *(f"data.seq_len={case.seq_len}", f"data.batch_size={batch}", "grad_acc_steps=1", f"dump_dir={dump_dir}"),
        *case.words,
        *(more or ("steps=1000",)),
    ]


def checked(case: Case, batch: int) -> Checked:
    return load(parse_command_line(command_of(case, batch, Path("none"))), world_size=1)
