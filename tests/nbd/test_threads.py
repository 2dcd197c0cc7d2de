"""Python's states of nbdkit's threads: one for each thread, which goes with it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.disks import ONE
from tests.support.nbd import Client, Nbdkit, nbdkit
from tests.support.program import environment
from tests.support.stocked import Stocked
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tests/support/state_plugin.py"


@pytest.fixture(params=[1, 3])
def counting(request: pytest.FixtureRequest) -> Iterator[tuple[Nbdkit, int]]:
    """nbdkit with a plugin that counts states, and the number of threads of each connection."""
    told = environment() | {"PYTHONPATH": str(ROOT)}
    with nbdkit(told, options=["-t", str(request.param)], plugin=str(PLUGIN)) as found:
        yield found, request.param


def states(client: Client) -> tuple[int, int]:
    """How many were made, and how many live."""
    made, living = struct.unpack("<QQ", client.read(0, 16))
    return made, living


def test_a_thread_has_one_state_for_all_reads(counting: tuple[Nbdkit, int]) -> None:
    server, threads = counting
    with server.connect() as client:
        for _ in range(200):
            states(client)
        assert states(client)[0] <= threads


def test_the_state_of_a_thread_that_ended_is_gone(counting: tuple[Nbdkit, int]) -> None:
    server, threads = counting
    for _ in range(20):
        with server.connect() as client:
            for _ in range(3 * threads):
                states(client)
    with server.connect() as client:
        made = states(client)[0]
        assert made >= 20
        wait_until(lambda: states(client)[1] <= threads, "only the threads of this connection have a state")


def test_nbdkit_ends_in_order_while_clients_are_connected(counting: tuple[Nbdkit, int]) -> None:
    server, _threads = counting
    clients = [server.connect() for _ in range(4)]
    for client in clients:
        states(client)
    server.process.terminate()
    for client in clients:
        client.abandon()
    server.check_end()


def test_a_small_read_needs_no_new_memory(stocked: Stocked) -> None:
    reads = 3000
    with nbdkit(stocked.path, *ONE) as server, server.connect() as client:
        for _ in range(200):
            client.read(0, 512)
        before = faults(server)
        for _ in range(reads):
            client.read(0, 512)
        assert faults(server) - before < reads / 2


def faults(server: Nbdkit) -> int:
    """The pages that the kernel gave to it (minflt, proc_pid_stat(5))."""
    return int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[7])
