"""Small random reads: cached, of holes, and of what has to be fetched first."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.bare import BareSession
from bench.data import CHUNK, INDEX, PLAIN
from bench.measures import MIB, Sample
from bench.plan import CACHE, Bench, Case, Goal, Plan, rate_of
from bench.program import Nbd
from bench.readers import BLOCK, NbdClient, Region, random_file_reads, random_nbd_reads

TRIVIAL = Path(__file__).resolve().parent.parent / "trivial_plugin.py"

MISSES = 24
"""Reads of a chunk that is not there yet, in each round."""


def _warm(read: Callable[[int], object], region: Region) -> None:
    for offset in range(region.offset, region.offset + region.length, MIB):
        read(offset)


def _direct(path: Path) -> tuple[int, Callable[[int], object]]:
    """A descriptor, and reads of 4 KiB by it past the kernel's page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, BLOCK)
    return fd, lambda offset: os.preadv(fd, [page], offset)


def _through_mount(bench: Bench, stack: ExitStack) -> Plan:
    data = bench.data
    server = bench.server(stack)
    mount = stack.enter_context(bench.pbsfs.mounted(server, data))
    image = mount.image(PLAIN)
    cached = Region(0, min(data.first_data_bytes, 128 * MIB))
    hole = Region(*data.first_hole)
    seconds = 2 if bench.quick else 5
    fd, read = _direct(image)
    stack.callback(os.close, fd)

    def reads(region: Region, *, direct: bool) -> Callable[[], Sample]:
        def run() -> Sample:
            if region is cached:
                _warm(read, region)
            if not direct:
                with image.open("rb", buffering=0) as file:  # into the kernel's page cache
                    file.seek(region.offset)
                    while file.tell() < region.offset + region.length:
                        file.read(MIB)
            return random_file_reads(image, region, seconds, mount.watched, direct=direct)

        return run

    return Plan(
        {
            "pbsfs, cached": reads(cached, direct=True),
            "pbsfs, holes": reads(hole, direct=True),
            "pbsfs, in the kernel's page cache": reads(cached, direct=False),
            "limit: the raw file, page cache": lambda: random_file_reads(
                data.raw, cached, seconds, mount.watched, direct=False
            ),
        },
        [
            Goal("cached reads a second / 25,000", lambda s: s["pbsfs, cached"].rate / 25_000, 1.0),
            Goal("holes: rate / that of cached reads", rate_of("pbsfs, holes", "pbsfs, cached"), 0.95),
        ],
    )


