"""The exports without nbdkit: clients that go away at the wrong moment, and failures in the loop."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from pbsfs.formats.manifest import CryptMode
from pbsfs.nbd import exports
from pbsfs.nbd.limits import Limits
from pbsfs.nbd.loop import StoppedError
from pbsfs.nbd.parameters import Parameters
from pbsfs.nbd.server import SMALL_BUFFER, Export, Server
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.tree import ImageFile, Node, Tree
from tests.support import made
from tests.support.run import in_trio
from tests.support.serving import SECRET, TOKEN, serving
from tests.support.sources import MemorySource
from tests.support.stocked import CHUNK, FIRST, IMAGE, stock
from tests.support.waiting import wait_until


class Clients:
    """`there`: whether they still wait for what they asked for."""

    def __init__(self) -> None:
        self.there = True


@pytest.fixture
def clients() -> Clients:
    return Clients()


@pytest.fixture
def limits() -> Limits:
    return Limits(patience=0.01)


@pytest.fixture
def server(tmp_path: Path, clients: Clients, limits: Limits) -> Iterator[Server]:
    """All images of a datastore."""
    parameters = Parameters({})
    parameters.take("datastore_dir", str(stock(tmp_path).path))
    served = Server(parameters.settings(), wanted=lambda: clients.there, limits=limits)
    served.start()
    yield served
    served.stop()


def test_an_export_whose_client_goes_while_it_is_opened_is_not_kept(
    server: Server, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, opened = threading.Event(), threading.Event()
    real = ImageFile.open

    async def slow(node: ImageFile) -> Image:
        await trio.to_thread.run_sync(go_on.wait)
        image = await real(node)
        opened.set()
        return image

    monkeypatch.setattr(ImageFile, "open", slow)
    clients.there = False
    with pytest.raises(StoppedError):
        server.open(IMAGE)
    clients.there = True
    go_on.set()
    wait_until(opened.is_set, "it is opened for nobody")

    async def still_open() -> bool:
        return bool(server._exports._open)

    wait_until(lambda: not server.loop.call(still_open), "it is closed")


def test_what_fails_in_the_loop_does_not_end_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise MemoryError

    server.loop.post(fail)
    wait_until(lambda: "a request to the loop failed" in caplog.text, "it is logged")
    caplog.clear()
    assert server.open(IMAGE).size > 0


def test_a_failure_that_is_a_time_limit_is_told(server: Server) -> None:
    async def fail() -> None:
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        server.loop.call(fail)


def read(export: Export) -> bytes:
    content = bytearray(export.size)
    export.read_into(memoryview(content), 0)
    return bytes(content)


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_a_backup_made_again_is_served_with_its_new_content_to_those_who_open_it_then(
    tmp_path: Path, kind: str
) -> None:
    own = stock(tmp_path / "datastore")
    parameters = Parameters({})
    with ExitStack() as stack:
        if kind == "directory":
            parameters.take("datastore_dir", str(own.path))
        else:
            (tmp_path / "secret").write_text(SECRET)
            from_server = stack.enter_context(serving(own.path))
            parameters.take("repo", from_server.repository(TOKEN))
            parameters.take("password", f"+{tmp_path / 'secret'}")
            parameters.take("fingerprint", from_server.fingerprint)
        served = Server(parameters.settings(), limits=Limits(refresh=0.0))
        served.start()
        stack.callback(served.stop)
        old = own.contents[IMAGE]
        connections = [served.open(IMAGE) for _ in range(4)]
        assert all(read(connection) == old for connection in connections)
        content = made.image(77, "r0rr0rtr", tail=1536)
        assert len(content) == len(old)
        shutil.rmtree(own.path / FIRST)
        own.writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": content}, chunk_size=CHUNK)
        # Connections of one client must see one image: while one is open, it stays what it is.
        connections.append(served.open(IMAGE))
        assert all(read(connection) == old for connection in connections)
        for connection in connections:
            connection.close()
        connections = [served.open(IMAGE) for _ in range(4)]
        assert all(read(connection) == content for connection in connections)


def test_clients_that_list_at_once_have_the_datastore_walked_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    walks = []
    real = Tree.find

    async def slow(tree: Tree, path: str) -> Node:
        walks.append(path)
        await trio.testing.wait_all_tasks_blocked(0.01)  # until the other clients wait too
        return await real(tree, path)

    monkeypatch.setattr(Tree, "find", slow)
    with ThreadPoolExecutor(8) as threads:
        first, *others = threads.map(lambda _: server.list(), range(8))
    assert first
    assert others == [first] * 7
    assert server.list() == first
    assert len(walks) == 1
    caplog.clear()  # of exports without their key


@pytest.mark.parametrize("limits", [Limits(refresh=0.0)])
def test_the_list_of_exports_is_renewed(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = server.list()

    async def nothing(_node: Node) -> list[tuple[str, ImageFile]]:
        return []

    monkeypatch.setattr(exports, "images_below", nothing)
    assert before
    caplog.clear()  # of exports without their key
    assert server.list() == []


def test_the_log_counts_exports_without_their_key_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stocked = stock(tmp_path)
    for group in ("102", "103", "104"):
        files = {"drive-scsi0.img.fidx": made.image(4, "r0")}
        stocked.writer.add_snapshot(
            made.snapshot(group), files, crypt_mode=CryptMode.ENCRYPT, key=made.KEY, chunk_size=CHUNK
        )
    parameters = Parameters({})
    parameters.take("datastore_dir", str(stocked.path))
    served = Server(parameters.settings())
    served.start()
    try:
        assert served.list()
    finally:
        served.stop()
    (line,) = [record.getMessage() for record in caplog.records]
    caplog.clear()
    assert "were not given: vm/10" in line
    assert ", … (8 in all), with the keys " in line  # a snapshot and `latest` of each group


@in_trio
async def test_large_requests_have_no_image_lose_its_digest_table() -> None:
    """That would free none of nbdkit's buffers, and each read would fetch a table again."""
    content = made.image(1, "r" + "0" * 9)
    source = MemorySource()
    infos = [source.add(made.snapshot(name), {"disk.img.fidx": content}) for name in ("100", "101")]
    served = cast("Server", SimpleNamespace(loop=SimpleNamespace(post=lambda _work: None)))
    async with open_reader(source, cache_size=0, open_limit=SMALL_BUFFER) as reader:
        first = await reader.open_image(infos[0], infos[0].files[0])
        export = Export(served, "", first.handle(), "", 1)
        export.read_into(memoryview(bytearray(SMALL_BUFFER + 1)), CHUNK)
        second = await reader.open_image(infos[1], infos[1].files[0])
        for image in (first, second, first, second):
            assert await image.read(0, 10) == content[:10]
        assert source.calls["fetch_file"] == len(infos)
