"""More cores than this machine has: exports and mounts whose decoders sleep instead of computing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.data import CHUNK, DAY, INDEX, PLAIN, TIME, Data, check_room
from bench.measures import GIB, BenchError, Sample
from bench.plan import Bench, Case, Goal, Plan, Round, count_of
from bench.program import Source
from bench.serving import serving
from pbsfs.base.names import MANIFEST, Archive, Snapshot
from pbsfs.formats import blob, index, manifest
from pbsfs.formats.manifest import CryptMode, ManifestFile
from pbsfs.testing.writer import DatastoreWriter

DECODERS = 1, 2, 4, 8, 16
SECONDS = 0.0033
"""What decoding 4 MiB takes on one core: 1.27 GB/s."""

WANTED = 2.5e9
"""Bytes of decoded data a second that only decoding may prevent."""

LOOP = "loop s/GiB"
"""Processor seconds of the loop's thread for 1 GiB of decoded data."""

READERS = 4
IMAGE_BYTES = 4 * GIB


CONTENTS = 32
"""Stored chunks of each size that really differ. All others are links to them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Images in chunks of `chunk` bytes, of which `different` differ: more than the cache holds."""

    name: str
    chunk: int
    different: int
    first: int

    def snapshot(self, number: int) -> Snapshot:
        """The one that reader `number` reads."""
        return Snapshot(PLAIN.group, TIME + (self.first + number) * DAY)


USUAL = Kind("4 MiB", CHUNK, 128, 0)
SMALL = Kind("0.5 MiB", CHUNK // 8, 1024, READERS)


def _store(directory: Path) -> Path:
    """A datastore with an image of either kind for each reader. A chunk is stored in 30 % of its size."""
    store = directory / "cores-2"
    if (store / "made").exists():
        return store
    if store.exists():  # what an interrupted run has left
        shutil.rmtree(store)
    check_room(directory, sum(kind.chunk * CONTENTS for kind in (USUAL, SMALL)) // 3)
    writer = DatastoreWriter(store)
    for kind in (USUAL, SMALL):
        source = random.Random(kind.chunk)
        stored: list[Path] = []
        for number in range(READERS):
            digests = [source.randbytes(32) for _ in range(kind.different)]
            for digest in digests:
                path = writer.chunk_path(digest)
                path.parent.mkdir(exist_ok=True)
                if len(stored) < CONTENTS:
                    path.write_bytes(blob.encode(source.randbytes(kind.chunk * 3 // 10), compress=False))
                    stored.append(path)
                else:
                    os.link(source.choice(stored), path)
            _add_snapshot(writer, kind.snapshot(number), kind.chunk, digests)
    (store / "made").touch()
    return store


def _add_snapshot(writer: DatastoreWriter, snapshot: Snapshot, chunk: int, digests: list[bytes]) -> None:
    """An image of these chunks, again and again."""
    named = b"".join(digests) * (IMAGE_BYTES // chunk // len(digests))
    stored, csum = index.encode_fixed([named], size=IMAGE_BYTES, chunk_size=chunk, ctime=TIME)
    place = writer.snapshot_path(snapshot)
    place.mkdir(parents=True)
    (place.parent / "owner").write_text("root@pam\n")
    (place / INDEX).write_bytes(stored)
    text = manifest.encode(
        backup_type=snapshot.group.type,
        backup_id=snapshot.group.id,
        backup_time=snapshot.time,
        files=(ManifestFile(Archive(INDEX), CryptMode.NONE, IMAGE_BYTES, csum),),
        unprotected={},
        key=None,
    )
    (place / MANIFEST.filename).write_bytes(blob.encode(text))


def _cores(bench: Bench, stack: ExitStack) -> Plan:
    store = _store(bench.data_directory)
    data = Data(store, bench.data.size, (), 0, 0)
    server = stack.enter_context(serving(store))
    note = bench.home / "note.json"

    def program(decoders: int) -> list[str | Path]:
        return [sys.executable, "-m", "bench.simulated", str(decoders), str(SECONDS), note, "--"]

    def noted(sample: Sample, kind: Kind, decoders: int) -> Sample:
        """`sample`, and what the program has noted."""
        found = json.loads(note.read_text())
        if sample.size == 0:  # of a command: its start does not count
            sample = replace(sample, seconds=found["seconds"], size=found["chunks"] * kind.chunk)
        ideal = sample.rate / (decoders * CHUNK / SECONDS)
        return sample.with_counts(ideal=ideal, **{LOOP: found["loop"] * GIB / sample.size})

    def export(source: Source, kind: Kind, decoders: int) -> Sample:
        sample = bench.pbsfs.export(source, data, kind.snapshot(0), "/dev/null", program=program(decoders))
        return noted(sample, kind, decoders)

    def mount(source: Source, kind: Kind, decoders: int) -> Sample:
        share = IMAGE_BYTES // READERS
        words = ["bs=1M", f"count={share >> 20}", "iflag=direct", "status=none"]

        def read() -> None:
            started = [
                subprocess.Popen(["dd", f"if={mounted.image(kind.snapshot(number))}", "of=/dev/null", *words])
                for number in range(READERS)
            ]
            if {process.wait() for process in started} != {0}:
                raise BenchError("dd failed")

        with bench.pbsfs.mounted(source, data, program=program(decoders)) as mounted:
            sample = mounted.watched.measure(read, size=share * READERS)
        return noted(sample, kind, decoders)

    def variant(
        run: Callable[[Source, Kind, int], Sample], source: Source, kind: Kind, decoders: int
    ) -> Callable[[], Sample]:
        return lambda: run(source, kind, decoders)

    def part_of_wanted(name: str) -> Callable[[Round], float]:
        return lambda samples: samples[name].rate / WANTED

    variants: dict[str, Callable[[], Sample]] = {}
    goals: list[Goal] = []
    for title, run in (("export", export), (f"mount, {READERS} readers", mount)):
        for place, source, kind in (
            ("directory", store, USUAL),
            ("directory", store, SMALL),
            ("server", server, USUAL),
        ):
            what = f"{title}, {place}, {kind.name}"
            for decoders in DECODERS:
                variants[f"pbsfs {what}, {decoders} decoders"] = variant(run, source, kind, decoders)
            most = f"{what}, {max(DECODERS)} decoders"
            goals.append(
                Goal(
                    f"{most}: the loop's seconds for 1 GiB (0.43 are 2.5 GB/s)",
                    count_of(f"pbsfs {most}", LOOP),
                    GIB / WANTED,
                    at_least=False,
                )
            )
            # All that copies or receives shares the cores of this machine with the rest: no target there.
            target = 1.0 if run is export and isinstance(source, Path) else None
            goals.append(Goal(f"{most}: part of 2.5 GB/s", part_of_wanted(f"pbsfs {most}"), target))
    return Plan(variants, goals)


CASES = (
    Case("cores", "exports and mounts with up to 16 decoders, which sleep instead of computing", _cores),
)
