"""A checkpoint whose files were edited, with checksums rewritten to fit: refused in a sentence, never a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import xxhash

from tests.trainer import TINY, train

Edit = Callable[[dict[str, Any]], Any]
STEP = "0000000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, with a checkpoint of the last."""
    run = tmp_path_factory.mktemp("edited") / "run"
    assert train(words(run)).exit_code == 0
    return run


def words(run: Path) -> list[str]:
    return [*TINY, "steps=4", "checkpoint.dump.every=4", f"dump_dir={run}"]


def rewrite(run: Path, name: str, edit: Edit) -> None:
    """Edit a JSON file of the checkpoint, then manifest and mark so that all checksums fit again."""
    root = run / "checkpoints"
    folder, mark_path = root / STEP, root / f"checkpoint_{STEP}.done"
    path = {"mark": mark_path, "run_id": root / "run_id"}.get(name, folder / name)
    if name == "run_id":
        path.write_text(str(edit({})))
        return
    document = orjson.loads(path.read_bytes())
    edited = edit(document)
    path.write_bytes(orjson.dumps(document if edited is None else edited))
    if name == "mark":
        return
    manifest_path = folder / "manifest.json"
    if name != "manifest.json":
        manifest = orjson.loads(manifest_path.read_bytes())
        content = path.read_bytes()
        manifest["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        manifest_path.write_bytes(orjson.dumps(manifest))
    mark = orjson.loads(mark_path.read_bytes())
    mark["manifest_xxh3_128"] = xxhash.xxh3_128_hexdigest(manifest_path.read_bytes())
    mark_path.write_bytes(orjson.dumps(mark))


def put(*keys: str | int, value: Any) -> Edit:
    """An edit that sets one value, deep inside."""

    def edit(document: dict[str, Any]) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return edit


STATE, MANIFEST = "train_state.00000.json", "manifest.json"
DATA = ("per_rank", "data")
EDITS: list[tuple[str, Edit, str]] = [
    (STATE, put("shared", "step", value=2), "it counts 2 steps"),
    (STATE, put("shared", "step", value="4"), "shared.step: Input should be a valid integer"),
    (STATE, drop("shared", "step"), "it counts None steps"),
    (STATE, put("shared", "total_tokens", value=10**9), "it counts 1000000000 tokens, but 4 steps are"),
    (STATE, put("shared", value=None), "shared: Input should be a valid dictionary"),
    (STATE, put("shared", "schedule_begin", value=999), "schedule_begin 999 is after step 4"),
    (STATE, put("world_size", value=3), "train_state.00001.json is missing"),
    (STATE, put("world_size", value=0), "world_size"),
    (STATE, put("rank", value=1), "it is of rank 1 of 1, not 0 of 1"),
    (STATE, put("version", value=99), "version"),
    (STATE, lambda document: [], "is not a training state: the whole"),
    (STATE, put("rng", "torch", value="AAAA"), "its random state is none"),
    (STATE, put("rng", "numpy", 1, value=[1]), "its random state is none"),
    (STATE, put("rng", "python", 1, value=["x"]), "its random state is none"),
    (STATE, put("param_groups", 0, "values", "lr", value="fast"), ""),
    (STATE, put("param_groups", 0, "values", "betas", value=["x", 1]), "betas of the optimizer is"),
    (STATE, put("param_groups", 0, value=7), "param_groups.0"),
    (STATE, put("optim_scalars", value={"nobody": {"step": 1}}), "optimizer state of 'nobody'"),
    (STATE, put(*DATA, "row", value=6), "6 rows were used, 4 steps of 2 from row 0 on are 8"),
    (STATE, put(*DATA, "lanes", "0", "rows", value=5), "lane 0: gave 5 rows"),
    (STATE, put(*DATA, "lanes", "0", "hash", value="none"), "position in the data is damaged: lanes.0.hash"),
    (STATE, put(*DATA, "lanes", "0", "tapes", value={"python_stdlib": ["a", 0]}), "lanes.0.tapes.python_stdlib"),
    (STATE, drop(*DATA, "lanes", "3"), "lane 3 is not in its state"),
    (STATE, put("per_rank", value={}), "position in the data is damaged"),
    (STATE, put("shared", "first_row", value=2), "8 rows were used, 4 steps of 2 from row 2 on are 10"),
    (
        MANIFEST,
        put("step", value=2),
        "is of step 2 by attempt 1, but checkpoint_0000000004.done of step 4",
    ),
    (MANIFEST, put("incarnation", value=7), "is of step 4 by attempt 7"),
    (MANIFEST, put("run_id", value="0123456789abcdef"), "is of the run 0123456789abcdef, but"),
    (MANIFEST, put("files", value={}), "does not list"),
    (MANIFEST, drop("files", "optim.00000.distcp"), "does not list optim.00000.distcp"),
    (MANIFEST, put("files", "../x", value={"bytes": 1, "xxh3_128": "0" * 32}), "is not a checkpoint's manifest"),
    (MANIFEST, put("files", "model.00000.distcp", "bytes", value=-1), "is not a checkpoint's manifest (files.model"),
    ("mark", put("step", value=2), "does not match the checksum"),
    ("mark", put("incarnation", value="1"), "is not a checkpoint's mark (incarnation"),
    ("mark", put("bytes", value=None), "is not a checkpoint's mark (bytes"),
    ("run_id", lambda _: "another", "says another; put that back"),
    ("run_id", lambda _: "\n", "holds no id of a run"),
]


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [pytest.param(*edit, id=f"{edit[0]}-{i}", marks=pytest.mark.soak if i % 9 else ()) for i, edit in enumerate(EDITS)],
)
def test_an_edit_that_fits_its_checksums_is_refused_in_a_sentence(
    trained: Path, tmp_path: Path, name: str, edit: Edit, sentence: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rewrite(run, name, edit)
    ended = train([*words(run), "steps=6", "--accept-change"])
    assert "Traceback" not in ended.output
    assert ended.exit_code == 1
    last = ended.output.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in ended.output, last
