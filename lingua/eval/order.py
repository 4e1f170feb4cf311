"""What an evaluation's command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import compose, ignored_keys
from lingua.config.frozen import CONFIG_FILE
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.yaml_layers import stack_layers
from lingua.train.describe import config_of, described


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    place: str
    """The checkpoint, or the run to follow."""
    follow: bool
    run_config: Path
    """Config that tells the model."""
    measures: str | None
    """Config that says what is measured; None: the run's own."""
    overlays: list[str]
    overrides: list[str]
    app: str
    """Package of the app whose model is evaluated."""

    def compose(self) -> tuple[TrainArgs, EvalArgs]:
        """Config of the run, and what to measure. Raises ConfigError."""
        if self.measures is None and self.run_config.suffix == ".json":  # nothing of ours stands beside it
            run_args = described(self.run_config)
            args = compose(None, self.overlays, self.overrides, EvalArgs).args
        elif self.measures is None:
            overrides = [f"eval.{word}" for word in self.overrides]
            run_args = compose(str(self.run_config), self.overlays, overrides, app_schema(self.app)).args
            args = run_args.eval or EvalArgs()
        else:
            run_args = described(self.run_config)
            args = compose(self.measures, self.overlays, self.overrides, EvalArgs).args
        if self.follow and args.dump_dir:
            raise ConfigError(f"eval.dump_dir is {args.dump_dir}: results go to {self.place}/evals; take it out")
        return run_args, args


def read_command_line(line: CommandLine) -> Order:
    """Raises ConfigError."""
    own, overrides = {}, []
    for word in line.overrides:
        name, _, value = word.partition("=")
        if name in ("ckpt", "ckpt_dir", "follow", "app"):
            own[name] = value
        else:
            overrides.append(word)
    place = own.get("follow") or own.get("ckpt") or own.get("ckpt_dir")
    if not place:
        raise ConfigError("command line: nothing to evaluate; write ckpt=RUN_OR_FOLDER, or follow=RUN")
    if "follow" in own and not (Path(place) / CONFIG_FILE).is_file():
        raise ConfigError(f"follow={place}: no run, it has no {CONFIG_FILE}; start the run first")
    is_of_run = line.config is not None and not is_about_measures(line.config)
    run_config = Path(line.config) if is_of_run and line.config else config_of(place)
    return Order(
        place=place,
        follow="follow" in own,
        run_config=run_config,
        measures=None if is_of_run else line.config,
        overlays=line.overlays,
        overrides=overrides,
        app=own.get("app") or choose_app(CommandLine(config=str(run_config))),
    )


def is_about_measures(config: str) -> bool:
    """Whether a config holds the section `eval` alone, not a whole run."""
    known = EvalArgs.model_fields.keys() | {key[0] for key in ignored_keys(EvalArgs)}
    return stack_layers(config, [], [], EvalArgs).tree.keys() <= known
