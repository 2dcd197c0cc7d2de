"""Text from outside, in every place where pbsfs shows some: no terminal and no log gets it raw."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import made
from tests.support.nbd import NbdError, nbdkit
from tests.support.program import PBSFS, TIMEOUT, environment
from tests.support.server import ReferenceServer, Status
from tests.support.serving import access, serving
from tests.support.stocked import FIRST, IMAGE, Stocked, stock

HOSTILE = "evil\x1b]0;title\x07\x1b[31m\nforged: line\r\x9b2J\u202e\u2028end"
"""Escape codes of terminals, line breaks of three kinds, and a change of direction."""

MANIFEST = "index.json.blob"


@pytest.fixture
def server(own: Stocked) -> Iterator[ReferenceServer]:
    with serving(own.path) as found:
        yield found


def check(text: str, *, mentioned: bool = True) -> None:
    """`text` is printable, and no line of it was made outside; with `mentioned`, it has the hostile text."""
    lines = text.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if line.startswith("forged")] == []
    assert not mentioned or "evil" in text


@dataclass
class Ended:
    """A run of pbsfs, with every byte that it wrote: universal newlines would hide a carriage return."""

    status: int
    output: str
    errors: str


def pbsfs(*arguments: str | Path, env: dict[str, str] | None = None) -> Ended:
    done = subprocess.run(
        [PBSFS, *arguments],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=env or environment(),
        timeout=TIMEOUT,
    )
    errors = done.stderr.decode()
    assert "Traceback" not in errors
    return Ended(done.returncode, done.stdout.decode(), errors)


def both(done: Ended) -> str:
    return done.output + done.errors


# --- a server's words

LISTS = {
    "namespaces": ("/namespace", {"ns": HOSTILE}),
    "groups": ("/groups", {"backup-type": "vm", "backup-id": HOSTILE, "backup-count": 1, "last-backup": 1}),
    "types": ("/groups", {"backup-type": HOSTILE, "backup-id": "100", "backup-count": 1, "last-backup": 1}),
    "snapshots": ("/snapshots", {"backup-type": "vm", "backup-id": HOSTILE, "backup-time": 1, "files": []}),
}


@pytest.mark.parametrize("what", LISTS)
def test_what_a_server_lists_is_shown_escaped(server: ReferenceServer, tmp_path: Path, what: str) -> None:
    target, entry = LISTS[what]
    text = json.dumps({"data": [entry]})
    server.faults.add(Status(match=target, status=200, text=text, times=None))
    log = tmp_path / "log"
    for path in ("/", "vm/100", "ns"):
        check(both(pbsfs("ls", "-l", path, env=access(server))), mentioned=False)
        check(
            both(pbsfs("ls", path, "--log-level", "debug", "--log-file", log, env=access(server))),
            mentioned=False,
        )
    check(log.read_text(encoding="utf-8"), mentioned=False)


@pytest.mark.parametrize("target", ["/access/ticket", "/namespace", "/groups", "/snapshots", "/reader"])
@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_words_of_a_servers_error_are_shown_escaped(
    server: ReferenceServer, target: str, status: int
) -> None:
    server.faults.add(Status(match=target, status=status, text=HOSTILE, times=None))
    command = ("export", IMAGE, "-") if target == "/reader" else ("ls", "vm/100")
    done = pbsfs(*command, "--retry-timeout", "0", env=access(server))
    assert done.status != 0
    check(done.errors, mentioned=False)


def test_the_names_of_a_servers_datastores_are_shown_escaped(server: ReferenceServer) -> None:
    text = json.dumps({"data": [{"store": HOSTILE}]})
    server.faults.add(Status(match="/admin/datastore/", status=403, text=HOSTILE, times=None))
    server.faults.add(Status(match="/admin/datastore", status=200, text=text, times=None))
    told = access(server) | {"PBS_REPOSITORY": access(server)["PBS_REPOSITORY"] + "x"}
    check(both(pbsfs("ls", env=told)))


def test_the_names_of_a_servers_realms_are_shown_escaped(server: ReferenceServer) -> None:
    text = json.dumps({"data": [{"realm": HOSTILE}]})
    server.faults.add(Status(match="/access/domains", status=200, text=text, times=None))
    check(both(pbsfs("ls", env=access(server, PBS_PASSWORD="wrong"))))


# --- a datastore directory


def test_names_in_a_datastore_directory_are_shown_escaped(own: Stocked, tmp_path: Path) -> None:
    for place in ("vm", "vm/100", "ns/prod/vm", "ns/prod/vm/100"):
        inside = own.path / place / HOSTILE
        for directory in (inside, inside / FIRST.rpartition("/")[2]):
            directory.mkdir()
            (directory / MANIFEST).write_bytes(b"")
    (own.path / FIRST / f"{HOSTILE}.img.fidx").write_bytes(b"")
    log = tmp_path / "log"
    for path in ("/", "vm", "vm/100", FIRST):
        check(both(pbsfs("ls", "-lR", "--datastore-dir", own.path, path)), mentioned=path != FIRST)
    pbsfs("ls", "-R", "--log-level", "debug", "--log-file", log, "--datastore-dir", own.path)
    check(log.read_text(encoding="utf-8"))


def test_notes_and_owners_are_shown_escaped(own: Stocked) -> None:
    name = made.snapshot("9")
    own.writer.add_snapshot(
        name, {"a.img.fidx": b"x" * 512}, notes=HOSTILE, owner=HOSTILE, verify_state=HOSTILE
    )
    text = both(pbsfs("info", "--datastore-dir", own.path, "vm/9/latest"))
    check(text)
    parsed = pbsfs("info", "--json", "--datastore-dir", own.path, "vm/9/latest")
    check(parsed.output)
    assert json.loads(parsed.output)["notes"] == HOSTILE
    with nbdkit(own.path, "vmid=9", "image=a.img", "timestamp=latest") as served, served.connect() as client:
        assert client.size == 512
        check(" ".join(served.log_lines()), mentioned=False)


def test_a_path_that_a_user_pastes_is_shown_escaped(own: Stocked) -> None:
    for command in ("ls", "info", "verify", "boot"):
        for path in (HOSTILE, f"vm/{HOSTILE}", f"{FIRST}/{HOSTILE}"):
            done = pbsfs(command, "--datastore-dir", own.path, path)
            assert done.status in {2, 3}
            check(done.errors)
            assert len(done.errors.splitlines()) == 1
    done = pbsfs(HOSTILE)
    assert done.status == 2
    check(done.errors)


def test_the_path_of_a_damaged_datastore_is_shown_escaped(tmp_path: Path) -> None:
    own = stock(tmp_path / HOSTILE)
    (own.path / FIRST / MANIFEST).write_bytes(b"damaged")
    for command in (["ls", "-R"], ["ls", FIRST], ["info", IMAGE], ["verify"]):
        done = pbsfs(*command, "--datastore-dir", own.path)
        check(done.errors, mentioned=False)
        check(done.output, mentioned=False)


def test_the_name_of_a_missing_datastore_is_shown_escaped(tmp_path: Path) -> None:
    done = pbsfs("ls", "--datastore-dir", tmp_path / HOSTILE, env=environment())
    assert done.status != 0
    check(done.errors)


# --- a client of network block devices


def test_the_export_names_of_clients_are_logged_escaped(own: Stocked) -> None:
    with nbdkit(own.path) as served:
        for name in (HOSTILE, f"vm/100/{HOSTILE}"):
            with pytest.raises(NbdError), served.connect(name):
                pass
        check("\n".join(served.log_lines()))
