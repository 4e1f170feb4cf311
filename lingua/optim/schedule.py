r"""Compute the learning rate of every step, as a pure function of the config, the step and the length of the run.

There is no state to save: a resumed run, or one whose `steps` was raised, asks for its current step. The curves are
Meta Lingua's with these corrections: cosine cycles are smooth after a warmup too, the last wsd cycle ends with the run,
inv_sqrt has its final annealing, constant warms up too. Torch-free.

    cosine   /\__      wsd   /----\      inv_sqrt   /\_____      linear   /\        (all of them after a warmup)
            /    \__        /      \               /       \             /   \__
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lingua.config.base import ConfigError
from lingua.config.keys.optim import OptimArgs

Schedule = Callable[[OptimArgs, int, int], float]
"""(args, step, n_steps) -> share of the peak; called only for warmup <= step <= n_steps."""

SCHEDULES: dict[str, Schedule] = {}


def register_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Return a decorator that registers a function as `optim.scheduler: <name>`. Raises ValueError for a taken name."""

    def add(schedule: Schedule) -> Schedule:
        taken = SCHEDULES.setdefault(name, schedule)
        if (taken.__module__, taken.__qualname__) != (schedule.__module__, schedule.__qualname__):
            raise ValueError(f"schedule {name!r} is already {taken.__module__}.{taken.__qualname__}")
        SCHEDULES[name] = schedule
        return schedule

    return add


def lr_at(args: OptimArgs, step: int, n_steps: int) -> float:
    """Return the learning rate of update number step + 1 (step counts from 0) in a run of n_steps updates."""
    schedule = SCHEDULES.get(args.scheduler)
    if schedule is None:
        raise ConfigError(f"optim.scheduler {args.scheduler!r} is unknown; known: {', '.join(sorted(SCHEDULES))}")
    if step < args.warmup:
        return args.lr * step / args.warmup
    return args.lr * schedule(args, min(step, max(n_steps, args.warmup)), n_steps)


def rates_of_longer(args: OptimArgs, step: int, n_steps: int, longer: int) -> tuple[float, float] | None:
    """Return the rates of the next step in runs of both lengths if the longer one's is over 5% higher, else None."""
    rates = lr_at(args, step, n_steps), lr_at(args, step, longer)
    return rates if rates[1] > 1.05 * rates[0] else None


def _progress(args: OptimArgs, step: int, n_steps: int) -> float:
    """Return the progress from the end of the warmup to the end of the run, in [0, 1]."""
    return min(1.0, (step - args.warmup) / max(1, n_steps - args.warmup))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


@register_schedule("constant")
def constant(args: OptimArgs, step: int, n_steps: int) -> float:
    return 1.0


@register_schedule("linear")
def linear(args: OptimArgs, step: int, n_steps: int) -> float:
    return _between(1.0, args.lr_min_ratio, _progress(args, step, n_steps))


@register_schedule("linear_to_zero")
def linear_to_zero(args: OptimArgs, step: int, n_steps: int) -> float:
    return 1.0 - _progress(args, step, n_steps)


@register_schedule("inv_sqrt")
def inv_sqrt(args: OptimArgs, step: int, n_steps: int) -> float:
    """Decay as (warmup / step) ** exp_factor, then linearly over the last annealing_step steps."""

    def decayed(at: int) -> float:
        start = max(1, args.warmup)
        return max((start / max(at, start)) ** args.exp_factor, args.lr_min_ratio)

    annealing_from = max(args.warmup, n_steps - args.annealing_step)
    if step <= annealing_from:
        return decayed(step)
    progress = min(1.0, (step - annealing_from) / (n_steps - annealing_from))
    return _between(decayed(annealing_from), args.lr_min_ratio, progress)


@register_schedule("cosine")
def cosine(args: OptimArgs, step: int, n_steps: int) -> float:
    """Decay by half a cosine per cycle; each cycle restarts at the peak."""
    progress = _progress(args, step, n_steps)
    cycles = progress / args.cycle_length
    # The very end belongs to the cycle that ends there.
    within = cycles - math.floor(cycles) if progress < 1 else cycles - math.ceil(cycles) + 1
    return args.lr_min_ratio + (1 - args.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * within**args.cosine_theta))


@register_schedule("wsd")
def wsd(args: OptimArgs, step: int, n_steps: int) -> float:
    """Stay at the peak, then decay (WSD-S, arXiv 2410.05192) so that the inverse of the rate grows linearly.

    With cycle_length < 1 the decay is repeated: the cycle that ends at step e decays over its last
    decay_fraction * e steps, and the next one continues at the peak.
    """
    cycle = max(1, int(n_steps * args.cycle_length))
    cycle_start = min(step, n_steps - 1) // cycle * cycle
    cycle_end = min(cycle_start + cycle, n_steps)
    decay_steps = int(cycle_end * args.decay_fraction)
    into_decay = step - max(cycle_end - decay_steps, cycle_start)
    if decay_steps == 0 or into_decay <= 0:
        return 1.0
    progress = min(1.0, into_decay / min(decay_steps, cycle_end - cycle_start))
    if args.lr_min_ratio == 0:  # it has no inverse: decay linearly
        return 1.0 - progress
    return 1 / _between(1.0, 1 / args.lr_min_ratio, progress)
