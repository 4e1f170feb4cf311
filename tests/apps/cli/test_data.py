"""`lingua data ...` from its words to its exit code, on real files and on a run that was stopped and went on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from apps.cli.data import read_run
from lingua.config.command_line import parse_command_line
from lingua.data.loader import build_loader
from lingua.tokenizer import build_tokenizer
from lingua.train.check import load
from tests.cli import Lingua
from tests.corpora import documents, two_sources, write_source
from tests.no_torch import said_without_torch
from tests.trainer import TINY, at_step, kill_self, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(name="lingua")
def _lingua(capsys: pytest.CaptureFixture[str]) -> Lingua:
    return Lingua(capsys, "data")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_sources(tmp_path_factory.mktemp("corpus"))


def run_words(corpus: Path, run: Path) -> list[str]:
    sources = "data.sources={big: 3.0, small: 1.0}"
    changed = ["steps=6", "checkpoint.dump={every: 2, keep: 10}", "data.load_async=false", "global_batch_size=8"]
    return [*TINY, *changed, f"data.root_dir={corpus}", sources, f"dump_dir={run}"]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 3 on one rank, finished on two."""
    path = tmp_path_factory.mktemp("run") / "run"
    assert train(run_words(corpus, path), hook=at_step(3, kill_self)).exit_code == -9
    done = train(run_words(corpus, path), n_ranks=2)
    assert done.exit_code == 0, done.output
    return path


# -- runs ----------------------------------------------------------------------------------------------------------


def test_audit_confirms_a_run_over_its_restarts(run: Path, lingua: Lingua) -> None:
    found = lingua.record("audit", run, "--workers", 2)
    assert (found["ok"], found["checkpoints"], found["begin"], found["rows"]) == (True, [2, 4, 6], 0, 48)
    assert found["tokens_checked"] is True
    assert found["pieces"] > 12
    assert lingua.record("audit", run, "--no-tokens", "--workers", 1)["tokens_checked"] is False


def forge(state: dict[str, Any], what: str) -> None:
    lane = state["lanes"]["3"]
    match what:
        case "hash":
            lane["hash"] = f"{int(lane['hash'], 16) ^ 1:016x}"
        case "token":
            lane["token"] += 1
        case "rows":
            lane["rows"] += 1
        case "place":
            lane["tapes"]["big"][0] += 12
        case "pick":
            lane["pick"] += 1


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("hash", "step 4, lane 3: is at document .* but came there by other documents"),
        ("token", "step 4, lane 3: .* tokens were given"),
        ("rows", "step 4, lane 3: gave 4 rows, its share of 32 rows is 3"),
        ("place", "step 4, lane 3: is at .*, but the order leads to"),
        ("pick", "step 4, lane 3: is at .*, but the order leads to"),
    ],
)
def test_audit_finds_each_kind_of_lie(
    run: Path, what: str, sentence: str, monkeypatch: pytest.MonkeyPatch, lingua: Lingua
) -> None:
    parts, n_lanes, states = read_run(run)
    forge(states[4], what)
    monkeypatch.setattr("apps.cli.data.read_run", lambda path: (parts, n_lanes, states))
    code, out, _ = lingua("audit", run, "--json", "--workers", 1)
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    assert re.search(sentence, found["problems"][0]), found["problems"]


def test_rows_are_those_that_the_step_was_trained_on(run: Path, lingua: Lingua) -> None:
    (part,), n_lanes, _ = read_run(run)
    with build_loader(part.args, rows_per_step=part.rows_per_step, lanes=n_lanes) as loader:
        trained = [[bytes(i for i in ids if i < 256) for ids in next(loader).views[0].tolist()] for _ in range(24)]
    flat = [text for batch in trained for text in batch]
    for step in (1, 4, 6):
        shown = lingua.record("rows", run, "--step", step)["rows"]
        assert [row["row"] for row in shown] == list(range(8 * step - 8, 8 * step))
        for row in shown:
            assert sum(part["n_tokens"] for part in row["documents"]) == 32
            text = "".join(part["text"] for part in row["documents"])
            assert text == flat[row["row"]].decode("utf-8", "backslashreplace") or "\\x" in text
            for part in row["documents"]:
                line = Path(part["file"]).read_bytes()[part["offset"] :].split(b"\n")[0]
                assert part["text"].strip("\\xc3a9") in json.loads(line)["text"] or "\\x" in part["text"]
    code, out, _ = lingua("rows", run, "--step", 2, "--chars", 5)
    assert code == 0
    assert out.count("row ") == 8
    code, _, err = lingua("rows", run, "--step", 7)
    assert (code, err) == (2, f"error: --step 7: {run} ends at step 6; name a step up to that\n")


