"""The exports without nbdkit: clients that go away at the wrong moment, and failures in the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pbsfs.nbd.exports import Server, StoppedError
from pbsfs.nbd.parameters import Parameters
from pbsfs.reader.image import Image
from pbsfs.tree import ImageFile
from tests.support.stocked import IMAGE, stock
from tests.support.waiting import wait_until


class Clients:
    """`there`: whether they still wait for what they asked for."""

    def __init__(self) -> None:
        self.there = True


@pytest.fixture
def clients() -> Clients:
    return Clients()


@pytest.fixture
def server(tmp_path: Path, clients: Clients, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """All images of a datastore."""
    monkeypatch.setattr(Server, "patience", 0.01)
    parameters = Parameters({})
    parameters.take("datastore_dir", str(stock(tmp_path).path))
    served = Server(parameters.settings(), wanted=lambda: clients.there)
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

    wait_until(lambda: not server.call(still_open), "it is closed")


def test_what_fails_in_the_loop_does_not_end_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise MemoryError

    server.post(fail)
    wait_until(lambda: "a request to the loop failed" in caplog.text, "it is logged")
    caplog.clear()
    assert server.open(IMAGE).size > 0


def test_a_failure_that_is_a_time_limit_is_told(server: Server) -> None:
    async def fail() -> None:
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        server.call(fail)
