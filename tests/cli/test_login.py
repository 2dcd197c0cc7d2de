"""`pbsfs login`, and second factors: the real program at a terminal, and what uses the login later."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.mounts import cleaned_up
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.server.factors import Factors
from tests.support.serving import PASSWORD, TOKEN, USER, access, serving, without
from tests.support.stocked import CONFIGURATION, IMAGE, NEWER_IMAGE, Stocked
from tests.support.terminal import at_a_terminal
from tests.support.waiting import wait_until

CODE = "code of the authenticator app"


@pytest.fixture
def factors(server: ReferenceServer) -> Factors:
    """The second factors of the user."""
    found = Factors(server.clock, recovery=["0123-4567-89ab-cdef"])
    server.add_user(USER, PASSWORD, factors=found)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A runtime directory."""
    (path := tmp_path / "run").mkdir(mode=0o700)
    return path


@pytest.fixture
def told(server: ReferenceServer, place: Path) -> dict[str, str]:
    """The environment of the user, without a password."""
    return without(access(server, XDG_RUNTIME_DIR=str(place)), "PBS_PASSWORD")


def log_in(told: Mapping[str, str], factors: Factors) -> str:
    answers = [("password of", PASSWORD), (CODE, factors.code())]
    status, shown = at_a_terminal([PBSFS, "login"], answers, told)
    assert status == 0, shown
    assert PASSWORD not in shown
    assert factors.code() not in shown
    assert "PBS:" not in shown
    return shown


def test_a_login_serves_the_commands_that_follow(
    server: ReferenceServer, stocked: Stocked, factors: Factors, told: dict[str, str], place: Path
) -> None:
    shown = log_in(told, factors)
    assert re.search(rf"{USER} is logged in at 127\.0\.0\.1:{server.port} until \d\d:\d\d\.\n$", shown)
    (file,) = (place / "pbsfs").iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)] == [0o700, 0o600]
    assert output_of(PBSFS, "cat", CONFIGURATION, env=told).encode() == stocked.contents[CONFIGURATION]
    assert output_of(PBSFS, "ls", env=told).split() == ["vm", "ct", "ns", "files"]
    assert PASSWORD not in file.read_text()
    # Its exit status also depends on other mounts of this machine.
    (entry,) = json.loads(pbsfs("status", "--json", env=told).stdout)[-1:]
    assert (entry["kind"], entry["source"]) == ("login", USER)
    assert re.fullmatch(r"until \d\d:\d\d", entry["state"])
    assert "PBS:" not in json.dumps(entry)
    address = f"127.0.0.1:{server.port}"
    assert output_of(PBSFS, "logout", env=told) == f"{USER} is logged out at {address}.\n"
    assert "run pbsfs login at a terminal" in error_of(pbsfs("ls", env=told), 2)
    assert output_of(PBSFS, "logout", env=told) == f"{USER} was not logged in at {address}.\n"
    assert list((place / "pbsfs").iterdir()) == []


def test_a_password_that_is_given_takes_precedence(factors: Factors, told: dict[str, str]) -> None:
    log_in(told, factors)
    assert "and this password" in error_of(pbsfs("ls", env={**told, "PBS_PASSWORD": "wrong"}), 10)
    assert output_of(PBSFS, "ls", env={**told, "PBS_PASSWORD": ""})


def test_a_login_that_the_server_has_forgotten_says_to_log_in_again(
    server: ReferenceServer, factors: Factors, told: dict[str, str]
) -> None:
    log_in(told, factors)
    server.clock.advance(7201)
    text = error_of(pbsfs("ls", env=told), 10)
    assert text.startswith(
        f"the login of {USER} at 127.0.0.1:{server.port} is no longer valid; run pbsfs login"
    )


def test_a_second_factor_is_asked_for_at_a_terminal_only(
    server: ReferenceServer, factors: Factors, told: dict[str, str]
) -> None:
    given = {**told, "PBS_PASSWORD": PASSWORD}
    for command in (["ls"], ["login"]):
        done = pbsfs(*command, env=given, input=f"{factors.code()}\n", stdin=None)
        assert f"{USER} logs in with a second factor; run pbsfs login at a terminal" in error_of(done, 10)
    status, shown = at_a_terminal([PBSFS, "ls"], [(f"{CODE} or recovery code", "0123456789ABCDEF")], given)
    assert (status, shown.splitlines()[-4:]) == (0, ["vm", "ct", "ns", "files"])
    assert [record.status for record in server.requests.matching("/access/ticket")] == [200] * 5


