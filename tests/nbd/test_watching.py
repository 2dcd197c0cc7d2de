"""What an NBD server says of itself: to `pbsfs stats`, as OpenMetrics, and in its log after SIGUSR1."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pbsfs.base.errors import HelperError
from pbsfs.nbd import watching
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tasks.metrics import request
from tests.nbd.disks import ONE
from tests.support import damage
from tests.support.nbd import NbdError, nbdkit
from tests.support.needs import need_root
from tests.support.program import PBSFS, error_of, output_of, pbsfs, run
from tests.support.stocked import CHUNK, IMAGE, Stocked, stock
from tests.support.waiting import wait_until


def test_the_numbers_of_a_server_are_printed_by_its_address_and_its_process(stocked: Stocked) -> None:
    with nbdkit(stocked.path, "path=") as server, server.connect(IMAGE) as client:
        assert client.read(0, CHUNK) == stocked.contents[IMAGE][:CHUNK]
        found = json.loads(output_of(PBSFS, "stats", "--json", str(server.pid)))
        assert found["reads"] == 1
        assert found["bytes_served"] == CHUNK
        assert found["fetches"] == found["fetches_within_10s"] == 1
        assert (found["connections"], found["open_exports"]) == (1, 1)
        assert found["parsers"] == found["sessions"] == found["retries"] == 0
        assert found["cache_bytes"] == CHUNK
        lines = output_of(PBSFS, "stats", str(server.pid)).splitlines()
        assert [line.split()[0] for line in lines] == list(found)
        listed = json.loads(run([PBSFS, "status", "--json"]).stdout)  # fails if another mount is dead
        (entry,) = (entry for entry in listed if entry["state"] == f"process {server.pid}")
        if entry["place"].startswith("nbd"):
            assert json.loads(output_of(PBSFS, "stats", "--json", entry["place"]))["reads"] == 1


def test_the_address_that_pbsfs_nbd_prints_names_the_server(stocked: Stocked) -> None:
    command = f'{PBSFS} stats --json "$uri"'
    text = output_of(PBSFS, "nbd", "--datastore-dir", stocked.path, IMAGE, "--run", command)
    assert json.loads(text)["reads"] == 0


def test_errors_are_counted(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    digest = hashlib.sha256(own.contents[IMAGE][:CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 1000)
    with nbdkit(own.path, *ONE) as server, server.connect() as client:
        with pytest.raises(NbdError):
            client.read(0, 10)
        assert server.log_lines()
        found = json.loads(output_of(PBSFS, "stats", "--json", str(server.pid)))
        assert (found["errors_damage"], found["errors_source"], found["reads"]) == (1, 0, 0)


def test_what_is_no_server_is_an_error() -> None:
    assert "there is no NBD server '1'; " in error_of(pbsfs("stats", "1"), 9)
    assert "there is no NBD server 'nbd://none'; " in error_of(pbsfs("stats", "nbd://none"), 9)
    with pytest.raises(HelperError, match=f"NBD server {os.getpid()}: does not give its numbers: Connection"):
        watching.ask(os.getpid())


def test_a_program_that_took_the_name_is_not_asked(stocked: Stocked) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind("\0pbsfs-nbd-1")
        taken.listen()
        with pytest.raises(HelperError, match="another process answers in its name"):
            watching.ask(1)


def test_sigusr1_logs_the_numbers(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE) as server, server.connect() as client:
        os.kill(server.pid, signal.SIGUSR1)
        wait_until(server.log_lines, "it is logged")
        (line,) = server.log_lines()
        assert f"INFO: {DirectorySource(stocked.path)}: uptime_seconds=" in line
        assert " connections=1 " in line
        assert client.read(0, 10)  # it serves on


def test_the_numbers_are_served_as_openmetrics(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE, f"metrics={(path := f'/tmp/pbsfs-nbd-{os.getpid()}')}") as server:
        assert server.read() == stocked.contents[IMAGE]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            text = request(client, "/metrics")
        assert f"\npbsfs_bytes_served_total {len(stocked.contents[IMAGE])}\n" in text
        assert "\n# TYPE pbsfs_connections gauge\n" in text
        assert "\n# TYPE pbsfs_parsers gauge\n" in text
    assert not os.path.lexists(path)


def test_other_users_get_no_answer(stocked: Stocked) -> None:
    need_root("become another user")
    program = (  # which imports first: the checkout may be root's own
        "import os, sys; from pbsfs.nbd import watching; os.setuid(65534); watching.ask(int(sys.argv[1]))"
    )
    with nbdkit(stocked.path, *ONE) as server:
        line = [sys.executable, "-c", program, str(server.pid)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        assert "HelperError" in done.stderr
        assert watching.ask(server.pid)