def test_what_is_no_run_is_told(tmp_path: Path, run: Path, lingua: Lingua) -> None:
    code, _, err = lingua("audit", tmp_path)
    assert (code, f"error: {tmp_path} is not a run: it has no config.yaml" in err) == (2, True)
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "no checkpoint yet" in lingua("rows", tmp_path, "--step", 1)[2]


# -- files ---------------------------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path, lingua: Lingua) -> None:
    folder = write_source(tmp_path, "s", ["abc", "de", "é"], n_files=2)
    with (folder / "s.chunk.01.jsonl").open("a") as file:
        file.write("\n{\n")
    facts = lingua.record("inspect", folder)
    assert facts["documents"] == 3
    assert facts["text_bytes"] == facts["tokens_estimated"] == 7
    assert facts["bad_lines_by_kind"] == {"blank": 1, "not_json": 1}
    document = lingua.record("inspect", folder, "--doc", 1)
    assert (document["text"], document["offset"]) == ("é", 16)
    assert lingua("inspect", folder, "--doc", 1)[1].endswith("\n\né\n")
    assert "has 3 documents" in lingua("inspect", folder, "--doc", 3)[2]
    code, out, _ = lingua("inspect", folder)
    assert code == 0
    assert "documents                3" in out


def test_inspect_shows_the_quality_of_text_and_makes_a_page(tmp_path: Path, lingua: Lingua) -> None:
    texts = [f"word {n} <b>x</b>\nSubscribe to our <i>newsletter</i>" for n in range(9)]
    folder = write_source(tmp_path, "s", [*texts, texts[0], "bad \ufffd"])
    page = tmp_path / "pages" / "s.html"
    code, out, _ = lingua("inspect", folder, "--page", page)
    assert code == 0
    assert "exact duplicates         1 (9.1% of the documents)" in out
    assert "scripts of letters       Latin 100.0%" in out
    assert "odd characters           1 replacement (U+FFFD), in 1 document\n" in out
    html = page.read_text()
    assert "Subscribe to our &lt;i&gt;newsletter&lt;/i&gt;" in html
    assert "<script" not in html
    assert "http" not in html
    assert lingua.record("inspect", folder)["quality"]["boilerplate"]["Subscribe to our <i>newsletter</i>"] == 10
    (tmp_path / "file").touch()
    assert (
        "choose another place with --page FILE" in lingua("inspect", folder, "--page", tmp_path / "file" / "x.html")[2]
    )
    lingua.record("tokenize", folder, "--out", tmp_path / "t")
    assert "holds no text to show" in lingua("inspect", tmp_path / "t" / "s", "--page", page)[2]


def test_own_texts_and_a_tokenizer_of_them_in_one_command(
    tmp_path: Path, lingua: Lingua, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my texts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "my texts" / f"{name}.txt").write_text(f"the {name} and the other " * 50)
    words = ("prepare", tmp_path / "my texts", "mine", "--tmp_dir", tmp_path, "--train-tokenizer", 300)
    facts = lingua.record(*words)
    assert (facts["documents"], facts["held_out"]) == (3, 1)
    assert facts["bytes_per_token"] > 2
    file = tmp_path / "data/mine/tokenizer-300.json"
    before = file.stat().st_mtime_ns
    code, out, _ = lingua(*words)  # again: what is there stays
    assert (code, file.stat().st_mtime_ns) == (0, before)
    assert "data/mine: 3 documents of 3 files\nheld out for validation: 1 document, 1 of 100 drawn" in out
    assert "warning: that is fewer than 300: the texts hold no more" in out
    command = out.split(" train CONFIG ")[1].split("\n  look at it")[0]
    typed = [f"config={ROOT}/apps/main/configs/debug.yaml", *shlex.split(command.replace("\\\n", ""))]
    args = load(parse_command_line([*typed, f"dump_dir={tmp_path}/run"]), strict_paths=True).args
    tokenizer = build_tokenizer(args.data.tokenizer)
    assert tokenizer.vocab_size <= 300
    tokenizer.check_special(True, True)
    assert tokenizer.decode(tokenizer.encode("the é\x00 <|end_of_text|>", False, False)) == "the é\x00 <|end_of_text|>"
    assert [source.path for source in args.data.read_files()] == ["data/mine"]
    assert re.fullmatch("the [abc] and the", args.sample_prompt or "")
    facts = lingua.record("inspect", "data/mine")  # counts the tokens of the tokenizer beside the data
    fingerprint = tokenizer.fingerprint.removesuffix(":gpt2")  # the config's split, which this kind does not have
    assert facts["tokenizer"] == f"{fingerprint} (data/mine/tokenizer-300.json)"
    assert facts["tokens_estimated"] < facts["text_bytes"]
    assert lingua.record("inspect", "data/mine", "--tokenizer", "bytes")["tokenizer"] == "bytes"
    assert "say what it is with --tokenizer" in lingua("inspect", "data/mine", "--tokenizer-path", file)[2]
    printed = lingua("tokenize", "data/mine", "--out", "data/tokens")[1].split("in a config:")[1]
    data = yaml.safe_load(printed)["data"]
    assert data["tokenizer"] == {"name": "hf", "path": "data/mine/tokenizer-300.json"}
    assert data["sources"][0]["path"] == str(tmp_path / "data/tokens/mine")
    assert lingua.record("inspect", "data/tokens/mine")["tokenizer"] == fingerprint
    (tmp_path / "apps/main/configs").mkdir(parents=True)
    (tmp_path / "apps/main/configs/debug.yaml").write_bytes((ROOT / "apps/main/configs/debug.yaml").read_bytes())
    out = lingua(*words[:-1], 258)[1]
    assert "fewer than" not in out
    assert "one pass over it takes about 2 steps\n" in out
    assert out.split("look at it")[0].split()[-1] == "steps=20"
    assert "is in" in lingua("prepare", tmp_path, "mine")[2]
    for size in ("16q", "100", "k", "-5k"):
        assert "is not a number from 258 to 200000; write 8k, 16k or 32000" in lingua(*words[:-1], size)[2]


