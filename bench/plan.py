"""What a benchmark consists of, and how it is run: variants in turn, round after round, goals as ratios."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench import data
from bench.limits import cores
from bench.measures import MIB, Sample
from bench.program import Pbsfs
from bench.serving import RunningServer, serving

CACHE = 256 * MIB
"""The default of what a mount and nbdkit keep."""

MORE_MEMORY = 150 * MIB

Round = Mapping[str, Sample]
"""One sample of each variant."""

OWN = "pbsfs"
"""What the names of variants begin with that are pbsfs itself."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio, from the samples of one round; None where it can't be told. `target` None: only to be seen."""

    text: str
    ratio: Callable[[Round], float | None]
    target: float | None = None
    at_least: bool = True


@dataclass(slots=True)
class Plan:
    """`variants`: what is measured, each side by side with the others. `once`: a single round is enough."""

    variants: dict[str, Callable[[], Sample]]
    goals: list[Goal] = field(default_factory=list)
    once: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark. `plan` prepares what its variants need, which lasts as long as the stack."""

    name: str
    measures: str
    plan: Callable[[Bench, ExitStack], Plan]


@dataclass(frozen=True, slots=True)
class Peers:
    """The others, where they are installed: the vendor's client and library, and the C plugin for nbdkit."""

    client: Path | None = None
    library: Path | None = None
    c_plugin: Path | None = None


@dataclass
class Bench:
    """What all benchmarks share. `home`: an empty directory; `scratch`: where copies are written."""

    data_directory: Path
    home: Path
    scratch: Path
    quick: bool
    repeat: int
    peers: Peers

    def __post_init__(self) -> None:
        self.pbsfs = Pbsfs(self.home)
        self.cores = cores()

    @cached_property
    def data(self) -> data.Data:
        print("making the data, or looking for it ...", file=sys.stderr, flush=True)
        return data.make(self.data_directory, quick=self.quick)

    def server(self, stack: ExitStack) -> RunningServer:
        """A server of the data."""
        return stack.enter_context(serving(self.data.datastore))


@dataclass(slots=True)
class GoalResult:
    """`ratios`: one for each round. `met`: None where there is no target or no ratio."""

    goal: Goal
    ratios: list[float]

    @property
    def median(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        if self.median is None or self.goal.target is None:
            return None
        return self.median >= self.goal.target if self.goal.at_least else self.median <= self.goal.target


@dataclass(slots=True)
class Result:
    """`samples`: of each variant, by round. `error`: why there are no more."""

    case: Case
    samples: dict[str, list[Sample]]
    goals: list[GoalResult]
    seconds: float
    error: str | None = None


def run_case(bench: Bench, case: Case) -> Result:
    started = time.monotonic()
    rounds: list[dict[str, Sample]] = []
    plan = Plan({})
    error: str | None = None
    try:
        with ExitStack() as stack:
            plan = case.plan(bench, stack)
            for number in range(1 if plan.once else bench.repeat):
                rounds.append({})
                # In the opposite order every other time: what else the machine does hits all alike.
                for name in list(plan.variants)[:: -1 if number % 2 else 1]:
                    print(f"  {case.name}: {name} ...", file=sys.stderr, flush=True)
                    rounds[-1][name] = plan.variants[name]()
    except Exception as failure:  # the others go on, and what was measured is kept
        error = f"{type(failure).__name__}: {failure}"
    samples = {name: [r[name] for r in rounds if name in r] for name in plan.variants}
    goals = [_judged(goal, rounds) for goal in [*plan.goals, *_memory_goals(rounds)]]
    return Result(case, samples, goals, time.monotonic() - started, error)


def _judged(goal: Goal, rounds: list[dict[str, Sample]]) -> GoalResult:
    ratios: list[float] = []
    for samples in rounds:
        try:
            ratio = goal.ratio(samples)
        except (KeyError, ZeroDivisionError):  # a variant that is not there: no peer, or a failure
            continue
        if ratio is not None:
            ratios.append(ratio)
    return GoalResult(goal, ratios)


def _memory_goals(rounds: list[dict[str, Sample]]) -> list[Goal]:
    def ratio(samples: Round) -> float | None:
        peaks = [sample.peak for name, sample in samples.items() if name.startswith(OWN) and sample.peak]
        return max(peaks) / (CACHE + MORE_MEMORY) if peaks else None

    if any(ratio(samples) for samples in rounds):
        return [Goal("memory: largest resident size / (cache + 150 MiB)", ratio, 1.0, at_least=False)]
    return []


def faster(name: str, peer: str) -> Callable[[Round], float | None]:
    """How many times as fast the one is as the other, by time."""
    return lambda samples: samples[peer].seconds / samples[name].seconds


def rate_of(name: str, limit: str) -> Callable[[Round], float | None]:
    """The one's rate as a part of the other's."""
    return lambda samples: samples[name].rate / samples[limit].rate


def count_of(name: str, count: str) -> Callable[[Round], float | None]:
    return lambda samples: samples[name].counts.get(count)
