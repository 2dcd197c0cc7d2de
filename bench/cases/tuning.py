"""The tuning constants: the same exports with other values of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from bench.cases.slow_link import BANDWIDTH, ROUND_TRIP
from bench.data import PLAIN
from bench.measures import Sample
from bench.plan import Bench, Case, Plan
from bench.program import Source
from bench.serving import serving

MIB = 1 << 20

_NEAR: dict[str, Mapping[str, int | float]] = {
    "pbsfs as it is": {},
    "fetch budget 32 MiB": {"chunks.limits.fetch_budget": 32 * MIB},
    "fetch budget 64 MiB": {"chunks.limits.fetch_budget": 64 * MIB},
    "fetch budget 192 MiB": {"chunks.limits.fetch_budget": 192 * MIB},
    "window 16 MiB": {"chunks.limits.max_window": 16 * MIB},
    "window 32 MiB": {"chunks.limits.max_window": 32 * MIB},
    "window 128 MiB": {"chunks.limits.max_window": 128 * MIB},
    "growth 1": {"chunks.limits.growth": 1},
    "growth 16": {"chunks.limits.growth": 16},
    "gathered 64 KiB": {"sources.server.conversation.GATHER": MIB // 16},
    "gathered 8 MiB": {"sources.server.conversation.GATHER": 8 * MIB},
    "acknowledged 4 MiB": {"sources.server.limits.acknowledge_after": 4 * MIB},
}

_FAR: dict[str, Mapping[str, int | float]] = {
    "pbsfs as it is": {},
    "fetch budget 64 MiB, window 32 MiB": {
        "chunks.limits.fetch_budget": 64 * MIB,
        "chunks.limits.max_window": 32 * MIB,
    },
    "fetch budget 192 MiB, window 128 MiB": {
        "chunks.limits.fetch_budget": 192 * MIB,
        "chunks.limits.max_window": 128 * MIB,
    },
}


def _tuned(bench: Bench, source: Source, settings: Mapping[str, int | float], *options: str) -> Sample:
    words = [sys.executable, "-m", "bench.tuned"]
    words += [f"{name}={value}" for name, value in settings.items()]
    return bench.pbsfs.export(source, bench.data, PLAIN, "/dev/null", program=[*words, "--"], options=options)


def _near(bench: Bench, stack: ExitStack) -> Plan:
    server = bench.server(stack)

    def one(settings: Mapping[str, int | float]) -> Callable[[], Sample]:
        return lambda: _tuned(bench, server, settings)

    return Plan({name: one(settings) for name, settings in _NEAR.items()})


def _far(bench: Bench, stack: ExitStack) -> Plan:
    served = serving(bench.data.datastore, round_trip=ROUND_TRIP, bandwidth=BANDWIDTH)
    server = stack.enter_context(served).slow

    def one(settings: Mapping[str, int | float], *options: str) -> Callable[[], Sample]:
        return lambda: _tuned(bench, server, settings, *options)

    variants = {name: one(settings) for name, settings in _FAR.items()}
    for number in (1, 2, 3, 6):
        variants[f"{number} connections"] = one({}, f"--connections={number}")
    return Plan(variants)


CASES = (
    Case("tuning", "exports from a server with other values of the tuning constants", _near),
    Case("tuning-slow-link", "the same at 50 ms and 1 Gbit/s (simulated)", _far),
)
