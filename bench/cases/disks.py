"""The files inside a disk image: the first one, a search of all of them, and their export."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bench import disks
from bench.disks import DATA, ROOT, SOME_FILE, XFS, Machine, Volume
from bench.limits import cores, decode_stored
from bench.measures import MIB, Sample, Watched, children_of, command, cpu_of, memory_of, stop
from bench.plan import Bench, Case, Goal, Plan, Round, count_of, rate_of
from bench.program import PBSFS, Mount, started, unmount, wait_for
from bench.serving import serving
from pbsfs.fuse.mountpoint import mounted_at

DECODE = "limit: decode of large files, all cores"
TAR, PACK = "pbsfs mount, tar of large files", "pbsfs export, tar of large files"
PEER, PEER_TAR = "fuse2fs, find with stat, ext4", "fuse2fs, tar of large files"

STAT = "find \"$1\" -printf '%s %m %T@\\n'"
TAR_OF = 'tar -C "$1" -cf - . | cat'


def _with_parser(mount: Mount, work: Callable[[], Sample]) -> Sample:
    """`work`, which makes the mount start a parser process, with what that one used."""
    sample = work()
    parsers = children_of(mount.pid)
    peak = sum(memory_of(pid) for pid in parsers)
    cpu = (sample.cpu or 0.0) + sum(cpu_of(pid) for pid in parsers)
    return replace(sample, cpu=cpu).with_counts(parser_mib=peak / MIB)


def _decode(machine: Machine) -> Sample:
    """Every chunk of the volume with large files that is not zeros, on all cores, from the page cache."""
    chunks = [(path, digest, length) for path, (digest, length) in machine.chunks(DATA).items()]
    return decode_stored(chunks, cores())


@contextmanager
def _fuse2fs(image: Path) -> Iterator[tuple[Path, Watched]]:
    place = Path(tempfile.mkdtemp(prefix="peer-", dir=image.parent))
    process = started(["fuse2fs", "-f", "-o", "ro", image, place], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    try:
        wait_for(lambda: mounted_at(place) is not None, process, f"{place} is mounted")
        yield place, Watched((process.pid,))
    finally:
        unmount(place)
        stop(process)
        place.rmdir()


def _disks(bench: Bench, _stack: ExitStack) -> Plan:
    machine, pbsfs = disks.make(bench.data_directory, quick=bench.quick), bench.pbsfs
    store, volumes = machine.datastore, machine.volumes
    large = sum(length for _digest, length in machine.chunks(DATA).values())

    # A new mount each time: nothing is cached.
    def mounted(
        volume: Volume, script: str, *, inside: str = "", operations: int = 0, size: int = 0
    ) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.mounted(store, bench.data) as mount:
                words = ["sh", "-c", script, "sh", str(mount.place / volume.shown / inside)]
                sample = _with_parser(mount, lambda: mount.watched.command(words, size=size))
                return replace(sample, operations=operations)

        return run

    def fetched(volume: Volume) -> Callable[[], Sample]:
        """Its index, and what opening the file system takes, count too."""

        def run() -> Sample:
            with serving(store) as server, pbsfs.mounted(server, bench.data) as mount:
                server.counts()
                words = ["cat", str(mount.place / volume.shown / SOME_FILE)]
                sample = _with_parser(mount, lambda: mount.watched.command(words))
                return sample.with_counts(chunks=server.counts().chunks)

        return run

    def program(*words: str, operations: int = 0, size: int = 0) -> Callable[[], Sample]:
        def run() -> Sample:
            name, *rest = words
            full: list[str | Path] = [PBSFS, name, "--no-progress", "--datastore-dir", str(store), *rest]
            sample = command(full, environment=pbsfs.environment(store), size=size)
            return replace(sample, operations=operations)

        return run

    def peer(name: str, script: str, *, operations: int = 0, size: int = 0) -> Callable[[], Sample]:
        def run() -> Sample:
            with _fuse2fs(machine.raw(name)) as (place, watched):
                sample = watched.command(["sh", "-c", script, "sh", str(place)], size=size)
                return replace(sample, operations=operations)

        return run

    variants: dict[str, Callable[[], Sample]] = {}
    goals: list[Goal] = []
    for name, kind, most in ((ROOT, "ext4", 10), (XFS, "XFS", 20)):
        if name not in volumes:
            continue
        volume = volumes[name]
        first, served = f"pbsfs mount, first cat, {kind}", f"pbsfs mount of a server, first cat, {kind}"
        stat, search = f"pbsfs mount, find with stat, {kind}", f"pbsfs find, {kind}"
        variants |= {
            first: mounted(volume, 'cat "$1"', inside=SOME_FILE),
            served: fetched(volume),
            stat: mounted(volume, STAT, operations=volume.entries),
            search: program("find", "--name", "001*", volume.shown, operations=volume.entries),
            f"pbsfs export, tar to nothing, {kind}": program(
                "export", "--format", "tar", volume.shown, "-", operations=volume.entries
            ),
        }
        goals += [
            Goal(f"first cat, {kind}: seconds", _seconds(first), 0.5, at_least=False),
            Goal(f"first cat, {kind}: chunks fetched", count_of(served, "chunks"), most, at_least=False),
            Goal(f"find with stat, {kind}: entries a second", _rate(stat), 8000),
            Goal(f"pbsfs find, {kind}: entries a second", _rate(search), 25_000),
            Goal(
                f"find with stat, {kind}: MiB of the parser",
                count_of(stat, "parser_mib"),
                100,
                at_least=False,
            ),
        ]
    data = volumes[DATA]
    variants |= {
        TAR: mounted(data, TAR_OF, size=large),
        PACK: program("export", "--format", "tar", data.shown, "-", size=large),
        DECODE: lambda: _decode(machine),
    }
    goals += [
        Goal("tar of the mount: rate / that of the decode limit", rate_of(TAR, DECODE), 0.5),
        Goal("export to tar: rate / that of the decode limit", rate_of(PACK, DECODE)),
    ]
    if shutil.which("fuse2fs") is not None:
        variants[PEER] = peer(ROOT, STAT, operations=volumes[ROOT].entries)
        variants[PEER_TAR] = peer(DATA, TAR_OF, size=large)
        goals += [
            Goal(
                "find with stat: rate / that of fuse2fs", rate_of("pbsfs mount, find with stat, ext4", PEER)
            ),
            Goal("tar of the mount: rate / that of fuse2fs", rate_of(TAR, PEER_TAR)),
        ]
    return Plan(variants, goals)


def _seconds(name: str) -> Callable[[Round], float | None]:
    return lambda samples: samples[name].seconds


def _rate(name: str) -> Callable[[Round], float | None]:
    return lambda samples: samples[name].rate


CASES = (Case("disks", "the files in a disk image: the first, a search, and exports", _disks),)
