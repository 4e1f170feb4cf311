import io
from pathlib import Path

import pytest
import torch

from apps.main.args import LMTransformerArgs
from apps.main.generate import config_of, main
from apps.main.transformer import LMTransformer
from lingua.config.base import ConfigError
from lingua.config.command_line import run_main
from lingua.logger import printable

CONFIG = """
app: apps.main
model: {dim: 16, n_layers: 1, n_heads: 2, multiple_of: 8, max_seqlen: 32}
data: {seq_len: 24, tokenizer: {name: bytes}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run leaves it, with weights of a model that never was trained."""
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    model = LMTransformer(LMTransformerArgs(dim=16, n_layers=1, n_heads=2, multiple_of=8, vocab_size=258))
    model.init_weights(1)
    torch.save(model.state_dict(), folder / "consolidated.pth")
    return folder


def words(run: Path, *more: str) -> list[str]:
    return [f"ckpt={run}/consolidated.pth", "max_gen_len=4", "dtype=fp32", *more]


def test_prompts_are_answered_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["temperature=0.5", "top_k=5", "top_p=0.9"]
    assert main(words(run, "prompt=one", "prompt=a: [b", *more)) == 0
    out, err = capsys.readouterr()
    bare = words(run, "one", *more, "a: [b")
    assert main([bare[0].removeprefix("ckpt="), *bare[1:]]) == 0
    assert capsys.readouterr().out == out
    assert out.startswith("one")
    assert "\na: [b" in out
    assert err.startswith(f"loading {run}/consolidated.pth\n")
    assert "parameters" in err


def test_a_bare_path_and_a_config_elsewhere_are_understood(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(run, "prompt=one")) == 0
    expected = capsys.readouterr().out
    moved = run.parent / "elsewhere" / "deep" / "down"
    moved.mkdir(parents=True)
    (run / "consolidated.pth").rename(moved / "weights.pth")
    more = ["max_gen_len=4", "dtype=fp32", "prompt=one"]
    assert main([f"ckpt={moved}/weights.pth", f"config={run}/config.yaml", *more]) == 0
    assert capsys.readouterr().out == expected
    with pytest.raises(ConfigError, match=r"no config.yaml near it .* name one with config=FILE"):
        main([str(moved / "weights.pth"), *more])


def test_the_end_is_one_string_or_a_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(run, "prompt=one", "until=END")) == 0
    assert main(words(run, "prompt=one", r'until=["\n\n", END]')) == 0
    assert capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_cut_and_said_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(run, f"prompt={'x' * 99}")) == 0
    assert "its first 72 tokens were cut off" in capsys.readouterr().err  # 99 + begin, 32 - 4 kept


def test_without_a_prompt_they_are_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(words(run)) == 0
    assert capsys.readouterr().out.startswith("one")
    typed = iter(["one", "", "two"])

    def read_line(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("builtins.input", read_line)
    assert main(words(run)) == 0
    out = capsys.readouterr().out
    assert out.startswith("one")
    assert "\ntwo" in out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["prompt=x"], "no run is named; write RUN first"),
        (["ckpt=/no/such/run"], "error: /no/such/run does not exist"),
        (["ckpt=x", "temprature=1"], "temperature"),
        (["ckpt=x", "temperature=-1"], "temperature"),
    ],
)
def test_mistakes_are_one_sentence(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, given) == 2
    assert sentence in capsys.readouterr().err


def test_a_vocabulary_smaller_than_the_tokenizer_is_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text(CONFIG.replace("max_seqlen", "vocab_size: 100, max_seqlen"))
    assert run_main(main, words(run, "prompt=one")) == 2
    assert "model.vocab_size is 100, but the tokenizer has 258 tokens; set data.tokenizer" in capsys.readouterr().err


def test_on_a_cpu_weights_keep_the_type_they_are_stored_in(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"ckpt={run}/consolidated.pth", "max_gen_len=4", "device=cpu", "prompt=one"]
    file = run / "consolidated.pth"
    for dtype in (torch.float32, torch.bfloat16):
        torch.save({name: tensor.to(dtype) for name, tensor in torch.load(file).items()}, file)
        assert main(given) == 0
        assert f"on cpu in {str(dtype).removeprefix('torch.')}" in capsys.readouterr().err


def test_the_config_of_a_checkpoint_is_that_of_its_run(run: Path) -> None:
    step = run / "checkpoints" / "0000000010"
    step.mkdir(parents=True)
    for ckpt in (str(run), f"{run}@10", str(step)):
        assert config_of(ckpt) == run / "config.yaml"


def test_help_has_the_usage_and_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "[ckpt=]RUN[@STEP] [TEXT ...]" in out
    assert "temperature=0.8\n" in out
    assert "top_p=null\n" in out


@pytest.mark.parametrize(("users_own", "after"), [(None, 1), ("2", 2)], ids=["one thread", "the user's own number"])
def test_a_small_model_is_not_split_over_threads(
    run: Path, monkeypatch: pytest.MonkeyPatch, users_own: str | None, after: int
) -> None:
    if users_own is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", users_own)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(words(run, "prompt=one", "device=cpu")) == 0
        assert torch.get_num_threads() == after
    finally:
        torch.set_num_threads(before)


def test_one_answer_is_written_as_it_grows_and_is_the_same_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in (["max_gen_len=20"], ["max_gen_len=20", "until=ab"], ["max_gen_len=20", "temperature=0"]):
        assert main([f"ckpt={run}/consolidated.pth", "dtype=fp32", "prompt=one", *more]) == 0
        whole = capsys.readouterr().out
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdout.isatty", lambda: True, raising=False)
            assert main([f"ckpt={run}/consolidated.pth", "dtype=fp32", "prompt=one", *more]) == 0
        assert capsys.readouterr().out == printable(whole)
