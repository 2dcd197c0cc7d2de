"""The tickets that a login keeps: who may read them, how long they count, and for which server."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from pbsfs.access.tickets import LIFETIME, MAX_SIZE, Tickets
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret
from pbsfs.sources.server.repository import Repository
from tests.support.needs import need_root

REPOSITORY = Repository.parse("anna@pbs@pbs.example.com:store1")
TICKET = Secret("PBS:anna@pbs:65432100::geheim")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tickets(tmp_path: Path, clock: Clock) -> Tickets:
    return Tickets({"XDG_RUNTIME_DIR": str(tmp_path)}, clock)


def file_in(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "pbsfs").iterdir()
    return file


def refused(tickets: Tickets, caplog: pytest.LogCaptureFixture) -> str:
    """Why the login is not used, which only the log says."""
    assert tickets.find(REPOSITORY) is None
    (record,) = caplog.records
    text = record.getMessage()
    assert "geheim" not in text
    caplog.clear()
    return text


def test_a_ticket_is_kept_for_its_owner_alone(tickets: Tickets, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tickets.save(REPOSITORY, TICKET)
    finally:
        os.umask(before)
    file = file_in(tmp_path)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = tickets.find(REPOSITORY)
    assert found is not None
    assert found.ticket.reveal() == TICKET.reveal()
    assert found.ticket.password is None
    assert (found.user, found.address) == ("anna@pbs", "pbs.example.com:8007")
    assert "geheim" not in repr(found)
    assert tickets.all() == [found] or tickets.all()[0].until == found.until


def test_a_ticket_counts_for_two_hours(tickets: Tickets, clock: Clock) -> None:
    login = tickets.save(REPOSITORY, TICKET)
    assert login.until == clock.now + LIFETIME
    assert 7000 < LIFETIME < 7200
    clock.now += LIFETIME - 1
    assert tickets.find(REPOSITORY) is not None
    clock.now += 1
    assert tickets.find(REPOSITORY) is None
    assert tickets.all() == []
    clock.now -= LIFETIME + 60  # a clock that was set back proves nothing
    assert tickets.find(REPOSITORY) is None


def test_a_ticket_is_for_one_user_of_one_server(tickets: Tickets) -> None:
    tickets.save(REPOSITORY, TICKET)
    assert tickets.find(Repository.parse("anna@pbs@pbs.example.com:other")) is not None
    for other in (
        "anna@pbs@pbs.example.com:8008:store1",
        "anna@pbs@other.example.com:store1",
        "anna@pam@pbs.example.com:store1",
        "bert@pbs@pbs.example.com:store1",
    ):
        assert tickets.find(Repository.parse(other)) is None
        assert not tickets.remove(Repository.parse(other))


def test_a_new_login_replaces_the_old_one_and_removes_what_has_expired(
    tickets: Tickets, clock: Clock, tmp_path: Path
) -> None:
    tickets.save(Repository.parse("bert@pbs@[fd00::1]:store1"), TICKET)
    clock.now += LIFETIME
    tickets.save(REPOSITORY, TICKET)
    file = file_in(tmp_path)
    with file.open() as old:
        tickets.save(REPOSITORY, Secret("newer"))
        assert json.load(old)["ticket"] == TICKET.reveal(), "a reader keeps the whole old file"
    assert file_in(tmp_path) == file
    found = tickets.find(REPOSITORY)
    assert found is not None
    assert found.ticket.reveal() == "newer"


def test_a_logout_removes_the_ticket(tickets: Tickets, tmp_path: Path) -> None:
    assert not tickets.remove(REPOSITORY)
    tickets.save(REPOSITORY, TICKET)
    assert tickets.remove(REPOSITORY)
    assert not tickets.remove(REPOSITORY)
    assert list((tmp_path / "pbsfs").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o750, 0o701])
def test_a_directory_that_others_may_enter_is_refused(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    tickets.save(REPOSITORY, TICKET)
    (tmp_path / "pbsfs").chmod(mode)
    assert "pbsfs: other users may read it; remove it" in refused(tickets, caplog)
    for work in (lambda: tickets.save(REPOSITORY, TICKET), lambda: tickets.remove(REPOSITORY)):
        with pytest.raises(UsageError, match="other users may read it; remove it"):
            work()


def test_a_link_instead_of_the_directory_is_refused(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "pbsfs").symlink_to("elsewhere")
    assert f"{tmp_path / 'pbsfs'}: Not a directory; remove it" in refused(tickets, caplog)
    with pytest.raises(UsageError, match="Not a directory; remove it"):
        tickets.save(REPOSITORY, TICKET)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_directory_or_file_of_another_user_is_refused(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need_root("give files away")
    tickets.save(REPOSITORY, TICKET)
    os.chown(file_in(tmp_path), 12345, 0)
    assert "belongs to another user; remove it" in refused(tickets, caplog)
    os.chown(tmp_path / "pbsfs", 12345, 0)
    assert "pbsfs: belongs to another user; remove it" in refused(tickets, caplog)


def test_a_file_that_others_may_read_or_that_is_a_link_is_refused(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tickets.save(REPOSITORY, TICKET)
    file = file_in(tmp_path)
    file.chmod(0o640)
    assert f"{file}: other users may read it" in refused(tickets, caplog)
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    assert f"{file}: Too many levels of symbolic links; remove it" in refused(tickets, caplog)
    tickets.save(REPOSITORY, TICKET)
    assert not file.is_symlink(), "it replaces the link"
    file.unlink()
    os.mkfifo(file, 0o600)
    assert f"{file}: not a regular file; remove it" in refused(tickets, caplog)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '{"user": "a"}',
        "[" * 100_000,
        '{"time": "x", "user": "", "address": "", "ticket": ""}',
        '{"time": 1700000000, "user": "a", "address": "b", "ticket": ""}',
        '{"time": 1700000000, "user": "a", "address": "b", "ticket": "x\\r\\ny"}',
        '{"time": 1700000000, "user": "a", "address": "b", "ticket": "\\ud800"}',
    ],
)
def test_a_damaged_file_is_not_used(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    tickets.save(REPOSITORY, TICKET)
    file_in(tmp_path).write_text(content)
    assert "damaged; run pbsfs login again" in refused(tickets, caplog)
    assert tickets.all() == []
    caplog.clear()


def test_a_file_that_is_too_large_is_not_read(
    tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tickets.save(REPOSITORY, TICKET)
    os.truncate(file_in(tmp_path), 100 * MAX_SIZE)
    assert "damaged" in refused(tickets, caplog)


def test_without_a_runtime_directory_there_is_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    tickets = Tickets({"XDG_RUNTIME_DIR": "relative"})
    assert tickets.find(REPOSITORY) is None
    assert not tickets.remove(REPOSITORY)
    with pytest.raises(UsageError, match="no runtime directory; set XDG_RUNTIME_DIR"):
        tickets.save(REPOSITORY, TICKET)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"{tmp_path}/file/pbsfs: Not a directory"):
        Tickets({"XDG_RUNTIME_DIR": str(tmp_path / "file")}).save(REPOSITORY, TICKET)
    with pytest.raises(UsageError, match=f"{tmp_path}/no: No such file or directory; create it with mkdir"):
        Tickets({"XDG_RUNTIME_DIR": str(tmp_path / "no")}).save(REPOSITORY, TICKET)