def test_a_user_with_security_keys_only_is_told_to_make_a_token(
    server: ReferenceServer, told: dict[str, str]
) -> None:
    server.add_user(USER, PASSWORD, factors=Factors(server.clock, totp=False, webauthn=True))
    status, shown = at_a_terminal([PBSFS, "login"], [("password of", PASSWORD)], told)
    assert status == 10
    assert "needs a browser (WebAuthn): create an API token" in shown


def test_without_a_second_factor_a_login_needs_no_terminal(told: dict[str, str]) -> None:
    assert "is logged in at" in output_of(PBSFS, "login", env={**told, "PBS_PASSWORD": PASSWORD})
    assert output_of(PBSFS, "ls", env=told).split() == ["vm", "ct", "ns", "files"]


def test_what_needs_no_login_is_refused(
    server: ReferenceServer, stocked: Stocked, told: dict[str, str]
) -> None:
    for command in ("login", "logout"):
        done = pbsfs(command, env={**told, "PBS_REPOSITORY": server.repository(TOKEN)})
        assert "an API token needs no login" in error_of(done, 2)
        assert "a directory needs no login" in error_of(pbsfs(command, "--datastore-dir", stocked.path), 2)


def test_a_profile_is_checked_with_the_login(
    server: ReferenceServer, factors: Factors, told: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "pbsfs").mkdir()
    (tmp_path / "pbsfs" / "config.toml").write_text(
        f'[profiles.home]\nrepository = "{server.repository(USER)}"\nfingerprint = "{server.fingerprint}"\n'
    )
    env = without(told, "PBS_REPOSITORY", "PBS_FINGERPRINT") | {"XDG_CONFIG_HOME": str(tmp_path)}
    answers = [("password of", PASSWORD), (CODE, factors.code())]
    status, shown = at_a_terminal([PBSFS, "login", "--profile", "home"], answers, env)
    assert status == 0, shown
    shown = output_of(PBSFS, "config", "check", "home", env=env)
    assert "not needed: pbsfs login keeps a ticket" in shown
    assert f"{USER} is accepted" in shown


def test_nbdkit_uses_the_login(
    stocked: Stocked, factors: Factors, told: dict[str, str], tmp_path: Path
) -> None:
    need("nbdkit", "nbdcopy")
    log_in(told, factors)
    output_of(PBSFS, "nbd", IMAGE, "--run", 'nbdcopy "$uri" copy', env=told, cwd=tmp_path)
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IMAGE]


@pytest.mark.mount
@pytest.mark.parametrize("way", ["login", "at the start"])
def test_a_mount_outlives_the_ticket_that_it_began_with(
    stocked: Stocked, place: Path, tmp_path: Path, way: str
) -> None:
    need_fuse()
    (where := tmp_path / "m").mkdir()
    log = tmp_path / "log"
    with serving(stocked.path) as server, cleaned_up(where):
        factors = Factors(server.clock)
        server.add_user(USER, PASSWORD, factors=factors)
        told = without(access(server, XDG_RUNTIME_DIR=str(place)), "PBS_PASSWORD")
        mount: list[str | Path] = [PBSFS, "mount", "--log-file", log, "--refresh", "0.1", where]
        answers = [("password of", PASSWORD), (CODE, factors.code())]
        status, shown = at_a_terminal([PBSFS, "login"] if way == "login" else mount, answers, told)
        assert status == 0, shown
        if way == "login":
            server.clock.advance(7000)  # the mount renews it at once
            assert output_of(*mount, env=told) == ""
            output_of(PBSFS, "logout", env=told)
        server.clock.advance(3600)
        assert (where / IMAGE).read_bytes() == stocked.contents[IMAGE]
        server.clock.advance(7201)  # nothing renewed it in time
        server.drop_connections()
        wait_until(lambda: "is no longer valid" in _try(where / NEWER_IMAGE, log), "the log says so")
        assert f"the login of {USER} at " in log.read_text()
        assert "run pbsfs login again, and end and start again what uses it" in log.read_text()


def _try(path: Path, log: Path) -> str:
    with pytest.raises(PermissionError):
        path.read_bytes()
    return log.read_text()
