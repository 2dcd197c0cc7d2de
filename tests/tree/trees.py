"""What the tests of the tree show, and how they look at it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pbsfs.base.names import ROOT_NAMESPACE, Namespace, Snapshot
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import SnapshotInfo
from pbsfs.tree import BlobFile, Directory, ImageFile, Latest, Node, Stat, Tree
from pbsfs.tree.stat import DIRECTORY_MODE, nanoseconds
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.sources import CHUNK_SIZE, MemorySource

IMAGE = "drive-scsi0.img"
CONF = b"cores: 2\n" * 100
CONTENT = made.image(1, "r00t", tail=512)
DATA_SIZE = 2 * CHUNK_SIZE + 512
FILES = {f"{IMAGE}.fidx": CONTENT, "qemu-server.conf.blob": CONF}
DAYS = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "2023-11-16T22:13:20Z"]
PROD = Namespace(("prod",))
DEEP = Namespace(("prod", "db"))


def filled(*, cheap_files: bool = True) -> MemorySource:
    source = MemorySource(cheap_files=cheap_files)
    for day in (0, 1):
        source.add(made.snapshot("100", time=TIME + day * DAY), FILES)
    source.add(made.snapshot("9", type="host"), {"root.pxar.didx": CONTENT}, client_log=b"log\n")
    source.add(made.snapshot("200", type="ct", namespace=PROD), {"root.pxar.didx": b"x"})
    source.add(made.snapshot("300", namespace=DEEP), FILES)
    return source


@asynccontextmanager
async def shown(
    source: MemorySource, root: Namespace = ROOT_NAMESPACE, *, refresh: float = 5.0, with_key: bool = False
) -> AsyncIterator[Tree]:
    keys = {made.KEY.fingerprint: made.KEY} if with_key else {}
    async with open_reader(source, keys=keys) as reader:
        yield Tree(reader, root, refresh=refresh)


def file_stat(size: int, data_size: int, time: int, *, exact: bool = True) -> Stat:
    return Stat(size, data_size, mtime_ns=time * 10**9, exact=exact)


def directory_stat(time: int | None = None) -> Stat:
    return Stat(mode=DIRECTORY_MODE, mtime_ns=nanoseconds(time))


async def directory(tree: Tree, path: str) -> Directory:
    node = await tree.find(path)
    assert isinstance(node, Directory)
    return node


async def image(tree: Tree, path: str) -> ImageFile:
    node = await tree.find(path)
    assert isinstance(node, ImageFile)
    return node


async def small_file(tree: Tree, path: str) -> BlobFile:
    node = await tree.find(path)
    assert isinstance(node, BlobFile)
    return node


async def latest(tree: Tree, path: str) -> Latest:
    node = await (await directory(tree, path)).child(b"latest")
    assert isinstance(node, Latest)
    return node


async def names(tree: Tree, path: str) -> list[str]:
    return [name.decode() for name in await (await directory(tree, path)).children()]


async def all_paths(node: Node) -> list[str]:
    paths = [str(node)]
    if isinstance(node, Directory):
        for child in (await node.children()).values():
            paths += await all_paths(child)
    return paths


def broken(snapshot: Snapshot) -> SnapshotInfo:
    return SnapshotInfo(snapshot, (), error="unreadable manifest: CRC mismatch")


def many_groups(*, groups: int = 40) -> tuple[MemorySource, list[str]]:
    source = MemorySource(cheap_files=False)
    for number in range(groups):
        source.add(made.snapshot(f"{number:03}"), {})
    return source, [f"vm/{number:03}" for number in range(groups)]
