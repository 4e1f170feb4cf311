"""`lingua export` and `lingua import`: the same function in other hands, and back bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save

from apps.cli.export import Dtype, Format, make_export, make_import
from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.checkpoint import layout
from lingua.checkpoint.load_weights import load_weights, open_source
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.base import ConfigError
from lingua.config.frozen import dump_yaml
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.config.keys.model import RopeScalingArgs
from lingua.files import DISK, Files, RunError
from lingua.train.describe import described
from lingua.train.load_model import stored_dtype
from tests.cli import Lingua
from tests.fakes import FaultyFiles, KillFiles
from tests.ranks import exit_code_of

TINY: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "max_seqlen": 64}
SCALING = RopeScalingArgs(factor=4.0, original_max_position_embeddings=16).model_dump()
MODELS: dict[str, dict[str, Any]] = {
    "untied, grouped queries": {},
    "tied": {"weight_tying": True, "n_kv_heads": None},
    "heads wider than the model": {"head_dim": 16, "hidden_dim": 40, "norm_eps": 1e-3},
    "scaled positions": {"rope_scaling": SCALING, "rope_theta": 500.0},
    "normed queries and keys": {"qk_norm": True, "weight_tying": True},
    "window": {"sliding_window": 5},
    "window, normed queries and keys": {"sliding_window": 5, "qk_norm": True},
}


def make_run(
    run_dir: Path, vocab_size: int = 258, tokenizer: dict[str, Any] | None = None, **model: Any
) -> LMTransformer:
    """A run with one checkpoint, at step 1, of a model whose every parameter is random."""
    args = LMTransformerArgs.model_validate({**TINY, **model, "vocab_size": vocab_size})
    ours = LMTransformer(args)
    ours.init_weights(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter += torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    run_dir.mkdir(parents=True)
    tree = {"name": "r", "dump_dir": str(run_dir), "model": args.model_dump(mode="json", exclude_unset=True)}
    tree["data"] = {"seq_len": 64, "tokenizer": tokenizer or {"name": "bytes"}}
    (run_dir / "config.yaml").write_text(dump_yaml(tree))
    manager = CheckpointManager(CheckpointArgs(), run_dir)
    manager.save(1, TrainState(ours, torch.optim.AdamW(ours.parameters())))
    manager.close()
    return ours


def theirs(folder: Path, **more: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM  # slow to import

    opened: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    model, loading = opened
    assert not any(loading.values()), loading  # nothing is missing, nothing left over
    return model.eval()


@torch.no_grad()
def assert_same_function(ours: nn.Module, other: nn.Module, vocab_size: int = 258) -> None:
    tokens = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = ours(tokens)[..., :vocab_size]
    torch.testing.assert_close(other(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def weights(path: Path | str) -> dict[str, Tensor]:
    source = open_source(path)
    return {name: source.read(name) for name in source.shapes}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


# -- out, and in again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers_computes_the_same_and_the_way_back_is_bitwise(tmp_path: Path, model: dict[str, Any]) -> None:
    ours = make_run(tmp_path / "run", **model)
    made = make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    assert made.warnings == []
    other = theirs(tmp_path / "hf", dtype="auto")
    assert next(other.parameters()).dtype == torch.float32
    assert_same_function(ours, other)
    make_import(tmp_path / "hf", tmp_path / "back")
    assert_equal(weights(tmp_path / "back"), weights(tmp_path / "run"))
    args = described(tmp_path / "back" / "config.yaml")
    again = LMTransformer(LMTransformerArgs.model_validate(args.model.model_dump()))
    load_weights(again, tmp_path / "back")
    tokens = torch.arange(40)[None]
    assert torch.equal(again(tokens), ours(tokens))


def test_many_files_other_types_and_a_folder_named_by_its_step(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "run")
    made = make_export(f"{tmp_path}/run@1", tmp_path / "hf", Format.hf, dtype=Dtype.bf16, shard_bytes=20_000)
    files = [name for name in made.files if name.startswith("model-")]
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = 2 * 258 * 32  # one embedding in bf16
    head = 4096
    assert all((tmp_path / "hf" / name).stat().st_size < max(20_000, largest) + head for name in files)
    other = theirs(tmp_path / "hf", dtype="auto")
    assert next(other.parameters()).dtype == torch.bfloat16
    ours.bfloat16().float().init_buffers()
    assert_same_function(ours, other.float())
    whole = make_export(f"{tmp_path}/run/checkpoints/0000000001", tmp_path / "whole", Format.hf)
    assert "model.safetensors" in whole.files


@pytest.mark.parametrize("form", [Format.safetensors, Format.torch])
def test_our_own_forms_load_and_describe_themselves(tmp_path: Path, form: Format) -> None:
    make_run(tmp_path / "run", weight_tying=True)
    made = make_export(str(tmp_path / "run"), tmp_path / "out", form)
    name = "consolidated.pth" if form is Format.torch else "model.safetensors"
    assert made.files == sorted(["config.yaml", name])
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "run"))
    assert described(tmp_path / "out" / "config.yaml").model.vocab_size == 258
    # what was exported is exported on, and a Hugging Face folder too
    make_export(str(tmp_path / "out"), tmp_path / "hf", Format.hf)
    make_export(str(tmp_path / "hf"), tmp_path / "again", Format.safetensors)
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "hf"))
    again = described(tmp_path / "again" / "config.yaml")
    assert (again.model.vocab_size, again.data.tokenizer.name) == (258, "hf")


def test_rows_behind_the_vocabulary_stay_or_go(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "run", vocab_size=320)
    make_export(str(tmp_path / "run"), tmp_path / "all", Format.hf)
    assert_same_function(ours, theirs(tmp_path / "all"), 320)
    make_export(str(tmp_path / "run"), tmp_path / "trimmed", Format.hf, trim_vocab=True)
    assert_same_function(ours, theirs(tmp_path / "trimmed"), 258)
    assert json.loads((tmp_path / "trimmed" / "config.json").read_bytes())["vocab_size"] == 258


def test_padded_rows_stay_at_home(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "run", vocab_multiple_of=64)
    assert ours.get_parameter("output.weight").shape[0] == 320
    make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    assert json.loads((tmp_path / "hf" / "config.json").read_bytes())["vocab_size"] == 258
    assert_same_function(ours, theirs(tmp_path / "hf"))


# -- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_an_export_that_dies_anywhere_leaves_nothing_or_all(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out" / "hf"
    make_run(run, n_layers=1, tokenizer={"name": "hf", "path": "/nowhere"})  # its files would be more of the same

    def make(files: Files) -> None:
        make_export(str(run), out, Format.hf, shard_bytes=80_000, files=files)

    counted = FaultyFiles()
    make(counted)
    whole = sorted(path.name for path in out.iterdir())
    assert len(whole) == 5  # config, generation_config, index, 2 files of weights
    DISK.remove_tree(out)
    for n in range(1, counted.n_done + 1):
        assert exit_code_of(lambda n=n: make(KillFiles(n))) == KillFiles.KILLED
        if out.exists():
            assert sorted(path.name for path in out.iterdir()) == whole
            DISK.remove_tree(out)
    make(DISK)  # clears what the dead ones left
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    assert sorted(path.name for path in out.iterdir()) == whole


def test_a_folder_that_is_there_is_refused_and_one_made_meanwhile_is_kept(tmp_path: Path) -> None:
    make_run(tmp_path / "run", n_layers=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="there already exists; choose a new folder"):
        make_export(str(tmp_path / "run"), tmp_path / "there", Format.hf)

    class Racing(Files):
        def rename(self, source: Path, target: Path) -> None:
            if target == tmp_path / "new":
                target.mkdir()
                (target / "theirs").touch()
            super().rename(source, target)

    with pytest.raises(RunError, match=r"another process created .* meanwhile"):
        make_export(str(tmp_path / "run"), tmp_path / "new", Format.safetensors, files=Racing())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]
    living = tmp_path / f".hf.tmp-{socket.gethostname()}-{os.getppid()}"
    living.mkdir()
    make_export(str(tmp_path / "run"), tmp_path / "hf", Format.safetensors)
    assert living.exists()


def test_damage_is_found_on_the_way_and_the_run_is_left_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, n_layers=1)
    before = {path for path in run.rglob("*") if path.parent.name != layout.PINS}
    make_export(str(run), tmp_path / "good", Format.hf)
    assert {path for path in run.rglob("*") if path.name != layout.PINS} == before
    assert list((run / layout.CHECKPOINTS / layout.PINS).iterdir()) == []
    file = layout.folder(run / layout.CHECKPOINTS, 1) / layout.model_file(0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="does not have the content it was written with; take another"):
        make_export(str(run), tmp_path / "bad", Format.hf)
    assert not (tmp_path / "bad").exists()


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", n_layers=1)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(
        config.read_text().replace("n_layers: 1", "n_layers: 2").replace("n_kv_heads: 2", "n_kv_heads: 4")
    )
    with pytest.raises(RunError, match=r"wk\.weight is \(16, 32\) there and \(32, 32\) by its config.*no layers\.1\."):
        make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    with pytest.raises(ConfigError, match="--dtype goes with --format hf, safetensors and gguf"):
        make_export(str(tmp_path / "run"), tmp_path / "hf", Format.torch, dtype=Dtype.bf16)
    with pytest.raises(ConfigError, match="--trim-vocab goes with --format hf"):
        make_export(str(tmp_path / "run"), tmp_path / "hf", Format.safetensors, trim_vocab=True)
    config.write_text(config.read_text().replace("n_layers: 2", "n_layers: 2\n  norm: layer"))
    with pytest.raises(ConfigError, match="norm is layer, but a Hugging Face llama has RMSNorm only"):
        make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_that_is_gone_or_another_is_left_out_and_said_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", n_layers=1, tokenizer={"name": "hf", "path": "/nowhere/tokenizer.json"})
    made = make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    assert "no tokenizer was exported: data.tokenizer.path: no file /nowhere/tokenizer.json" in made.warnings[0]
    assert made.files == ["config.json", "generation_config.json", "model.safetensors"]
    assert (
        "has no tokenizer; copy its tokenizer.json into" in make_import(tmp_path / "hf", tmp_path / "back").warnings[0]
    )


def test_tables_that_a_model_computes_itself_are_left_behind(tmp_path: Path) -> None:
    """Older Llama folders hold the frequencies of their positions, in fp32 whatever the weights are."""
    make_run(tmp_path / "run", n_layers=1)
    make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf, dtype=Dtype.bf16)
    file = tmp_path / "hf" / "model.safetensors"
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_file(load_file(file) | table, file)
    assert stored_dtype(tmp_path / "hf") == torch.bfloat16
    make_import(tmp_path / "hf", tmp_path / "in")
    assert not [name for name in weights(tmp_path / "in") if "inv_freq" in name]
    make_export(str(tmp_path / "hf"), tmp_path / "again", Format.hf)
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("config", "generation", "kept"),
    [
        ([257, 77], [257, 77], [257, 77]),
        ([257, 77], 257, 257),  # generation_config.json decides
        (257, [77, 65], [77, 65, 257]),  # documents of continued training end with the tokenizer's own end token
        (77, None, [77, 257]),
        (257, None, 257),
    ],
)
def test_all_end_tokens_are_kept_on_the_way_in_and_out(tmp_path: Path, config: Any, generation: Any, kept: Any) -> None:
    make_run(tmp_path / "run", n_layers=1)
    hf, files = tmp_path / "hf", ("config.json", "generation_config.json")
    make_export(str(tmp_path / "run"), hf, Format.hf)
    for name, ids in zip(files, (config, generation), strict=True):
        (hf / name).write_text(json.dumps({**json.loads((hf / name).read_text()), "eos_token_id": ids}))
    if generation is None:
        (hf / files[1]).unlink()
    make_import(hf, tmp_path / "in")
    make_export(str(tmp_path / "in"), tmp_path / "out", Format.hf)
    for name in files:
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == kept


def test_a_tokenizer_with_more_tokens_than_the_model_is_left_out_and_said_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", vocab_size=100, n_layers=1)
    made = make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    assert "the vocabulary of the model is 100, but the tokenizer has 258 tokens" in made.warnings[0]
    assert made.files == ["config.json", "generation_config.json", "model.safetensors"]


# -- the words -------------------------------------------------------------------------------------------------------


def test_the_commands(hostile_dir: Path, lingua: Lingua) -> None:
    run, hf, back = hostile_dir / "run", hostile_dir / "hf", hostile_dir / "back"
    make_run(run, n_layers=1)
    code, out, _ = lingua("export", run, hf)
    assert (code, "AutoModelForCausalLM.from_pretrained(" in out) == (0, True)
    code, out, _ = lingua("import", hf, back, "--json")
    facts = json.loads(out)
    assert (code, facts["folder"], facts["warnings"]) == (0, str(back), [])
    assert facts["files"] == ["config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert lingua("import", hf, back)[::2] == (
        2,
        f"error: {back} already exists; choose a new folder, or remove it first\n",
    )


@pytest.mark.filterwarnings("ignore")
def test_the_same_text_comes_out_of_every_form(tmp_path: Path, lingua: Lingua) -> None:
    run, meta = tmp_path / "run", tmp_path / "meta" / "checkpoints" / "0000000001"
    make_run(run, n_layers=1)
    for form in Format:
        make_export(str(run), tmp_path / form, form)
    make_import(tmp_path / "hf", tmp_path / "back")
    # as Meta Lingua leaves them: a folder of torch's that nobody vouches for, and one file with params.json
    save({"model": weights(run)}, storage_writer=FileSystemWriter(meta), no_dist=True)
    (tmp_path / "meta" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (meta / "consolidated").mkdir()
    (tmp_path / "torch" / "consolidated.pth").rename(meta / "consolidated" / "consolidated.pth")
    (meta / "consolidated" / "params.json").write_text(described(run / "config.yaml").model_dump_json())
    places = [
        run,
        f"{run}@1",
        *(tmp_path / name for name in ("hf", "safetensors", "back")),
        meta,
        meta / "consolidated",
    ]
    said = [
        lingua("generate", f"ckpt={place}", "prompt=ab", "max_gen_len=2", "temperature=0", "device=cpu", "dtype=fp32")
        for place in places
    ]
    assert {code for code, _, _ in said} == {0}, said
    assert len({out for _, out, _ in said}) == 1


def test_no_torch_and_no_waiting_before_a_command_runs() -> None:
    program = "import sys, apps.cli.main, apps.cli.export; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
