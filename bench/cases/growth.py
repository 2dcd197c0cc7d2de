"""What gets large: an image of 16 TiB, a thousand open files, a hundred thousand snapshots."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from bench.data import CHUNK, INDEX, PLAIN, check_room
from bench.measures import MIB, BenchError, Sample, memory_of
from bench.plan import Bench, Case, Goal, Plan
from bench.serving import CHECKOUT, serving
from pbsfs.base.names import MANIFEST, ROOT_NAMESPACE, Archive, Group, Snapshot
from pbsfs.formats import blob, index, manifest
from pbsfs.formats.blob import chunk_digest
from pbsfs.formats.manifest import CryptMode, ManifestFile
from pbsfs.testing.writer import DatastoreWriter

LARGE, SMALL = 16 << 40, 1 << 30
TIME = 1_600_000_000
LARGE_SNAPSHOT = Snapshot(Group(ROOT_NAMESPACE, "vm", "900"), TIME)
SMALL_SNAPSHOT = Snapshot(Group(ROOT_NAMESPACE, "vm", "901"), TIME)

LOOK_UPS = 10_000
HANDLES = 1000
GROUPS, EACH = 100, 1000


def _digests(size: int) -> bytes:
    """Of an image of `size` bytes that is a fourth holes: runs of data and holes of many lengths."""
    source = random.Random(size)
    zero = chunk_digest(bytes(CHUNK), None)
    parts: list[bytes] = []
    left = size // CHUNK
    while left:
        data = min(left, source.choice((3, 40, 500, 6000, 60_000)))
        holes = min(left - data, data // 3)
        parts += [source.randbytes(32 * data), zero * holes]
        left -= data + holes
    return b"".join(parts)


def _write_snapshot(
    store: Path, snapshot: Snapshot, files: dict[str, bytes], entries: list[ManifestFile]
) -> None:
    directory = store / str(snapshot)
    directory.mkdir(parents=True)
    (directory.parent / "owner").write_text("root@pam\n")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    text = manifest.encode(
        backup_type=snapshot.group.type,
        backup_id=snapshot.group.id,
        backup_time=snapshot.time,
        files=tuple(entries),
        unprotected={},
        key=None,
    )
    (directory / MANIFEST.filename).write_bytes(blob.encode(text))


def _large_store(directory: Path) -> Path:
    """A datastore with an image of 16 TiB and one of 1 GiB: indexes without chunks."""
    store = directory / "large-1"
    if not (store / "made").exists():
        if store.exists():  # what an interrupted run has left
            shutil.rmtree(store)
        check_room(directory, LARGE // CHUNK * 32)
        DatastoreWriter(store)
        for snapshot, size in ((LARGE_SNAPSHOT, LARGE), (SMALL_SNAPSHOT, SMALL)):
            stored, csum = index.encode_fixed([_digests(size)], size=size, chunk_size=CHUNK, ctime=TIME)
            entry = ManifestFile(Archive(INDEX), CryptMode.NONE, size, csum)
            _write_snapshot(store, snapshot, {INDEX: stored}, [entry])
        (store / "made").touch()
    return store


def many_store(directory: Path, each: int) -> Path:
    """A datastore with `GROUPS` groups of `each` snapshots, with nothing in them but a tiny blob."""
    store = directory / f"many-{each}-1"
    if not (store / "made").exists():
        if store.exists():  # what an interrupted run has left
            shutil.rmtree(store)
        check_room(directory, GROUPS * each * 20_000)
        DatastoreWriter(store)
        content = blob.encode(b"name: small\n")
        csum = blob.chunk_digest(content, None)
        entry = ManifestFile(Archive("qemu-server.conf.blob"), CryptMode.NONE, len(content), csum)
        for number in range(GROUPS):
            group = Group(ROOT_NAMESPACE, "vm", str(100 + number))
            for step in range(each):
                _write_snapshot(
                    store, group.snapshot(TIME + step * 3600), {entry.archive.filename: content}, [entry]
                )
        (store / "made").touch()
    return store


def _large_image(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    store = _large_store(bench.data_directory)
    server = stack.enter_context(serving(store))

    def opened(snapshot: Snapshot) -> Sample:
        with pbsfs.mounted(server, data) as mount:
            path = mount.image(snapshot)
            path.stat()  # what listing costs is another matter
            before = memory_of(mount.pid, "VmRSS")
            fds: list[int] = []
            sample = mount.watched.measure(lambda: fds.append(os.open(path, os.O_RDONLY)))
            after = memory_of(mount.pid, "VmRSS")
            os.close(fds[0])
        return sample.with_counts(
            **{"MiB at the peak": ((sample.peak or 0) - before) / MIB, "MiB more": (after - before) / MIB}
        )

    def looked_up(what: Path | int, count: int = LOOK_UPS) -> Sample:
        words = [sys.executable, "-m", "bench.lookups", str(what), str(count)]
        done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(done.stderr[-1000:])
        took = json.loads(done.stdout)
        return Sample(took["extents"], operations=count).with_counts(
            **{"find us": took["find"] / count * 1e6, "worst extent ms": took["worst"] * 1000}
        )

    large, lookups, few = "pbsfs, open of 16 TiB", "look-ups in 16 TiB", "look-ups in 1 GiB"
    full = "look-ups in 16 TiB without a hole"
    return Plan(
        {
            large: lambda: opened(LARGE_SNAPSHOT),
            "pbsfs, open of 1 GiB": lambda: opened(SMALL_SNAPSHOT),
            lookups: lambda: looked_up(store / str(LARGE_SNAPSHOT) / INDEX),
            few: lambda: looked_up(store / str(SMALL_SNAPSHOT) / INDEX),
            full: lambda: looked_up(LARGE, LOOK_UPS // 100),
        },
        [
            Goal("open of 16 TiB: seconds / 2", lambda s: s[large].seconds / 2, 1.0, at_least=False),
            Goal(
                "open of 16 TiB: MiB at the peak / 200",
                lambda s: s[large].counts["MiB at the peak"] / 200,
                1.0,
                at_least=False,
            ),
            Goal(
                "open of 16 TiB: MiB that stay / 200",
                lambda s: s[large].counts["MiB more"] / 200,
                1.0,
                at_least=False,
            ),
            Goal(
                "find: time in 16 TiB / in 1 GiB",
                lambda s: s[lookups].counts["find us"] / s[few].counts["find us"],
                1.5,
                at_least=False,
            ),
            Goal(
                "extents: time in 16 TiB / in 1 GiB",
                lambda s: s[lookups].seconds / s[few].seconds,
                1.5,
                at_least=False,
            ),
            Goal(
                "extents without a hole: time in 16 TiB / in 1 GiB",
                lambda s: s[few].rate / s[full].rate,
                1.5,
                at_least=False,
            ),
        ],
    )


def _handles(bench: Bench, stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    server = bench.server(stack)

    def many() -> Sample:
        with pbsfs.mounted(server, data) as mount:
            path = mount.image(PLAIN)
            with path.open("rb", buffering=0) as file:
                file.read(1)
            before = memory_of(mount.pid, "VmRSS")
            fds: list[int] = []

            def work() -> None:
                for _ in range(HANDLES):
                    fds.append(os.open(path, os.O_RDONLY))
                    os.pread(fds[-1], 1, data.first_hole[0])

            try:
                sample = mount.watched.measure(work, operations=HANDLES)
            finally:
                for fd in fds:
                    os.close(fd)
            return sample.with_counts(**{"MiB more": ((sample.peak or 0) - before) / MIB})

    name = f"pbsfs, {HANDLES} open files"
    return Plan({name: many}, [Goal("MiB more than with one", lambda s: s[name].counts["MiB more"])])


def _snapshots(bench: Bench, _stack: ExitStack) -> Plan:
    data, pbsfs = bench.data, bench.pbsfs
    each = EACH // 50 if bench.quick else EACH
    store = many_store(bench.data_directory, each)

    def listed() -> Sample:
        started = time.perf_counter()
        with pbsfs.mounted(store, data) as mount:
            mounted = time.perf_counter() - started
            took: dict[str, float] = {"mounted": mounted}

            def step(name: str, count: int, path: Path) -> None:
                began = time.perf_counter()
                found = os.listdir(path)
                took[name] = time.perf_counter() - began
                if len(found) < count:
                    raise BenchError(f"{path} has {len(found)} names")

            def work() -> None:
                step("vm", GROUPS, mount.place / "vm")
                step("one group", each, mount.place / "vm/100")
                began = time.perf_counter()
                for number in range(GROUPS):
                    os.listdir(mount.place / f"vm/{100 + number}")
                took["all groups"] = time.perf_counter() - began

            return mount.watched.measure(work).with_counts(**took)

    name = f"pbsfs, {GROUPS * each} snapshots"
    return Plan(
        {name: listed},
        [
            Goal("seconds to list one group's", lambda s: s[name].counts["one group"]),
            Goal("seconds to mount", lambda s: s[name].counts["mounted"]),
        ],
    )


CASES = (
    Case("large-image", "an image of 16 TiB from a server, beside one of 1 GiB", _large_image),
    Case("handles", "a thousand open files on a mount", _handles),
    Case("snapshots", "a hundred thousand snapshots in a directory", _snapshots),
)