def test_index_and_tokenize(tmp_path: Path, lingua: Lingua) -> None:
    write_source(tmp_path, "s", documents("d", 50))
    made = lingua.record("index", tmp_path / "s")
    assert [facts["lines"] for facts in made.values()] == [25, 25]
    assert len(list((tmp_path / "s").glob("*.idx"))) == 2
    lingua.record("index", tmp_path / "s" / "s.chunk.00.jsonl", "--out", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "s.chunk.00.jsonl.idx").is_file()
    file = tmp_path / "s" / "s.chunk.01.jsonl"
    for words, index in (((), file.with_name(f"{file.name}.idx")), (("--index_path", tmp_path / "i"), tmp_path / "i")):
        made = lingua.record("create_mmap_index", file, *words)  # as LLMgym's users type it
        assert made == {str(file): {"index": str(index), "lines": 25}}
        assert index.is_file()
    words = ("tokenize", tmp_path / "s", "--out", tmp_path / "t")
    first = lingua.record(*words, "--workers", 2)
    assert (first["files_made"], first["documents"]) == (2, 50)
    assert lingua.record(*words)["files_there_already"] == 2
    facts = lingua.record("inspect", tmp_path / "t" / "s")
    assert (facts["documents"], facts["tokens"], facts["damaged_files"]) == (50, first["tokens"], [])
    assert "token files hold no text" in lingua("inspect", tmp_path / "t" / "s", "--doc", 0)[2]


def test_tokenize_a_config_and_train_from_it(corpus: Path, tmp_path: Path, lingua: Lingua) -> None:
    words = run_words(corpus, tmp_path / "run")
    made = lingua.record("tokenize", *words, "--out", tmp_path / "t", "--workers", 1)
    (tmp_path / "tokens.yaml").write_text(json.dumps({"data": {"sources": made["data.sources"]}}))
    plain = lingua.record("preview", *words, "--steps", 3)
    fast = lingua.record(
        "preview",
        *[word for word in words if "data.sources" not in word],
        f"+{tmp_path}/tokens.yaml",
        "--steps",
        3,
    )
    for name, facts in plain["sources"].items():
        assert facts["tokens"] == fast["sources"][name]["tokens"] > 0
        estimated = facts["tokens_per_epoch_estimated"]
        assert estimated == pytest.approx(fast["sources"][name]["tokens_per_epoch_estimated"], rel=0.1)


def test_preview(corpus: Path, tmp_path: Path, lingua: Lingua) -> None:
    facts = lingua.record("preview", *run_words(corpus, tmp_path / "run"), "--steps", 4, "--rows", 3)
    assert (facts["rows_per_step"], facts["steps_of_the_run"]) == (8, 6)
    assert sum(source["tokens"] for source in facts["sources"].values()) == 4 * 8 * 33  # with the last label
    assert [row["row"] for row in facts["first_rows"]] == [0, 1, 2]
    assert not (tmp_path / "run").exists()
    code, out, _ = lingua("preview", *run_words(corpus, tmp_path / "run"))
    assert code == 0
    assert "share_of_tokens" in out


def test_no_torch_and_help(tmp_path: Path) -> None:
    write_source(tmp_path, "s", ["a"])
    preview = ["apps/main/configs/debug.yaml", f"data.root_dir={tmp_path}", "data.sources={s: 1}"]
    said = said_without_torch(ROOT, ["data", "preview", *preview, f"dump_dir={tmp_path / 'run'}"], ["data", "--help"])
    assert all(name in said for name in ("inspect", "preview", "index", "tokenize", "audit", "rows"))
