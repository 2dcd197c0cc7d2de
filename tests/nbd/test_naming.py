"""Names of exports, on a tree without nbdkit."""

from __future__ import annotations

import pytest
import trio

from pbsfs.base.errors import NotFoundError
from pbsfs.nbd.naming import choose
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tree import Tree
from tests.support.stocked import FIRST, IMAGE, Stocked
from tests.support.truth import FILES


def test_what_is_in_the_directory_of_files_is_refused(stocked: Stocked) -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(stocked.path)) as reader:
            tree = Tree(reader, files=True)
            for path in ("files", f"files/{FIRST}", f"files/{FIRST}/index.json"):
                with pytest.raises(NotFoundError, match="is in 'files', which has no images; give the path"):
                    await choose(tree, path)
            for path in ("", FIRST, IMAGE):
                assert (await choose(tree, path)).path == path.encode()

    trio.run(main)  # threads on a true clock


@pytest.mark.golden
def test_a_snapshot_without_a_disk_is_refused() -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(FILES / "datastore")) as reader:
            with pytest.raises(NotFoundError, match=r"^ct/210/.* has no disk image; name another snapshot"):
                await choose(Tree(reader), "ct/210/latest")

    trio.run(main)  # threads on a true clock
