"""Weights from elsewhere: every kind of source gives equal weights, everything odd is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lingua.checkpoint import layout
from lingua.checkpoint.load_weights import load_weights
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.files import RunError
from lingua.model.huggingface import Llama, pair_halves, pair_neighbours
from tests.ranks import run_on_ranks

VOCAB, DIM, HEADS, KV_HEADS, HEAD_WIDTH, FFN = 11, 8, 4, 2, 2 * 2, 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * HEAD_WIDTH, bias=False)
        self.wk = nn.Linear(DIM, KV_HEADS * HEAD_WIDTH, bias=False)
        self.wv = nn.Linear(DIM, KV_HEADS * HEAD_WIDTH, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_WIDTH, DIM, bias=False)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, FFN, bias=False)
        self.w3 = nn.Linear(DIM, FFN, bias=False)
        self.w2 = nn.Linear(FFN, DIM, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.feed_forward = FeedForward()
        self.attention_norm = nn.RMSNorm(DIM)
        self.ffn_norm = nn.RMSNorm(DIM)


class Names(nn.Module):
    """A module with the parameter names of the Llama model, and no arithmetic."""

    def __init__(self, seed: int, tied: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def run_of(run_dir: Path, *models: Names) -> Path:
    """A run with a checkpoint of each model, at steps 1, 2, ..."""
    manager = CheckpointManager(CheckpointArgs(), run_dir)
    for step, model in enumerate(models, start=1):
        manager.save(step, TrainState(model, torch.optim.AdamW(model.parameters())))
    return run_dir


def hugging_face(folder: Path, source: Names, *, tied: bool = False, in_pieces: bool = False) -> Path:
    """`source` as transformers would write it."""
    folder.mkdir(parents=True)
    names = {
        "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights(source).items():
        prefix, module = ("model." + name[:9], name[9:]) if name.startswith("layers.") else ("", name)
        module = module.removesuffix(".weight")
        turned = pair_halves(tensor, HEAD_WIDTH) if module in ("attention.wq", "attention.wk") else tensor
        tensors[f"{prefix}{names[module]}.weight"] = turned.contiguous()
    if tied:
        del tensors["lm_head.weight"]
    config = {"hidden_size": DIM, "num_attention_heads": HEADS, "head_dim": HEAD_WIDTH, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    if not in_pieces:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


# -- every kind of source ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_source_gives_the_same_weights(tmp_path: Path) -> None:
    source = Names(1)
    expected = weights(source)
    run = run_of(tmp_path / "run", source, Names(2))
    lingua = tmp_path / "lingua"
    save({"model": expected, "optim": {"param_groups": [1]}}, storage_writer=FileSystemWriter(lingua), no_dist=True)
    consolidated = tmp_path / "step" / "consolidated"
    consolidated.mkdir(parents=True)
    torch.save({"model": expected, "step": 3}, consolidated / "consolidated.pth")
    torch.save(expected, tmp_path / "bare.pt")
    torch.save({"ema": {"net": expected}}, tmp_path / "nested.pt")
    torch.save(expected | {"rope.freqs": torch.rand(3)}, tmp_path / "meta.pth")
    torch.save({f"_orig_mod.{name}": t for name, t in expected.items()}, tmp_path / "compiled.pt")
    torch.save(expected, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    sources = {
        f"{run}@1": None,
        str(layout.folder(run / layout.CHECKPOINTS, 1)): None,
        str(lingua): None,
        str(tmp_path / "step"): None,
        str(consolidated): None,
        str(tmp_path / "bare.pt"): None,
        str(tmp_path / "nested.pt"): "ema.net",
        str(tmp_path / "meta.pth"): "",
        str(tmp_path / "compiled.pt"): None,
        str(tmp_path / "old.pt"): None,
        str(hugging_face(tmp_path / "hf", source)): None,
        str(tmp_path / "hf" / "model.safetensors"): None,
        str(hugging_face(tmp_path / "pieces", source, in_pieces=True)): None,
    }
    (tmp_path / "hf" / "._model.safetensors").write_bytes(b"of another system")
    for path, model_key in sources.items():
        model = Names(0)
        told = load_weights(model, path, model_key)
        assert_equal(model, expected)
        assert "21 tensors" in told
        assert path.partition("@")[0] in told


def test_a_run_gives_its_newest_intact_checkpoint_untouched(tmp_path: Path) -> None:
    run = run_of(tmp_path, Names(1), Names(2), Names(3))
    root = run / layout.CHECKPOINTS
    (layout.folder(root, 3) / layout.model_file(0)).write_bytes(b"damaged")
    (layout.folder(root, 2) / layout.optim_file(0)).write_bytes(b"not needed")
    before = sorted(root.iterdir())
    model = Names(0)
    assert "0000000002" in load_weights(model, run)
    assert_equal(model, weights(Names(2)))
    assert sorted(root.iterdir()) == before
    with pytest.raises(RunError, match=r"model\.00000\.distcp has 7 bytes instead of \d+; take another"):
        load_weights(model, f"{run}@3")
    with pytest.raises(RunError, match="no published checkpoint of step 7; it has 1, 2, 3"):
        load_weights(model, f"{run}@7")


def test_a_verification_that_is_limited_to_sizes(tmp_path: Path) -> None:
    file = layout.folder(run_of(tmp_path, Names(1)) / layout.CHECKPOINTS, 1) / layout.model_file(0)
    content = bytearray(file.read_bytes())
    content[content.index(Names(1).norm.weight.detach().numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="does not have the content it was written with"):
        load_weights(Names(0), f"{tmp_path}@1")
    model = Names(0)
    load_weights(model, f"{tmp_path}@1", sizes_only=True)
    loaded, expected = weights(model), weights(Names(1))
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == ["norm.weight"]


@pytest.mark.ranks
def test_shards_take_their_part(tmp_path: Path) -> None:
    expected = weights(Names(1))
    folders = [run_of(tmp_path / "run", Names(1)), hugging_face(tmp_path / "hf", Names(1))]

    def load(rank: int) -> None:
        for folder in folders:
            model = Names(0)
            for block in model.layers.values():
                fully_shard(block)
            fully_shard(model)
            load_weights(model, folder)
            assert_equal(model, expected)

    run_on_ranks(load, 3)


# -- tying -----------------------------------------------------------------------------------------------------------


def test_tied_and_untied(tmp_path: Path) -> None:
    tied, untied = Names(1, tied=True), Names(2)
    tied_hf, untied_hf = hugging_face(tmp_path / "tied", tied, tied=True), hugging_face(tmp_path / "untied", untied)
    for model in (Names(0, tied=True), Names(0)):
        load_weights(model, tied_hf)
        assert_equal(model, weights(tied))
    with pytest.raises(RunError, match=r"differ, but are tied here; set model\.weight_tying: false"):
        load_weights(Names(0, tied=True), untied_hf)

    headless = weights(tied)
    del headless["output.weight"]
    torch.save(headless, tmp_path / "headless.pt")
    with pytest.raises(
        RunError, match=r"output\.weight is missing there \(it has tied weights: set model\.weight_tying: true\)"
    ):
        load_weights(Names(0), tmp_path / "headless.pt")
    model = Names(0, tied=True)
    load_weights(model, tmp_path / "headless.pt")
    assert_equal(model, weights(tied))

    without_head = Names(0)
    del without_head.output
    load_weights(without_head, tied_hf)
    load_weights(without_head, run_of(tmp_path / "run", tied))
    with pytest.raises(RunError, match="differ, but are tied here"):
        load_weights(without_head, untied_hf)


# -- rotary order ----------------------------------------------------------------------------------------------------


def test_rows_of_a_head() -> None:
    rows = torch.arange(16)
    assert pair_neighbours(rows, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (3,)]))
def test_pairing_and_back(heads: int, pairs: int, rest: tuple[int, ...]) -> None:
    tensor = torch.rand(heads * 2 * pairs, *rest)
    assert torch.equal(pair_halves(pair_neighbours(tensor, 2 * pairs), 2 * pairs), tensor)


def test_names() -> None:
    assert Llama().our_name("model.layers.11.self_attn.q_proj.weight") == "layers.11.attention.wq.weight"
    assert Llama().our_name("model.layers.0.post_attention_layernorm.weight") == "layers.0.ffn_norm.weight"
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert Llama().our_name(bias) == bias
    assert Llama().our_name("lm_head.weight") == "output.weight"
    assert Llama().our_name("something.else") == "something.else"


# -- what is refused -------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_told_at_once_and_nothing_is_touched(tmp_path: Path) -> None:
    wrong = weights(Names(1))
    wrong["norm.weight"] = torch.rand(3)
    wrong["layers.2.extra"] = torch.rand(3)
    del wrong["tok_embeddings.weight"]
    torch.save(wrong, tmp_path / "wrong.pt")
    model = Names(0)
    with pytest.raises(RunError) as caught:
        load_weights(model, tmp_path / "wrong.pt")
    for problem in (
        "tok_embeddings.weight is missing",
        "norm.weight is (3,) there and (8,) here",
        "layers.2.extra is not",
    ):
        assert problem in str(caught.value)
    assert_equal(model, weights(Names(0)))


class Touch:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


def test_a_hostile_torch_file_is_refused_unexecuted(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    for new_format in (True, False):
        torch.save({"model": Touch(witness)}, tmp_path / "bad.pt", _use_new_zipfile_serialization=new_format)
        with pytest.raises(RunError, match=r"bad\.pt is refused: it is not a plain file of tensors"):
            load_weights(Names(0), tmp_path / "bad.pt")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "does not exist; `lingua runs FOLDER` lists the runs"),
        (lambda p: p.mkdir(), r"holds no weights: expected \.metadata"),
        (lambda p: p.write_bytes(b"nonsense"), r"it is not a plain file of tensors \(Weights only load failed\)$"),
        (lambda p: torch.save([1, 2], p), "holds more than named tensors"),
        (lambda p: (p / "checkpoints").mkdir(parents=True), "has no published checkpoint"),
        (lambda p: (p.mkdir(), (p / "model.safetensors").write_bytes(b"x" * 20)), "cannot be read"),
    ],
)
def test_what_is_no_source(tmp_path: Path, make: object, sentence: str) -> None:
    assert callable(make)
    make(tmp_path / "source")
    with pytest.raises(RunError, match=sentence):
        load_weights(Names(0), tmp_path / "source")


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(RunError, match=r"has no key 'ema'; set checkpoint\.init_ckpt_model_key"):
        load_weights(Names(0), tmp_path / "a.pt", "ema")


def test_hugging_face_needs_its_config(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", Names(1))
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match=r"config\.json is missing; Hugging Face weights need it"):
        load_weights(Names(0), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_llama_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import

    from apps.main.args import LMTransformerArgs
    from apps.main.transformer import LMTransformer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=65,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    own_args = LMTransformerArgs(
        vocab_size=65, dim=32, hidden_dim=48, n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-6, weight_tying=tied
    )
    ours = LMTransformer(own_args)
    ours.init_weights(1)
    load_weights(ours, tmp_path)
    tokens = torch.randint(65, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
