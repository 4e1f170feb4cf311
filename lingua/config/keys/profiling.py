"""Keys of `profiling:`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Text


class ProfilerArgs(Args):
    """Windows of steps to profile. Light: time and memory of each step as jsonl, on every rank. Heavy: a torch trace,
    and on a GPU a memory snapshot; steps are several times slower."""

    run: bool = False
    """Profile the windows below. false: only those that `lingua profile` or a signal asks for."""
    trace_folder: Text = "profiling"
    """Folder of the files, inside the run folder."""
    light_warmup: Annotated[int, Field(ge=0)] = 10
    """Steps of an attempt before the light window."""
    light_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of the light window. 0: none."""
    mem_warmup: Annotated[int, Field(ge=0)] = 100
    """Steps of an attempt before the memory window."""
    mem_steps: Annotated[int, Field(ge=0)] = 2
    """Steps of the memory window. 0: none."""
    profile_warmup: Annotated[int, Field(ge=0)] = 102
    """Steps of an attempt before the trace window."""
    profile_steps: Annotated[int, Field(ge=0)] = 2
    """Steps of the trace window. 0: none."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps from the start of a window to the next of its kind. 0: one of each kind per attempt."""
    ranks: list[Annotated[int, Field(ge=0)]] | Literal["all"] = [0]
    """Ranks that write traces and memory snapshots."""
    signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] | None = "SIGUSR1"
    """Signal that opens a light and a heavy window of profile_steps, at least one. Null: none. `signals` and
    stop_signals take precedence."""

    @model_validator(mode="after")
    def _windows_end(self) -> Self:
        longest = max(self.mem_steps, self.profile_steps)
        if 0 < self.every <= longest:
            raise ValueError(f"every {self.every} leaves no step between heavy windows of {longest}; raise every")
        return self
