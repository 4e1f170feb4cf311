"""Runs with published checkpoints, made without torch: the publish protocol does not care what is in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import yaml

from lingua.checkpoint import layout, publish
from lingua.files import write_json

FILES = (layout.METADATA, layout.model_file(0), layout.optim_file(0), layout.train_state_file(0))


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step} ".encode() * 20


def write_part(root: Path, step: int, incarnation: int = 1) -> publish.Manifest:
    """What a start leaves of a save that it did not finish."""
    folder = layout.coming(layout.folder(root, step), incarnation)
    folder.mkdir(parents=True)
    return {name: publish.write_hashed(folder / name, [content(step, name)]) for name in FILES}


def publish_step(root: Path, step: int, incarnation: int = 1) -> Path:
    publish.publish(root, step, incarnation, write_part(root, step, incarnation), seconds=1.5)
    return layout.folder(root, step)


def make_run(run_dir: Path, *steps: int, **checkpoint: Any) -> Path:
    """A finished run with these checkpoints by its start 1; `checkpoint`: that section of its config. Returns the root.

    Without `dump` and `eval` there is one of each step, and all are kept.
    """
    root = run_dir / layout.CHECKPOINTS
    root.mkdir(parents=True)
    section = {"dump": {"every": 1, "keep": 0}, "eval": {"every": 0, "keep": 0}, "shm_path": f"{run_dir}.shm"}
    section |= checkpoint
    config = {"dump_dir": str(run_dir), "steps": 100, "checkpoint": section}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / "incarnations").mkdir()
    write_json(run_dir / "incarnations" / "0000000001.json", {"incarnation": 1, "released": True})
    publish.open_staging_dir(root, 1)
    for step in steps:
        publish_step(root, step)
    return root


def damage(root: Path, step: int, name: str = FILES[1]) -> None:
    """Flip a bit of a file; its size stays."""
    path = layout.folder(root, step) / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def names_under(folder: Path) -> set[str]:
    """All that is in a folder, at any depth, with the bytes of files: equal before and after if nothing changed."""
    return {f"{p.relative_to(folder)} {p.read_bytes()!r}" if p.is_file() else str(p) for p in folder.rglob("*")}


def records(text: str) -> Any:
    return orjson.loads(text)
