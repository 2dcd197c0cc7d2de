"""The limit on connections: what is refused, and that the place of a connection that ends is free again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from pbsfs.base.errors import UnavailableError
from pbsfs.nbd.connections import Connections
from tests.nbd.disks import ONE
from tests.support.nbd import Client, connected, nbdkit
from tests.support.stocked import IMAGE, Stocked
from tests.support.waiting import wait_until


def in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_each_connection_counts_until_its_thread_ends() -> None:
    connections, end = Connections(3), threading.Event()
    admitted = threading.Semaphore(0)

    def connection() -> None:
        connections.admit()
        admitted.release()
        end.wait()

    threads = [threading.Thread(target=connection) for _ in range(3)]
    for thread in threads:
        thread.start()
        admitted.acquire()
    for _ in range(2):
        with pytest.raises(
            UnavailableError, match="connection refused: 3 NBD connections are open; close some"
        ):
            connections.admit()
    end.set()
    for thread in threads:
        thread.join()
    for _ in range(10):
        in_thread(connections.admit)
    connections.admit()
    connections.admit()  # of the same thread: its connection before has ended


def greeted(connection: socket.socket) -> bool:
    """Whether nbdkit takes the connection: it says the first word."""
    with_end = connection.recv(16)
    assert with_end in (b"", b"NBDMAGICIHAVEOPT")
    return with_end != b""


@pytest.mark.parametrize("silent", [False, True])
def test_connections_beyond_the_limit_are_refused_and_the_others_served(
    stocked: Stocked, silent: bool
) -> None:
    """`silent`: clients that connect and never say anything count like those that read."""
    limit = 4
    with nbdkit(stocked.path, *ONE, f"nbd_connections={limit}") as server, ExitStack() as stack:
        taken: list[Client | socket.socket] = []
        for _ in range(limit):
            raw = connected(server.socket)
            taken.append(raw if silent else Client(raw))
            stack.callback(raw.close)
            assert not silent or greeted(raw)
        for _ in range(100):
            with connected(server.socket) as raw:
                assert not greeted(raw)
        for client in taken:
            assert not isinstance(client, Client) or client.read(0, 512) == stocked.contents[IMAGE][:512]
        lines = server.log_lines()
        assert len(lines) == 100
        assert all(
            line.endswith(
                f"connection refused: {limit} NBD connections are open; "
                "close some, or give a larger nbd_connections="
            )
            for line in lines
        ), lines[0]
        first = taken.pop()
        if isinstance(first, Client):
            first.disconnect()
        else:
            first.close()

        def one_more() -> bool:
            raw = connected(server.socket)
            stack.callback(raw.close)
            return greeted(raw)

        wait_until(one_more, "nbdkit takes another one in its place")
