"""The files in an archive as nodes of the tree: what they cost in memory."""

from __future__ import annotations

import gc
import os

import pytest
import trio

from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tree import Directory, Tree
from pbsfs.tree.archives import ENTRY_SIZE
from pbsfs.tree.node import HOLDER, NAME_SIZE
from tests.support.truth import ARCHIVES, FILES

PLAIN = next(archive for archive in ARCHIVES if archive.path.startswith("ct/210"))

pytestmark = pytest.mark.golden


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
