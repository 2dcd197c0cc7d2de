"""A server behind 50 ms and 1 Gbit/s."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from bench.data import PLAIN
from bench.limits import receive
from bench.measures import Sample, command
from bench.plan import Bench, Case, Goal, Plan, faster
from bench.serving import serving

ROUND_TRIP = 0.050
BANDWIDTH = 125e6
EXPORT, MODEL = "pbsfs export", "model: one chunk at a time"
ONE, FOUR = "limit: TLS alone, one connection", "limit: TLS alone, four connections"

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def _slow(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = stack.enter_context(serving(data.datastore, round_trip=ROUND_TRIP, bandwidth=BANDWIDTH))

    def one_at_a_time() -> Sample:
        words = [sys.executable, "-m", "bench.model", str(PLAIN)]
        environment = pbsfs.environment(server.slow) | {"PYTHONPATH": str(CHECKOUT)}
        return command(words, size=data.data_bytes, environment=environment, server=server.pid)

    def noted(sample: Sample) -> Sample:
        return sample.with_counts(**{"part of the link": data.stored / sample.seconds / BANDWIDTH})

    return Plan(
        {
            EXPORT: lambda: noted(pbsfs.export(server.slow, data, PLAIN, "/dev/null")),
            ONE: lambda: noted(receive(server.slow, data)),
            FOUR: lambda: noted(receive(server.slow, data, connections=4)),
            MODEL: lambda: noted(one_at_a_time()),
        },
        [
            Goal(
                "export: stored bytes a second / the link's",
                lambda s: s[EXPORT].counts["part of the link"],
                0.8,
            ),
            Goal("plain TLS on four connections / the link's", lambda s: s[FOUR].counts["part of the link"]),
            Goal("times as fast as one chunk at a time", faster(EXPORT, MODEL)),
        ],
    )


CASES = (Case("slow-link", "a whole image from a server at 50 ms and 1 Gbit/s (simulated)", _slow),)
