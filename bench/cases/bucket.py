"""A datastore in a bucket: on this machine, and behind 30 ms and 1 Gbit/s."""

from __future__ import annotations

from contextlib import ExitStack

from bench.cases.growth import GROUPS, many_store
from bench.data import PLAIN
from bench.limits import receive
from bench.measures import Sample, command
from bench.plan import Bench, Case, Goal, Plan, Round
from bench.program import PBSFS
from bench.store import storing

ROUND_TRIP = 0.030
BANDWIDTH = 125e6
BUCKET, SLOW, LIST = "pbsfs export", "pbsfs export, slow link", "pbsfs ls"
DIRECTORY, RECEIVE = "pbsfs export from the directory", "limit: TLS alone"

EACH = 100
"""Snapshots of each group: 10,000 in all."""

FILES_MORE = 4
"""Files of a snapshot that the store of many lacks: real ones have some six."""


def _of_directory_and_tls(samples: Round) -> float:
    return (samples[DIRECTORY].seconds + samples[RECEIVE].seconds) / samples[BUCKET].seconds


def _without_the_store(samples: Round) -> float:
    """The same in processor time: the object store takes its part of the same cores."""
    cpu = (samples[DIRECTORY].cpu or 0) + (samples[RECEIVE].cpu or 0)
    return cpu / (samples[BUCKET].cpu or 1)


def _export(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    store = stack.enter_context(storing(data.datastore))
    far = stack.enter_context(storing(data.datastore, round_trip=ROUND_TRIP, bandwidth=BANDWIDTH))
    server = bench.server(stack)

    def slow() -> Sample:
        sample = pbsfs.export(far, data, PLAIN, "/dev/null")
        return sample.with_counts(**{"part of the link": data.stored / sample.seconds / BANDWIDTH})

    return Plan(
        {
            BUCKET: lambda: pbsfs.export(store, data, PLAIN, "/dev/null"),
            DIRECTORY: lambda: pbsfs.export(data.datastore, data, PLAIN, "/dev/null"),
            RECEIVE: lambda: receive(server.access, data),
            SLOW: slow,
        },
        [
            Goal("seconds from the directory + of TLS alone / from the bucket", _of_directory_and_tls, 0.8),
            Goal("the same in processor seconds, without the object store's", _without_the_store),
            Goal(
                "30 ms: stored bytes a second / the link's",
                lambda samples: samples[SLOW].counts["part of the link"],
                0.8,
            ),
        ],
    )


def _list(bench: Bench, stack: ExitStack) -> Plan:
    pbsfs = bench.pbsfs
    each = EACH // 50 if bench.quick else EACH
    directory = many_store(bench.data_directory, each)
    store = stack.enter_context(
        storing(directory, round_trip=ROUND_TRIP, bandwidth=BANDWIDTH, more=FILES_MORE)
    )
    environment = pbsfs.environment(store)

    def listed(*words: str) -> Sample:
        return command(
            [PBSFS, "ls", "--fingerprint", store.fingerprint, *words],
            environment=environment,
            server=store.pid,
        )

    return Plan(
        {LIST: lambda: listed("vm"), f"{LIST}, one group": lambda: listed("vm/100")},
        [
            Goal(
                f"seconds to list {GROUPS} groups of {each} snapshots / 2",
                lambda samples: samples[LIST].seconds / 2,
                1.0,
                at_least=False,
            )
        ],
    )


CASES = (
    Case("bucket", "a whole image from a bucket here, and at 30 ms and 1 Gbit/s (simulated)", _export),
    Case("bucket-list", "the first listing of ten thousand snapshots in a bucket at 30 ms", _list),
)
