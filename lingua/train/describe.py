"""Find and read the config of the weights at a path: our config.yaml, Meta Lingua's params.json, Hugging Face's
config.json. Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingua.checkpoint.lookup import find_one, without_ema
from lingua.config.base import ConfigError, parts
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import compose
from lingua.config.frozen import CONFIG_FILE
from lingua.config.keys.data import TokenizerArgs
from lingua.config.keys.model import LlamaArgs
from lingua.config.keys.phases import PhaseArgs, read_until
from lingua.config.keys.train import TrainArgs
from lingua.config.trust import found
from lingua.config.yaml_layers import read_yaml
from lingua.files import RunError
from lingua.model import huggingface
from lingua.model.tokenizer_json import SENTENCEPIECE_FILE, TOKENIZER_FILE
from lingua.run.find import find_runs, no_run
from lingua.tokenizer import build_tokenizer

PARAMS_FILE = "params.json"


def config_of(ckpt: str) -> Path:
    """Return the config of a checkpoint's model: beside it, or up to two folders above."""
    place = Path(without_ema(ckpt)[0]).expanduser()
    if not place.exists():
        place = Path(str(place).rpartition("@")[0] or place)
    if not place.exists():
        raise no_run(place)
    for folder in (place, *place.absolute().parents[:2]):
        for name in (CONFIG_FILE, PARAMS_FILE, huggingface.CONFIG_FILE):
            if (folder / name).is_file():
                return found(folder / name)
    if find_runs(place):
        raise no_run(place)
    raise ConfigError(f"ckpt={ckpt} has no {CONFIG_FILE} near it that describes its model; name one with config=FILE")


def described(config: Path, app: str = "") -> TrainArgs:
    """Return the args of a config, for this app or for the one that it names. Raises ConfigError."""
    schema = app_schema(app or choose_app(CommandLine(config=str(config))))
    if config.name == huggingface.CONFIG_FILE:
        return schema.model_validate(hugging_face_tree(config.parent, config.parent))
    return compose(str(config), [], _unnamed_family(config), schema).args


def phases_in(args: TrainArgs) -> list[tuple[int, PhaseArgs]]:
    """Return (last step, phase) for each phase of a frozen run."""
    ends = [read_until(phase.until) for phase in args.phases]
    is_frozen = all(end.unit == "steps" and not end.is_more for end in ends)
    return [(int(end.value), phase) for end, phase in zip(ends, args.phases, strict=True)] if is_frozen else []


def at_step(args: TrainArgs, step: int | None) -> TrainArgs:
    """Return the config of a frozen run for the checkpoint of a step, in the phase that made it."""
    made_by = next((phase for last, phase in phases_in(args) if step is not None and step <= last), None)
    theta = None if made_by is None else made_by.changes.get("model.rope_theta")
    if theta is None:
        return args
    return args.model_copy(update={"model": args.model.model_copy(update={"rope_theta": float(theta)})})


def step_of(ckpt: str | Path) -> int | None:
    """Return the step of a run's checkpoint at `ckpt`, or None for other weights."""
    try:
        return find_one(without_ema(ckpt)[0]).step
    except RunError:
        return None


def of_checkpoint(args: TrainArgs, ckpt: str | Path) -> TrainArgs:
    """Return `at_step` for a run's checkpoint at `ckpt`, or the config unchanged for other weights."""
    return at_step(args, step_of(ckpt)) if args.phases else args


def _unnamed_family(config: Path) -> list[str]:
    """Return the override that sets the model family of a config without one, or [].

    Meta Lingua has a program per family, so its configs do not name it. The family is the only one that has the keys
    which a Llama lacks; if several or none have them, validation reports the keys.
    """
    tree = read_yaml(config).tree
    model = tree.get("model")
    if not isinstance(model, dict) or "type" in model or {"model_type", "app"} & tree.keys():
        return []
    families = {name: family.model_fields.keys() - LlamaArgs.model_fields for name, family in parts("model").items()}
    own = model.keys() & {key for keys in families.values() for key in keys}
    fitting = [name for name, keys in families.items() if own and own <= keys]
    return [f"model.type={fitting[0]}"] if len(fitting) == 1 else []


def hugging_face_tree(folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Return the sections `model` and `data` for a Hugging Face folder. Raises ConfigError or RunError.

    `tokenizer_folder`: where its tokenizer is, or will be.
    """
    config = huggingface.read_config(folder)
    path = folder / huggingface.CONFIG_FILE
    model = huggingface.described_by(config, path, huggingface.translations()).model_section(config, path)
    name, file = "hf", TOKENIZER_FILE
    if not (folder / TOKENIZER_FILE).is_file() and (folder / SENTENCEPIECE_FILE).is_file():
        name, file = "sp", SENTENCEPIECE_FILE
    ends = huggingface.end_ids(config, folder)
    data: dict[str, Any] = {"tokenizer": {"name": name, "path": str(tokenizer_folder / file)}}
    if (folder / file).is_file():
        tokenizer = build_tokenizer(TokenizerArgs(name=name, path=str(folder / file)))  # pyright: ignore[reportArgumentType]
        data |= {"add_bos": tokenizer.bos_id is not None, "add_eos": tokenizer.eos_id is not None}
        ends = [] if ends == [tokenizer.eos_id] else ends
    if ends:
        data["tokenizer"]["end_ids"] = ends
    return {"model": model, "data": data}