def _by_nbd(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    nbd = stack.enter_context(pbsfs.nbd(server, PLAIN, data))
    trivial = stack.enter_context(pbsfs.nbd(server, PLAIN, data, python=TRIVIAL))
    memory = stack.enter_context(pbsfs.nbdkit(["memory", "1G"], pbsfs.environment(server)))
    raw = stack.enter_context(pbsfs.nbdkit(["file", str(data.raw)], pbsfs.environment(server)))
    cached = Region(0, min(data.first_data_bytes, 128 * MIB))
    hole = Region(*data.first_hole)
    seconds = 2 if bench.quick else 5
    client = NbdClient(nbd.socket)
    stack.callback(client.close)

    def reads(region: Region, depth: int) -> Callable[[], Sample]:
        def run() -> Sample:
            if region is cached:
                _warm(lambda offset: client.read(offset, BLOCK), region)
            return random_nbd_reads(nbd.uri, region, seconds, nbd.watched, depth=depth)

        return run

    def limit(other: Nbd, depth: int) -> Callable[[], Sample]:
        return lambda: random_nbd_reads(other.uri, cached, seconds, other.watched, depth=depth)

    return Plan(
        {
            "pbsfs, cached": reads(cached, 1),
            "pbsfs, cached, 16 under way": reads(cached, 16),
            "pbsfs, holes": reads(hole, 1),
            "limit: trivial Python plugin": limit(trivial, 1),
            "limit: trivial Python plugin, 16 under way": limit(trivial, 16),
            "limit: nbdkit memory": limit(memory, 1),
            "limit: nbdkit file": limit(raw, 1),
        },
        [
            Goal("cached reads a second / 20,000", lambda s: s["pbsfs, cached"].rate / 20_000, 1.0),
            Goal(
                "cached reads a second, 16 under way / 20,000",
                lambda s: s["pbsfs, cached, 16 under way"].rate / 20_000,
                1.0,
            ),
            Goal("holes: rate / that of cached reads", rate_of("pbsfs, holes", "pbsfs, cached"), 0.95),
            Goal(
                "part of the trivial plugin's rate", rate_of("pbsfs, cached", "limit: trivial Python plugin")
            ),
            Goal("part of the rate of nbdkit's own plugin", rate_of("pbsfs, cached", "limit: nbdkit memory")),
        ],
    )


def _misses(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    mount = stack.enter_context(pbsfs.mounted(server, data, "--cache-size", "64M"))
    nbd = stack.enter_context(pbsfs.nbd(server, PLAIN, data, "cache_size=64M"))
    session = stack.enter_context(BareSession(server.access, PLAIN))
    index = session.index(INDEX)
    client = NbdClient(nbd.socket)
    stack.callback(client.close)
    fd, read = _direct(mount.image(PLAIN))
    stack.callback(os.close, fd)
    numbers = list(data.data_chunks)
    random.Random(4).shuffle(numbers)
    # Round-robin over all: by the time that a chunk comes again, the small cache has forgotten it.
    turns = dict.fromkeys(("mount", "nbd", "bare"), 0)

    def chunks(who: str) -> list[int]:
        start = turns[who]
        turns[who] += MISSES
        return [numbers[(start + step) % len(numbers)] for step in range(min(MISSES, len(numbers)))]

    def each(who: str, work: Callable[[int], object]) -> Callable[[], Sample]:
        def run() -> Sample:
            work(numbers[-1])  # what only the first one pays
            server.counts()
            took: list[float] = []

            def all_of_them() -> None:
                for number in chunks(who):
                    started = time.perf_counter()
                    work(number)
                    took.append(time.perf_counter() - started)

            watched = {"mount": mount.watched, "nbd": nbd.watched}.get(who)
            sample = watched.measure(all_of_them) if watched else None
            if sample is None:
                all_of_them()
            requests = server.counts().requests
            return Sample(
                seconds=statistics.median(took),
                operations=1,
                cpu=sample.cpu if sample else None,
                peak=sample.peak if sample else None,
                counts={"requests for each read": requests / len(took), "worst ms": max(took) * 1000},
            )

        return run

    place = 1 * MIB + 8192
    return Plan(
        {
            "pbsfs, mount": each("mount", lambda number: read(number * CHUNK + place)),
            "pbsfs, NBD": each("nbd", lambda number: client.read(number * CHUNK + place, BLOCK)),
            "limit: bare fetch and decode": each("bare", lambda number: session.decoded(index, number, None)),
        },
        [
            Goal(
                f"{door}: time of a miss / bare fetch and decode",
                lambda s, name=name: s[name].seconds / s["limit: bare fetch and decode"].seconds,  # type: ignore[misc]
                1.2,
                at_least=False,
            )
            for door, name in (("mount", "pbsfs, mount"), ("NBD", "pbsfs, NBD"))
        ],
    )


def _working_set(bench: Bench, stack: ExitStack) -> Plan:
    """As many chunks as fit the cache, read at random again and again: each is fetched once, and no other."""
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    source = random.Random(5)
    fitting = min(CACHE // CHUNK, len(data.data_chunks))
    numbers = source.sample(data.data_chunks, fitting)
    order = [number for _ in range(20) for number in source.sample(numbers, len(numbers))]
    places = [number * CHUNK + source.randrange(CHUNK // BLOCK) * BLOCK for number in order]

    def counted(read: Callable[[int], object]) -> Sample:
        server.counts()
        started = time.perf_counter()
        for place in places:
            read(place)
        seconds = time.perf_counter() - started
        counts = server.counts()
        return Sample(seconds, operations=len(places)).with_counts(
            **{"chunks fetched": counts.requests, "of them needed": fitting, "the same one": counts.most}
        )

    def through_mount() -> Sample:
        with pbsfs.mounted(server, data) as mount:
            fd, read = _direct(mount.image(PLAIN))
            try:
                return counted(read)
            finally:
                os.close(fd)

    def by_nbd() -> Sample:
        with pbsfs.nbd(server, PLAIN, data) as nbd:
            client = NbdClient(nbd.socket)
            try:
                return counted(lambda offset: client.read(offset, BLOCK))
            finally:
                client.close()

    return Plan(
        {"pbsfs, mount": through_mount, "pbsfs, NBD": by_nbd},
        [
            goal
            for name in ("pbsfs, mount", "pbsfs, NBD")
            for goal in (
                Goal(
                    f"{name}: how often the same chunk was fetched",
                    lambda s, name=name: s[name].counts["the same one"],  # type: ignore[misc]
                    1.0,
                    at_least=False,
                ),
                Goal(
                    f"{name}: chunks fetched / chunks read (more: prefetch)",
                    lambda s, name=name: s[name].counts["chunks fetched"] / s[name].counts["of them needed"],  # type: ignore[misc]
                    1.0,
                    at_least=False,
                ),
            )
        ],
        once=True,
    )


CASES = (
    Case("random-mount", "random reads of 4 KiB, one at a time, through a mount of a server", _through_mount),
    Case("random-nbd", "random reads of 4 KiB by NBD, from a server", _by_nbd),
    Case("random-misses", "a read of 4 KiB of a chunk that has to be fetched, from a server", _misses),
    Case("working-set", "random reads of as many chunks as fit the cache: what is fetched", _working_set),
)
