"""What the tree shows."""

from __future__ import annotations

import pytest
import trio

from pbsfs.base.errors import DamageError, NotFoundError
from pbsfs.tree import BlobFile, Directory, ImageFile, Node, Stat
from pbsfs.tree.stat import LINK_MODE
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import MemorySource
from tests.tree.trees import (
    CONF,
    CONTENT,
    DAYS,
    DEEP,
    FILES,
    IMAGE,
    PROD,
    all_paths,
    broken,
    directory,
    directory_stat,
    filled,
    image,
    latest,
    names,
    shown,
    small_file,
)


@in_trio
async def test_the_tree_shows_namespaces_types_groups_snapshots_and_files() -> None:
    async with shown(filled()) as tree:
        assert await all_paths(tree.root) == [
            "/",
            "vm",
            "vm/100",
            f"vm/100/{DAYS[0]}",
            f"vm/100/{DAYS[0]}/drive-scsi0.img",
            f"vm/100/{DAYS[0]}/qemu-server.conf",
            f"vm/100/{DAYS[0]}/index.json",
            f"vm/100/{DAYS[1]}",
            f"vm/100/{DAYS[1]}/drive-scsi0.img",
            f"vm/100/{DAYS[1]}/qemu-server.conf",
            f"vm/100/{DAYS[1]}/index.json",
            "vm/100/latest",
            "host",
            "host/9",
            f"host/9/{DAYS[0]}",
            f"host/9/{DAYS[0]}/root.pxar",
            f"host/9/{DAYS[0]}/index.json",
            f"host/9/{DAYS[0]}/client.log",
            "host/9/latest",
            "ns",
            "ns/prod",
            "ns/prod/ct",
            "ns/prod/ct/200",
            f"ns/prod/ct/200/{DAYS[0]}",
            f"ns/prod/ct/200/{DAYS[0]}/root.pxar",
            f"ns/prod/ct/200/{DAYS[0]}/index.json",
            "ns/prod/ct/200/latest",
            "ns/prod/ns",
            "ns/prod/ns/db",
            "ns/prod/ns/db/vm",
            "ns/prod/ns/db/vm/300",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/drive-scsi0.img",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/qemu-server.conf",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/index.json",
            "ns/prod/ns/db/vm/300/latest",
        ]


@in_trio
async def test_a_tree_may_be_rooted_at_a_namespace() -> None:
    async with shown(filled(), PROD) as tree:
        assert await names(tree, "") == ["ct", "ns"]
        assert await names(tree, "ns/db/vm/300") == [DAYS[0], "latest"]
        assert (await image(tree, f"ns/db/vm/300/latest/{IMAGE}")).info.snapshot.group.namespace == DEEP


@in_trio
async def test_an_empty_source_is_an_empty_directory() -> None:
    async with shown(MemorySource()) as tree:
        assert await tree.root.children() == {}
        assert await tree.root.stat() == directory_stat()


@in_trio
async def test_files_read_as_what_was_backed_up() -> None:
    async with shown(filled()) as tree:
        opened = await (await image(tree, f"vm/100/latest/{IMAGE}")).open()
        assert await opened.read(0, 1 << 20) == CONTENT
        assert await (await small_file(tree, "vm/100/latest/qemu-server.conf")).read() == CONF
        stream = await (await image(tree, "host/9/latest/root.pxar")).open()
        assert await stream.read(0, 1 << 20) == CONTENT


@in_trio
async def test_files_whose_names_collide_are_all_there() -> None:
    stored = ["x.img.blob.blob", "x.img.fidx", "x.img.blob", "x.img.didx"]
    for order in (stored, stored[::-1], stored[2:] + stored[:2]):
        source = MemorySource()
        source.add(made.snapshot(), {name: name.encode() for name in order})
        async with shown(source) as tree:
            found = await (await directory(tree, "vm/100/latest")).children()
            files = {
                node.file.archive.filename
                for node in found.values()
                if isinstance(node, (BlobFile, ImageFile))
            }
            assert files == {*stored, "index.json.blob"}
            assert b"x.img" in found
            for name in stored:  # and each can be had by its stored name
                node = await tree.find(f"vm/100/latest/{name}")
                assert isinstance(node, (BlobFile, ImageFile))
                assert node.file.archive.filename == name


