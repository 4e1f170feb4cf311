"""What a fork refuses before it makes anything, and what it writes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from apps.cli.fork import fork
from lingua.checkpoint import layout, publish
from lingua.config.base import ConfigError
from lingua.config.frozen import read_frozen
from lingua.config.yaml_layers import read_yaml
from lingua.files import RunError
from tests.checkpoints import names_under
from tests.corpora import two_sources, write_source
from tests.trainer import TINY, train


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of six; two sources."""
    folder = tmp_path_factory.mktemp("origin")
    two_sources(folder / "data")
    words = [*TINY, "steps=6", "checkpoint.dump={every: 3, keep: 0}", f"data.root_dir={folder / 'data'}"]
    words += ["data.sources={big: 3.0, small: 1.0}", "eval.dump_dir=elsewhere", "eval.automatic=false"]
    result = train([*words, f"checkpoint.path={folder / 'ckpts'}", f"dump_dir={folder / 'run'}"])
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_what_belongs_to_the_other_run_alone_is_not_inherited(origin: Path, tmp_path: Path) -> None:
    made = fork(f"{origin}@3", tmp_path / "new", ["optim.lr=1e-3", "checkpoint.reset=[schedule]"])
    config = read_frozen(made.folder)
    assert config is not None
    assert (config["name"], config["dump_dir"]) == ("new", str(tmp_path / "new"))
    assert config["checkpoint"]["path"] is None
    assert config["checkpoint"]["init_ckpt_path"] == f"{origin}@3"
    assert config["checkpoint"]["continue_training_from_init"] is True
    assert config["checkpoint"]["reset"] == ["schedule"]
    assert config["eval"]["dump_dir"] is None
    assert made.changes == ["optim.lr: 0.002 -> 0.001", "checkpoint.reset: [] -> ['schedule']"]
    old = read_yaml(origin / "config.yaml").tree
    same = set(config) - {"name", "dump_dir", "checkpoint", "eval", "optim"}
    assert {key: config[key] for key in same} == {key: old[key] for key in same}


def test_the_checkpoint_is_pinned_for_a_week(origin: Path, tmp_path: Path) -> None:
    made = fork(f"{origin}@3", tmp_path / "pinned", [])
    root = origin.parent / "ckpts"
    assert (root / layout.PINS / "0000000003.fork-pinned.json").is_file()
    assert publish.pinned_steps(root, time.time() + 6 * 86400) >= {3}
    assert made.pinned_until == pytest.approx(time.time() + 7 * 86400, abs=60)


def test_a_run_that_may_not_be_written_to(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(publish, "pin", refuse)
    assert fork(f"{origin}@3", tmp_path / "new", []).pinned_until is None
    assert (tmp_path / "new" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("step", "words", "sentence"),
    [
        (3, ["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr"),
        (3, ["dump_dir=x"], "dump_dir follows from RUN@STEP and NEW; remove dump_dir=x"),
        (3, ["checkpoint.init_ckpt_path=x"], "checkpoint.init_ckpt_path follows from RUN@STEP and NEW"),
        (6, [], r"steps is 6, but .*@6 is already at step 6; .* checkpoint\.reset=\[step\]"),
        (6, ["checkpoint.reset=[data]"], r"count from 0 with checkpoint\.reset=\[data,step\]"),
        (3, ["model.dim=64"], r"model\.dim: 32 -> 64: .* parameters, this model .*; set it back"),
        (3, ["data.seq_len=16"], "seq_len was 32 and is 16 now"),
        (3, ["data.lanes=24"], "number of lanes K was 12 and is 24 now"),
        (3, ["data.sources={big: 1.0}"], r"continue with them on purpose: data\.accept_change="),
        (3, ["checkpoint.reset=[model]"], r"checkpoint\.reset\.0 is 'model'"),
        (3, ["checkpoint.continue_training_from_init=false", "checkpoint.reset=[data]"], "no state is taken over"),
        (3, ["other.yaml"], "two configs"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_made(
    origin: Path, tmp_path: Path, step: int, words: list[str], sentence: str
) -> None:
    before = names_under(origin.parent)
    with pytest.raises(ConfigError, match=sentence):
        fork(f"{origin}@{step}", tmp_path / "new", words)
    assert not (tmp_path / "new").exists()
    assert names_under(origin.parent) == before


@pytest.mark.parametrize(
    "words",
    [
        ["data.seq_len=16", "data.lanes=24", "checkpoint.reset=[data]"],
        ["data.sources={big: 1.0}", "checkpoint.reset=[data]"],
        ["global_batch_size=4", "data.batch_size=4"],
        ["model.rope_theta=500000.0"],
        ["model.dim=32", "+debug"],
        ["checkpoint.continue_training_from_init=false"],
    ],
    ids=str,
)
def test_what_fits_is_made(origin: Path, tmp_path: Path, words: list[str]) -> None:
    assert fork(f"{origin}@3", tmp_path / "new", words).config.is_file()


def test_changed_sources_go_on_with_the_fingerprint_that_was_told(origin: Path, tmp_path: Path) -> None:
    words = ["data.sources={big: 1.0, small: 1.0}"]
    with pytest.raises(ConfigError) as refused:
        fork(f"{origin}@3", tmp_path / "new", words)
    told = str(refused.value).rpartition("data.accept_change=")[2].split()[0]
    assert fork(f"{origin}@3", tmp_path / "new", [*words, f"data.accept_change={told}"]).config.is_file()


def test_sources_that_are_not_on_this_machine_are_left_to_the_start(origin: Path, tmp_path: Path) -> None:
    made = fork(f"{origin}@3", tmp_path / "new", [f"data.root_dir={tmp_path / 'elsewhere'}"])
    assert any("is not on this machine" in warning for warning in made.warnings)


def test_files_that_changed_are_seen(origin: Path, tmp_path: Path) -> None:
    root = two_sources(tmp_path / "data")
    write_source(root, "big", ["other"], n_files=1)
    with pytest.raises(ConfigError, match=r"data\.sources: big: fingerprint was"):
        fork(f"{origin}@3", tmp_path / "new", [f"data.root_dir={root}"])


def test_where_it_may_not_go(origin: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    fork(f"{origin}@3", tmp_path / "there", [])  # an empty folder will do
    with pytest.raises(ConfigError, match="there already exists; choose a new folder"):
        fork(f"{origin}@3", tmp_path / "there", [])


def test_what_is_no_published_checkpoint(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no published checkpoint of step 4; it has 3, 6"):
        fork(f"{origin}@4", tmp_path / "new", [])
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "config.yaml").write_text((origin / "config.yaml").read_text())
    with pytest.raises(RunError, match="does not exist"):
        fork(f"{tmp_path / 'absent'}@4", tmp_path / "new", [])


def test_a_damaged_checkpoint(origin: Path, tmp_path: Path) -> None:
    file = layout.folder(origin.parent / "ckpts", 6) / layout.model_file(0)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    try:
        with pytest.raises(RunError, match=r"is damaged: model\.00000\.distcp has \d+ bytes instead of \d+; take"):
            fork(f"{origin}@6", tmp_path / "new", ["steps=8"])
    finally:
        file.write_bytes(content)
