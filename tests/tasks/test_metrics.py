"""The numbers of a mount, served as OpenMetrics."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.base.errors import MountError, UsageError
from pbsfs.tasks.metrics import MAX_REQUEST, MetricsAddress, listening
from tests.support.mounts import mounted, refusal
from tests.support.program import error_of, pbsfs
from tests.support.stocked import IMAGE, Stocked


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Path]:
    """A place for a socket: its path may have 107 bytes."""
    place = Path(f"/tmp/pbsfs-metrics-{os.getpid()}")
    place.mkdir(mode=0o700)
    yield place
    for left in place.iterdir():
        left.unlink()
    place.rmdir()


def ask(path: Path, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, str]:
    """The status and the body of an answer; nothing where the connection is closed without one."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(request)
        answer = b""
        while more := client.recv(65536):
            answer += more
    head, _blank, body = answer.decode().partition("\r\n\r\n")
    if body:
        assert f"Content-Length: {len(body)}" in head
    return head.split("\r\n")[0].partition(" ")[2], body


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:9101", "127.0.0.1:9101"),
        (":9101", "127.0.0.1:9101"),
        ("[::1]:9101", "[::1]:9101"),
        ("/run/x/../s", "/run/s"),
    ],
)
def test_an_address_is_a_path_or_a_port_of_loopback(text: str, shown: str) -> None:
    assert str(MetricsAddress.parse(text)) == shown
    assert MetricsAddress.parse(shown) == MetricsAddress.parse(text)


@pytest.mark.parametrize(
    "text", ["", "9101", "0.0.0.0:9101", "192.0.2.1:80", "[::]:1", "a:1", ":0", ":65536", ":٣", "localhost:1"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a place to serve numbers"):
        MetricsAddress.parse(text)


def test_a_socket_is_private_and_removed_at_the_end(short: Path) -> None:
    path = short / "s"
    with listening(MetricsAddress.parse(str(path))):
        found = path.stat().st_mode
        assert stat.S_ISSOCK(found)
        assert stat.S_IMODE(found) == 0o600
        with pytest.raises(MountError, match="Address already in use"), listening(MetricsAddress(str(path))):
            pass
        assert path.exists()
    assert not path.exists()


def test_only_a_socket_that_nothing_listens_on_is_replaced(short: Path) -> None:
    path = short / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listening(MetricsAddress(str(path))):
        pass
    path.write_text("precious")
    with pytest.raises(MountError, match="Address already in use"), listening(MetricsAddress(str(path))):
        pass
    assert path.read_text() == "precious"


@pytest.mark.mount
def test_the_numbers_of_a_mount_are_served(stocked: Stocked, tmp_path: Path, short: Path) -> None:
    path = short / "s"
    with mounted(stocked.path, tmp_path / "m", "--metrics", str(path)) as mount:
        assert (mount / IMAGE).read_bytes()
        status, text = ask(path)
        assert status == "200 OK"
        lines = text.split("\n")
        assert lines[-2:] == ["# EOF", ""]
        samples = [line for line in lines[:-2] if not line.startswith("# TYPE ")]
        form = re.compile(r'pbsfs_[a-z0-9_]+(\{le="[0-9.+Inf]+"\})? [0-9.]+')
        assert all(form.fullmatch(line) for line in samples)
        found = dict(line.rsplit(" ", 1) for line in samples)
        assert len(found) == len(samples)
        assert int(found["pbsfs_bytes_served_total"]) >= (mount / IMAGE).stat().st_size
        fetches = int(found["pbsfs_chunk_fetch_seconds_count"])
        assert int(found['pbsfs_chunk_fetch_seconds_bucket{le="+Inf"}']) == fetches > 0
        assert int(found["pbsfs_resident_bytes"]) > 0
        assert ask(path, b"GET /other HTTP/1.1\r\n\r\n") == ("404 Not Found", "")
        assert ask(path, b"POST /metrics HTTP/1.1\r\n\r\n") == ("405 Method Not Allowed", "")
        assert ask(path, b"HEAD /metrics HTTP/1.1\r\n\r\n") == ("200 OK", "")
        assert ask(path, b"x" * (MAX_REQUEST + 1)) == ("", "")
        assert ask(path)[0] == "200 OK"
        (tmp_path / "m2").mkdir()
        used = refusal(tmp_path / "m2", "--datastore-dir", stocked.path, "--metrics", str(path))
        assert "Address already in use; name another place" in used
        mount.signal(signal.SIGTERM)
    assert not path.exists()


@pytest.mark.mount
def test_an_address_that_others_reach_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    words = ("mount", "--datastore-dir", stocked.path, "--metrics", "0.0.0.0:9101", tmp_path / "m")
    assert "--metrics '0.0.0.0:9101': not a place to serve numbers" in error_of(pbsfs(*words), 2)