# --- latest


@in_trio
async def test_latest_is_the_newest_snapshot_and_moves_on() -> None:
    source = filled()
    async with shown(source) as tree:
        link = await latest(tree, "vm/100")
        assert await link.target() == DAYS[1].encode()
        assert await link.stat() == Stat(
            len(DAYS[1]), mode=LINK_MODE, mtime_ns=(TIME + DAY) * 10**9, target=DAYS[1].encode()
        )
        source.add(made.snapshot("100", time=TIME + 2 * DAY), FILES)
        assert await link.target() == DAYS[1].encode()
        await trio.sleep(5)
        assert await link.target() == DAYS[2].encode()
        del source.infos[made.snapshot("100", time=TIME + 2 * DAY)]
        await trio.sleep(5)
        assert await link.target() == DAYS[1].encode()


@in_trio
async def test_a_broken_snapshot_is_shown_with_its_error_and_is_never_latest() -> None:
    source = filled()
    newest = made.snapshot("100", time=TIME + 2 * DAY)
    source.infos[newest] = broken(newest)
    async with shown(source) as tree:
        assert await names(tree, "vm/100") == [*DAYS, "latest"]
        node = await directory(tree, f"vm/100/{DAYS[2]}")
        with pytest.raises(DamageError, match=rf"{DAYS[2]}: unreadable manifest: CRC mismatch"):
            await node.children()
        with pytest.raises(DamageError):
            await tree.find(f"vm/100/{DAYS[2]}/{IMAGE}")
        assert (await node.stat()).mtime_ns == (TIME + 2 * DAY) * 10**9
        assert (await node.facts())["error"] == "unreadable manifest: CRC mismatch"
        assert await (await latest(tree, "vm/100")).target() == DAYS[1].encode()


@in_trio
async def test_a_group_of_broken_snapshots_only_has_no_latest() -> None:
    source = MemorySource()
    source.infos[made.snapshot()] = broken(made.snapshot())
    async with shown(source) as tree:
        assert await names(tree, "vm/100") == [DAYS[0]]
        with pytest.raises(NotFoundError, match="there is no 'latest'"):
            await tree.find("vm/100/latest")


@in_trio
async def test_a_link_that_leads_nowhere_any_more_says_so() -> None:
    source = MemorySource()
    source.add(made.snapshot(), FILES)
    async with shown(source) as tree:
        link = await latest(tree, "vm/100")
        source.infos[made.snapshot()] = broken(made.snapshot())
        await trio.sleep(5)
        with pytest.raises(NotFoundError, match="there is no finished snapshot"):
            await link.target()
        assert await link.stat() == Stat(mode=LINK_MODE, exact=False)


@in_trio
async def test_names_are_bytes_and_need_not_be_text() -> None:
    class Odd(Directory):
        async def list_values(self) -> list[tuple[bytes, object]]:
            return [(b"caf\xe9", 1), (b"line\nbreak", 2)]

        def make(self, name: bytes, value: int) -> Node:
            return Odd(self.tree, self, name)

    async with shown(MemorySource()) as tree:
        odd = Odd(tree, None, b"")
        node = await odd.child(b"caf\xe9")
        assert (node.name, node.path, str(node)) == (b"caf\xe9", b"caf\xe9", "caf\\xe9")
        assert isinstance(node, Odd)
        assert (await node.child(b"line\nbreak")).path == b"caf\xe9/line\nbreak"
        with pytest.raises(NotFoundError, match="there is no 'na"):
            await odd.child(b"na\xefve")
