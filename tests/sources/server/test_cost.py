"""What looking and reading cost the server, in requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from pbsfs.base.names import Namespace
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Directory, Tree
from tests.sources.server import serving
from tests.sources.server.serving import CHUNK, CONTENT, FIRST, image_of, read_all, reading, source_of, until
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.server import ReferenceServer

GROUPS = 30
SNAPSHOTS = 10
NAMESPACES = ("prod", "prod/db", "test")


def filled(path: Path, *, groups: int, snapshots: int) -> Path:
    """A datastore with so many groups, and so many snapshots in each."""
    writer = DatastoreWriter(path)
    for number in range(groups):
        for day in range(snapshots):
            snapshot = made.snapshot(str(100 + number), time=TIME + day * DAY)
            writer.add_snapshot(snapshot, {"a.img.fidx": b"x", "c.conf.blob": b"y"})
    return writer.path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("large") / "datastore", groups=GROUPS, snapshots=SNAPSHOTS)


async def walk(node: Directory) -> int:
    """Lists all below a directory, as `find` does; returns how many there are."""
    count = 0
    for child in (await node.children()).values():
        await child.glance()
        count += 1 + (await walk(child) if isinstance(child, Directory) else 0)
    return count


def requests_of_walk(path: Path) -> tuple[int, int]:
    async def main() -> tuple[int, int]:
        with serving.served(path) as server:
            async with reading(source_of(server)) as reader:
                server.requests.clear()
                found = await walk(Tree(reader).root)
                return found, server.requests.count()

    return trio.run(main)


def test_listing_the_groups_of_a_namespace_costs_two_requests_however_many_there_are(large: Path) -> None:
    async def main() -> None:
        with serving.served(large) as server:
            async with reading(source_of(server)) as reader:
                server.requests.clear()
                tree = Tree(reader)
                for _turn in range(3):
                    node = await tree.find("vm")
                    assert isinstance(node, Directory)
                    children = await node.children()
                    assert len(children) == GROUPS
                    for child in children.values():
                        await child.stat()
                paths = [record.path.rpartition("/")[2] for record in server.requests.all()]
                assert sorted(paths) in (["groups"], ["groups", "namespace"])

    trio.run(main)


def test_walking_through_everything_costs_a_request_for_each_group_and_none_for_a_snapshot(
    large: Path, tmp_path: Path
) -> None:
    found, requests = requests_of_walk(large)
    assert found == 1 + GROUPS * (2 + SNAPSHOTS * 4)
    assert requests <= GROUPS + 3

    few, fewer_requests = requests_of_walk(filled(tmp_path / "few", groups=GROUPS, snapshots=1))
    assert few < found
    assert fewer_requests == requests


def test_a_tree_of_namespaces_costs_a_request_for_each(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    for name in NAMESPACES:
        writer.add_snapshot(made.snapshot(namespace=Namespace.parse(name)), {})

    _found, requests = requests_of_walk(writer.path)
    # Of each its groups, and the root's; the snapshots of each group; and the namespaces, once for all.
    assert requests <= (len(NAMESPACES) + 1) + len(NAMESPACES) + 1


def test_a_listing_is_kept_for_seconds_and_then_asked_again(server: ReferenceServer) -> None:
    clock = trio.testing.MockClock(rate=0)

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            tree = Tree(reader)
            await tree.find("vm/100/latest")
            server.requests.clear()
            for _turn in range(10):
                await tree.find("vm/100/latest")
                clock.jump(0.4)
            assert server.requests.count() == 0
            clock.jump(10)
            await tree.find("vm/100/latest")
            assert 2 <= server.requests.count() <= 3

    trio.run(main, clock=clock)


def test_nothing_is_asked_when_nobody_looks(server: ReferenceServer) -> None:
    limits = ServerLimits(idle_time=0.02)

    async def main() -> None:
        async with reading(source_of(server, limits=limits)) as reader:
            assert await read_all(await image_of(reader)) == CONTENT
            await walk(Tree(reader).root)
            await until(lambda: not server.open_sessions())
            server.requests.clear()
            connections = server.connections
            for _turn in range(10):  # of the loop that looks for idle sessions
                await trio.sleep(limits.idle_time)
            assert server.requests.count() == 0
            assert server.connections == connections

    trio.run(main)


def test_opening_a_file_asks_for_its_manifest_and_index_once(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            info = await serving.info_of(reader)
            server.requests.clear()
            images = []
            for _turn in range(5):
                images.append(await reader.open_image(info, info.files[0]))
                assert await images[-1].read(0, CHUNK) == CONTENT[:CHUNK]
            targets = [record.target for record in server.requests.all()]
            assert len([t for t in targets if "file-name=index.json.blob" in t]) == 1
            assert len([t for t in targets if t.startswith("/download?file-name=")]) == 1
            assert len([t for t in targets if t.startswith("/api2/json/reader?")]) == 1
            assert len([t for t in targets if t.startswith("/chunk?")]) == 1
            assert len(targets) == 4

    trio.run(main)


def test_the_images_of_a_snapshot_cost_one_manifest(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            info = await serving.info_of(reader)
            for file in info.files:
                if file.archive.filename.endswith("idx"):
                    await reader.open_image(info, file)
            assert server.requests.count("file-name=index.json.blob") == 1
            assert server.requests.count("/reader?") == 1

    trio.run(main)


def test_a_chunk_that_many_read_is_asked_for_once(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            image = await image_of(reader, FIRST)
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(image.read, number * 100, 100)
            assert server.requests.count("/chunk") == 1

    trio.run(main)


def test_a_login_serves_all_requests(server: ReferenceServer) -> None:
    async def main() -> None:
        async with reading(source_of(server)) as reader:
            await walk(Tree(reader).root)
            assert await read_all(await image_of(reader)) == CONTENT

    trio.run(main)
    assert server.requests.count("/access/ticket") == 1


def test_lists_share_a_few_connections(large: Path) -> None:
    async def main() -> None:
        with serving.served(large) as server:
            async with reading(source_of(server)) as reader:
                assert await walk(Tree(reader).root)
                assert server.connections <= DEFAULT.kept_connections

    trio.run(main)
