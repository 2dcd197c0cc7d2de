"""The files in an archive as nodes of the tree: what they cost in memory."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import NotFoundError
from pbsfs.base.names import Group, Namespace, Snapshot
from pbsfs.contents.base import Entry
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.archives import Node, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Directory, Tree
from pbsfs.tree.entries import ENTRY_SIZE, NEAR, ContentsNode
from pbsfs.tree.node import HOLDER, NAME_SIZE
from tests.support.truth import ARCHIVES, FILES

PLAIN = next(archive for archive in ARCHIVES if archive.path.startswith("ct/210"))


@pytest.mark.golden
def test_the_directories_of_an_archive_are_charged_by_their_entries() -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(FILES / "datastore")) as reader:
            tree = Tree(reader, files=True)
            memory = reader.store.memory
            root = await tree.find(os.fsencode(f"files/{PLAIN.path}"))
            assert isinstance(root, Directory)
            before = memory.charged(HOLDER)
            count = len(await root.children())
            assert count > 5
            assert memory.charged(HOLDER) == before + count * (NAME_SIZE + ENTRY_SIZE)
            del root
            big = memory.charge("open files", memory.limit, passing=True)
            memory.reclaim()  # nothing uses the directory, so it goes
            gc.collect()
            assert memory.charged(HOLDER) < before
            del big

    trio.run(main)  # threads on a true clock


@pytest.mark.golden
@pytest.mark.parametrize(
    ("path", "archive"),
    [
        ("ct/210/latest/root/etc", "root.pxar"),
        ("ct/210/latest/root.pxar/etc", "root.pxar"),
        ("ct/211/latest/root", "root.mpxar"),
    ],
)
def test_a_path_into_an_archive_outside_of_files_is_sent_there(path: str, archive: str) -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(FILES / "datastore")) as reader:
            group = path[:6]
            hint = f"; the files in '{archive}' are below files/{group}/2024-"
            with pytest.raises(NotFoundError) as caught:
                await Tree(reader, files=True).find(path)
            assert hint in str(caught.value)
            with pytest.raises(NotFoundError) as caught:
                await Tree(reader).find(path)
            assert "files/" not in str(caught.value), "this tree has no such directory"

    trio.run(main)  # threads on a true clock


@pytest.mark.parametrize(("size", "known"), [(1000, 100), (NEAR, 1)])
def test_entries_near_one_that_is_looked_at_are_read_with_it(tmp_path: Path, size: int, known: int) -> None:
    root = Node(b"", mtime_ns=1)
    count = min(100, 4 * NEAR // size)
    file = stat.S_IFREG | 0o600
    root.children = [Node(b"%03d" % number, file, data=b"x" * size) for number in range(count)]
    name = "root.pxar.didx"
    archive = write(root, split=False).main
    snapshot = Snapshot(Group(Namespace(), "host", "a"), 1_700_000_000)
    files = {name: archive, "catalog.pcat1.didx": write_catalog({name.encode(): root})}
    DatastoreWriter(tmp_path / "store").add_snapshot(snapshot, files)

    async def main() -> None:
        async with open_reader(DirectorySource(tmp_path / "store")) as reader:
            place = f"files/{snapshot}/root"
            directory = await Tree(reader, files=True).find(os.fsencode(place))
            assert isinstance(directory, Directory)
            children = await directory.children()

            def exact() -> int:
                return sum(isinstance(e, Entry) and e.exact for e in children.values_by_name.values())

            assert exact() == 0, "names come from the catalog"
            first = children[b"000"]
            assert isinstance(first, ContentsNode)
            assert (await first.stat()).mode == stat.S_IFREG | 0o600
            assert exact() == known

    trio.run(main)  # threads on a true clock
