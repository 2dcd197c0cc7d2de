"""Restoring and packing what is below a node of the tree."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import trio

from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tasks.extract.run import Options, pack, restore
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import ContentsNode, Tree
from tests.contents.trees import directory, file
from tests.support import made


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("form", [None, "tar"])
def test_the_cache_has_room_for_what_is_fetched_ahead_of_each_stream_and_as_much_again(
    tmp_path: Path, split: bool, form: str | None
) -> None:
    root: Node = directory(b"", file(b"a", b"content"))
    written = write(root, split=split)
    files = {"root.mpxar.didx" if split else "root.pxar.didx": written.main}
    if written.payload is not None:
        files["root.ppxar.didx"] = written.payload
    snapshot = made.snapshot("1", type="host")
    DatastoreWriter(tmp_path / "store").add_snapshot(snapshot, files)

    async def main() -> None:
        async with open_reader(DirectorySource(tmp_path / "store")) as reader:
            store = reader.store
            node = await Tree(reader, files=True).find(f"files/{snapshot}/root")
            assert isinstance(node, ContentsNode)
            assert store.cache.room > 3 * store.limits.max_window
            if form is None:
                await restore(node, tmp_path / "out", Options(), lambda _bytes, _files: None)
                assert (tmp_path / "out" / "a").read_bytes() == b"content"
            else:
                await pack(node, io.BytesIO(), form, Options(), lambda _bytes, _files: None)
            assert store.cache.room == (3 if split else 2) * store.limits.max_window

    trio.run(main)  # threads on a true clock
