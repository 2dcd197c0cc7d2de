"""The files of an archive of version 2: a mount of it, a search of several nights of it, and its export."""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.data import DAY, TIME, check_room
from bench.limits import cores, decode_stored
from bench.measures import GIB, MIB, Sample, command
from bench.plan import Bench, Case, Goal, Plan, faster
from bench.program import PBSFS
from pbsfs.base.names import ROOT_NAMESPACE, Group, Snapshot
from pbsfs.formats.index import DynamicIndex
from pbsfs.formats.zeros import ZeroDigests
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import USUAL_CHUNKS, DatastoreWriter

FIND = "pbsfs mount, find with stat"
TAR = "pbsfs mount, tar to nothing"
SMALL = "pbsfs mount, each small file once"
SEARCH = "pbsfs find, all nights"
RESTORE, PACK = "pbsfs export to a directory", "pbsfs export, tar to nothing"

DECODE = "limit: decode, all cores"

MAIN, PAYLOAD = "root.mpxar.didx", "root.ppxar.didx"
FILE, LINK = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
EACH = 100


def _tree(night: int, *, quick: bool) -> Node:
    """22,260 entries: 200 directories of 100 small files and 10 links, one file of which in each is another
    every night; 56 empty directories; a large file and a sparse one. `quick`: a tenth of it."""
    source = random.Random(1)
    part = 10 if quick else 1
    root = Node(mtime_ns=TIME * 10**9)
    for number in range(200 // part):
        files = [
            Node(b"%03d.conf" % place, FILE, data=source.randbytes(source.randint(500, 4000)))
            for place in range(EACH)
        ]
        files[night % EACH].data = b"night %d" % night
        links = [Node(b"link%d" % place, LINK, target=b"%03d.conf" % place) for place in range(10)]
        root.children.append(Node(b"dir%03d" % number, children=files + links))
    content = b"".join(source.randbytes(MIB) for _ in range(0 if night else 300 // part))
    large = Node(b"data.bin", FILE, data=content)
    sparse = Node(b"sparse.img", FILE, zeros=8 * GIB // part if not night else 0)
    empty = [Node(b"empty%02d" % number) for number in range(56)]
    root.children.append(Node(b"large", children=[*empty, large, sparse]))
    return root


def _store(bench: Bench) -> Path:
    """A datastore with 30 nights of a host, the large files in the first only."""
    store = bench.data_directory / f"files-{'quick' if bench.quick else 'full'}-3"
    if not (store / "made").exists():
        if store.exists():  # what an interrupted run has left
            shutil.rmtree(store)
        check_room(bench.data_directory, 2 * GIB)
        writer = DatastoreWriter(store)
        payload = store / "payload"
        for night in range(3 if bench.quick else 30):
            with payload.open("wb") as file:
                archive = write(_tree(night, quick=bench.quick), split=True, payload_to=file)
            files: dict[str, bytes | Path] = {MAIN: archive.main, PAYLOAD: payload}
            snapshot = Snapshot(Group(ROOT_NAMESPACE, "host", "files"), TIME + night * DAY)
            writer.add_snapshot(snapshot, files, stream_chunks=USUAL_CHUNKS)
        payload.unlink()
        (store / "made").touch()
    return store


def _decode(store: Path, snapshot: Snapshot) -> Sample:
    """Every chunk of the archive that is not zeros, once, on all cores, from the page cache."""
    writer = DatastoreWriter(store)
    lengths: dict[bytes, int] = {}
    for name in (MAIN, PAYLOAD):
        index = DynamicIndex((writer.snapshot_path(snapshot) / name).read_bytes(), zeros=ZeroDigests())
        for number in range(index.count):
            if not index.is_hole(number):
                start, end = index.span(number)
                lengths[index.digest(number)] = end - start

    chunks = [(writer.chunk_path(digest), digest, length) for digest, length in lengths.items()]
    return decode_stored(chunks, cores())


def _files(bench: Bench, _stack: ExitStack) -> Plan:
    store, pbsfs = _store(bench), bench.pbsfs
    group = "files/host/files"
    first = Snapshot(Group(ROOT_NAMESPACE, "host", "files"), TIME)
    archive = f"files/{first}/root"
    small = (20 if bench.quick else 200) * EACH

    # A new mount each time: nothing is cached.
    def mounted(script: str, operations: int = 0) -> Callable[[], Sample]:
        def run() -> Sample:
            with pbsfs.mounted(store, bench.data) as mount:
                words = ["sh", "-c", script, "sh", str(mount.place / archive)]
                sample = mount.watched.command(words)
                return replace(sample, operations=operations)

        return run

    def program(*words: str) -> Sample:
        return command([PBSFS, *words], environment=pbsfs.environment(store))

    def restore() -> Sample:
        dest = bench.scratch / "restored"
        try:
            return program("export", "--no-progress", "--datastore-dir", str(store), archive, str(dest))
        finally:
            shutil.rmtree(dest, ignore_errors=True)

    tar = ("export", "--no-progress", "--datastore-dir", str(store), "--format", "tar", archive, "-")
    return Plan(
        {
            FIND: mounted("find \"$1\" -printf '%s %m %T@\\n'"),
            TAR: mounted('tar -C "$1" -cf - . | cat'),
            SMALL: mounted('cd "$1" && cat dir*/*.conf', small),
            SEARCH: lambda: program("find", "--datastore-dir", str(store), "--name", "001*", group),
            RESTORE: restore,
            PACK: lambda: program(*tar),
            DECODE: lambda: _decode(store, first),
        },
        [
            Goal("find with stat: seconds", lambda s: s[FIND].seconds, 1.15, at_least=False),
            Goal("tar of the mount: seconds", lambda s: s[TAR].seconds, 13.5, at_least=False),
            Goal("small files a second", lambda s: s[SMALL].rate, 5000),
            Goal("search of 30 nights: seconds", lambda s: s[SEARCH].seconds, 3.0, at_least=False),
            Goal("export to a directory: seconds", lambda s: s[RESTORE].seconds, 8.0, at_least=False),
            Goal("export to tar: rate / that of the decode limit", faster(PACK, DECODE), 0.7),
        ],
    )


CASES = (Case("files", "the files of an archive: mount, search, export", _files),)
