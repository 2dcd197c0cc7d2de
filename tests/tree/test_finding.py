"""How a path is found."""

from __future__ import annotations

import pytest

from pbsfs.base.errors import NotFoundError, UsageError
from pbsfs.tree import SnapshotDirectory, Tree
from tests.support import made
from tests.support.run import in_trio
from tests.support.sources import MemorySource
from tests.tree.trees import (
    DAYS,
    IMAGE,
    directory,
    filled,
    shown,
)


@in_trio
async def test_paths_are_found_with_links_empty_steps_and_stored_names() -> None:
    async with shown(filled()) as tree:
        newest = await tree.find(f"vm/100/{DAYS[1]}/{IMAGE}")
        for path in (
            f"vm/100/latest/{IMAGE}",
            f"/vm//100/./latest/{IMAGE}/",
            f"vm/100/latest/{IMAGE}.fidx",
        ):
            assert await tree.find(path) is newest
        assert await tree.find("") is tree.root
        assert await tree.find("/") is tree.root
        followed = await tree.find("vm/100/latest")
        assert isinstance(followed, SnapshotDirectory)
        assert followed.name == DAYS[1].encode()


@in_trio
async def test_what_is_not_there_is_told_with_what_is() -> None:
    async with shown(filled()) as tree:
        for path, text in (
            ("vn", "/: there is no 'vn'; there is vm, host, ns"),
            ("vm/101", "vm: there is no '101'; there is 100"),
            (
                f"vm/100/latest/{IMAGE}x",
                f"{DAYS[1]}: there is no '{IMAGE}x'; there is {IMAGE}, qemu-server.conf",
            ),
            (f"vm/100/latest/{IMAGE}/x", f"{IMAGE} is not a directory"),
        ):
            with pytest.raises(NotFoundError) as caught:
                await tree.find(path)
            assert text in str(caught.value)
        with pytest.raises(NotFoundError, match="vm: there is no '101'"):
            await (await directory(tree, "vm")).child(b"101")
    async with shown(MemorySource()) as tree:
        with pytest.raises(NotFoundError, match="there is nothing"):
            await tree.find("vm")


@in_trio
async def test_many_names_are_not_all_told() -> None:
    source = MemorySource()
    for number in range(20):
        source.add(made.snapshot(str(100 + number)), {})
    async with shown(source) as tree:
        with pytest.raises(NotFoundError, match=r"100, .*, 107, … \(20 in all\)$"):
            await tree.find("vm/1")


@pytest.mark.parametrize("path", ["..", "vm/..", "vm/../host", "vm/100/latest/.."])
@in_trio
async def test_steps_up_are_refused(path: str) -> None:
    async with shown(filled()) as tree:
        with pytest.raises(UsageError, match="no meaning"):
            await tree.find(path)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("latest/guest", "; the files on its disks are below files/vm/100/"),
        (f"latest/{IMAGE}/etc/fstab", "; the files on its disks are below files/vm/100/"),
        (f"latest/{IMAGE.removesuffix('.img')}", ""),
        ("latest/other.img", ""),
        ("latest/qemu-server.conf/name", ""),
    ],
)
@in_trio
async def test_a_path_into_a_disk_outside_of_files_is_sent_there(path: str, hint: str) -> None:
    async with shown(filled()) as tree:
        for in_files in (True, False):
            with pytest.raises(NotFoundError) as caught:
                await Tree(tree.reader, files=in_files).find(f"vm/100/{path}")
            assert ("files/" in str(caught.value)) == (in_files and bool(hint))
            assert not in_files or hint in str(caught.value)
