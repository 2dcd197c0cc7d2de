"""The kernel is asked to forget directories of archives when listings take too much memory."""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import math
import os
import stat
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing

from pbsfs.base.names import Group, Namespace, Snapshot
from pbsfs.fuse.forgetting import LEAST, MOST, Forgetting
from pbsfs.fuse.inodes import InodeTable
from pbsfs.fuse.notices import Notices
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Directory, Tree
from pbsfs.tree import Node as TreeNode
from pbsfs.tree.entries import ENTRY_SIZE
from pbsfs.tree.node import HOLDER, NAME_SIZE

SNAPSHOT = Snapshot(Group(Namespace(), "host", "a"), 1_700_000_000)
ROOT = f"files/{SNAPSHOT}/root"
DIRECTORIES, EACH = 200, 20


@pytest.fixture
def datastore(tmp_path: Path) -> Path:
    files = [Node(b"%d" % number, stat.S_IFREG | 0o644) for number in range(EACH)]
    directories = [Node(b"%03d" % number, children=list(files)) for number in range(DIRECTORIES)]
    files_of_archive = {"root.pxar.didx": write(Node(b"", children=directories), split=False).main}
    DatastoreWriter(tmp_path / "store").add_snapshot(SNAPSHOT, files_of_archive)
    return tmp_path / "store"


def test_the_directories_used_longest_ago_are_forgotten(
    datastore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(datastore)) as reader, trio.open_nursery() as nursery:
            tree = Tree(reader, files=True)
            memory = reader.store.memory
            inodes = InodeTable(tree.root)
            forgetting = Forgetting(inodes, memory, Notices())
            asked: list[tuple[int, bytes]] = []
            known: dict[tuple[int, bytes], int] = {}

            def forget(above: int, name: bytes) -> None:
                asked.append((above, name))
                trio.from_thread.run_sync(inodes.forget, known.pop((above, name)), 1)

            monkeypatch.setattr(pyfuse3, "invalidate_entry", forget)
            root = await tree.find(os.fsencode(ROOT))
            assert isinstance(root, Directory)
            above = inodes.remember(root, 0)
            node: TreeNode | None = None
            for name in await root.children():
                node = await root.child(name)
                assert isinstance(node, Directory)
                known[above, name] = inodes.remember(node, 0)
                await node.children()
                forgetting.used(node)

            node = None
            nursery.start_soon(forgetting.run)
            await trio.testing.wait_all_tasks_blocked()
            assert not asked, "there is memory enough"

            charged = memory.charged(HOLDER)
            memory.open_limit = round(charged / MOST) - 1
            forgetting.used(root)
            goal = LEAST * memory.open_limit
            with trio.fail_after(30):
                while memory.charged(HOLDER) > goal:
                    await trio.lowlevel.checkpoint()
            each = EACH * (NAME_SIZE + ENTRY_SIZE)
            count = math.ceil((charged - goal) / each)
            assert asked == [(above, b"%03d" % number) for number in range(count)]
            nursery.cancel_scope.cancel()

    trio.run(main)  # threads on a true clock
