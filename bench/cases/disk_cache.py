"""The cache on disk: a second export, one hit, and opening a cache with a million entries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import trio

from bench.data import PLAIN, check_room
from bench.limits import timed
from bench.measures import MIB, BenchError, Sample
from bench.plan import Bench, Case, Goal, Plan, Round, rate_of
from bench.serving import CHECKOUT
from pbsfs.base.names import Archive
from pbsfs.formats.blob import stored_limit
from pbsfs.sources.base import Source
from pbsfs.sources.cached.files import INNER, Kind, Name
from pbsfs.sources.cached.source import CachedSource
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.directory.source import DirectorySource

ENTRIES = 1_000_000
SIZE = 20 << 30
ROUNDS = 5
"""How often each chunk is read for the time of a hit."""

CACHED, DIRECTORY = "pbsfs export, cache on disk", "pbsfs export, directory"
HIT, READ = "pbsfs, hits of the cache on disk", "pbsfs, reads of chunks in a directory"
OPENED = "pbsfs, cache on disk opened"

_OPEN = """
import json, sys, time
from pathlib import Path
from pbsfs.sources.cached.files import Kind, Name
from pbsfs.sources.cached.store import DiskCache

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before, started = resident(), time.perf_counter()
cache = DiskCache(Path(sys.argv[1]), 1 << 40)
cache.prepare()
found = cache.get(Name(bytes.fromhex(sys.argv[2]), Kind.CHUNK), 1 << 20)
cache.put(Name(bytes(32), Kind.CHUNK), b"new", replace=True)
took = time.perf_counter() - started
print(json.dumps({"seconds": took, "bytes": resident() - before, "found": found is not None}))
"""


def _name(number: int) -> Name:
    return Name(hashlib.sha256(number.to_bytes(8, "big")).digest(), Kind.CHUNK)


def _many(directory: Path, count: int) -> Path:
    """A cache of `count` tiny entries."""
    place = directory / f"cache-{count}-1"
    if not (place / "made").exists():
        if place.exists():  # what an interrupted run has left
            shutil.rmtree(place)
        check_room(directory, count * 4500)
        DiskCache(place, 1 << 40).prepare()
        for shard in range(256):
            (place / INNER / f"{shard:02x}").mkdir()
        for number in range(count):
            name = _name(number)
            path = place / INNER / f"{name.shard:02x}" / str(name)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            os.truncate(path, 1)
        DiskCache(place, 1 << 40).contents()  # counts them
        (place / "made").touch()
    return place


def _work_of_a_hit(samples: Round) -> float | None:
    """What a busy machine changes least: both read from the kernel's page cache."""
    hit, read = samples[HIT].cpu, samples[READ].cpu
    return hit / read if hit and read else None


def _plan(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)
    place = bench.home / "disk-cache"
    stack.callback(shutil.rmtree, place, ignore_errors=True)
    cached = ("--cache-dir", str(place), "--cache-disk-size", str(SIZE))
    for _ in range(3):  # what the disk does not take in time is not kept
        pbsfs.export(server, data, PLAIN, "/dev/null", options=cached)
    index = data.index()
    digests = [index.digest(number) for number in data.data_chunks]
    limit = stored_limit(index.chunk_size or 0)
    archive = Archive(next(iter(data.datastore.joinpath(str(PLAIN)).glob("*.fidx"))).name)

    async def hits(source: Source) -> None:
        for digest in ROUNDS * digests:
            if await source.kept_chunk(digest, limit) is None:
                raise BenchError(f"chunk {digest.hex()} is not in the cache")

    async def reads(source: Source) -> None:
        for digest in ROUNDS * digests:
            await source.fetch_chunk(PLAIN, archive, digest, limit)

    directory = DirectorySource(data.datastore)
    behind = CachedSource(directory, DiskCache(place, SIZE), "bench")

    def opened() -> Sample:
        many = _many(bench.data_directory, ENTRIES // 100 if bench.quick else ENTRIES)
        words = [sys.executable, "-c", _OPEN, str(many), str(_name(7))]
        done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(done.stderr[-1000:])
        facts = json.loads(done.stdout)
        if not facts["found"]:
            raise BenchError("an entry is missing")
        return Sample(facts["seconds"], operations=1).with_counts(**{"MiB more": facts["bytes"] / MIB})

    return Plan(
        {
            CACHED: lambda: pbsfs.export(server, data, PLAIN, "/dev/null", options=cached),
            DIRECTORY: lambda: pbsfs.export(data.datastore, data, PLAIN, "/dev/null"),
            HIT: lambda: timed(lambda: trio.run(hits, behind), operations=ROUNDS * len(digests)),
            READ: lambda: timed(lambda: trio.run(reads, directory), operations=ROUNDS * len(digests)),
            OPENED: opened,
        },
        [
            Goal("second export: rate / that of a directory", rate_of(CACHED, DIRECTORY), 0.85),
            Goal("a hit: processor time / a read from a directory", _work_of_a_hit, 1.3, at_least=False),
            Goal("a hit: time / a read from a directory", rate_of(READ, HIT)),
            Goal("opening: seconds / 0.3", lambda s: s[OPENED].seconds / 0.3, 1.0, at_least=False),
            Goal("opening: MiB / 64", lambda s: s[OPENED].counts["MiB more"] / 64, 1.0, at_least=False),
        ],
    )


CASES = (Case("disk-cache", "the cache on disk: a second export, hits, and a million entries", _plan),)
