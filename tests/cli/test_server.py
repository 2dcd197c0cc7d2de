"""A server as the source of every command: logging in, trust, failures, secrets; by the real program."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from pbsfs.testing.archives import Node, write
from tests.support import damage, made
from tests.support.messages import is_documented
from tests.support.mounts import cleaned_up, mounted
from tests.support.needs import need_fuse, need_root
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.server import READER, Drop, ReferenceServer, Status, certificate, texts
from tests.support.server.factors import Factors
from tests.support.serving import PASSWORD, SECRET, STORE, TOKEN, USER, WAYS_IN, access, serving, without
from tests.support.stocked import CONFIGURATION, FIRST, IMAGE, IN_NAMESPACE, NEWER_IMAGE, Stocked, stock
from tests.support.strangers import closed_port, stranger
from tests.support.terminal import at_a_terminal
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SHOWN = ["vm", "ct", "ns", "files"]

each_way_in = pytest.mark.parametrize("who", WAYS_IN)


def shows_all(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether `pbsfs ls` has listed the root, and nothing else was said."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split() == SHOWN


# --- what every command does


def test_info_says_what_the_list_has_to_a_user_who_may_only_list(server: ReferenceServer) -> None:
    server.add_user("list@pbs", "secret", grants={f"/datastore/{STORE}": frozenset({"Datastore.Audit"})})
    env = access(server, "list@pbs", "secret")
    shown = output_of(PBSFS, "info", "vm/100/latest", env=env)
    assert "\nbackup_id:       100\n" in shown
    assert "\nerror:           " in shown
    assert "restore_size" not in shown


@each_way_in
def test_ls_info_and_export_read_from_a_server(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, who: str
) -> None:
    told = access(server, who)
    listed = output_of(PBSFS, "ls", "-R", env=told).splitlines()
    assert set(stocked.contents) <= set(listed)
    assert len(set(listed)) == len(listed)
    assert server.sessions.all() == []
    assert "\nverify_state:    ok (" in output_of(PBSFS, "info", IMAGE, env=told)
    assert len(server.sessions.all()) == 1  # for the index: no snapshot before has one to compare
    for path in (IMAGE, CONFIGURATION, NEWER_IMAGE, IN_NAMESPACE):
        copy = tmp_path / path.replace("/", "_")
        assert output_of(PBSFS, "export", path, copy, env=told) == ""
        assert copy.read_bytes() == stocked.contents[path]
    wait_until(lambda: not server.open_sessions(), "no session outlives its command")
    assert {record.user for record in server.requests.all() if record.user} == {who}


def test_every_command_starts_at_the_namespace(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    told = access(server)
    assert output_of(PBSFS, "ls", "--ns", "prod", env=told).split() == ["vm", "files"]
    inside = IN_NAMESPACE.removeprefix("ns/prod/")
    output_of(PBSFS, "export", "--ns", "prod", inside, tmp_path / "copy", env=told)
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IN_NAMESPACE]
    facts = json.loads(output_of(PBSFS, "info", "--json", "--ns", "prod", inside, env=told))
    assert facts["namespace"] == "prod"


def test_a_server_that_a_ca_vouches_for_needs_no_fingerprint(stocked: Stocked, tmp_path: Path) -> None:
    with ReferenceServer(stocked.path, store=STORE, ca_signed=True) as server:
        server.add_user(USER, PASSWORD)
        (ca := tmp_path / "ca.pem").write_text(server.ca or "")
        told = access(server, PBS_REPOSITORY=server.repository(USER, host="localhost"))
        told = without(told, "PBS_FINGERPRINT") | {"XDG_CONFIG_HOME": str(tmp_path)}
        assert shows_all(pbsfs("ls", env=told | {"SSL_CERT_FILE": str(ca)}))
        assert "is not trusted" in error_of(pbsfs("ls", env=told), 12)


# --- where the password, the repository and the fingerprint come from


@each_way_in
def test_the_secret_comes_from_a_variable_descriptor_file_or_command(
    server: ReferenceServer, tmp_path: Path, who: str
) -> None:
    told = without(access(server, who), "PBS_PASSWORD")
    (file := tmp_path / "secret").write_text(f"{WAYS_IN[who]}\nnot this line\n")
    with file.open() as opened:
        changes = {"PBS_PASSWORD_FD": str(opened.fileno())}
        assert shows_all(pbsfs("ls", env=told | changes, pass_fds=[opened.fileno()]))
    assert shows_all(pbsfs("ls", env=told | {"PBS_PASSWORD_FILE": str(file)}))
    assert shows_all(pbsfs("ls", env=told | {"PBS_PASSWORD_CMD": f"cat '{file}'"}))


@pytest.mark.parametrize("form", ["FD", "FILE", "CMD"])
def test_a_place_that_gives_no_secret_is_wrong_usage(
    server: ReferenceServer, tmp_path: Path, form: str
) -> None:
    places = {"FD": "987", "FILE": str(tmp_path / "none"), "CMD": "false"}
    told = without(access(server), "PBS_PASSWORD") | {f"PBS_PASSWORD_{form}": places[form]}
    assert f"PBS_PASSWORD_{form}: " in error_of(pbsfs("ls", env=told), 2)
    assert server.requests.all() == []


def test_the_first_form_that_is_set_counts(server: ReferenceServer, tmp_path: Path) -> None:
    (file := tmp_path / "secret").write_text("wrong\n")
    assert shows_all(pbsfs("ls", env=access(server, PBS_PASSWORD_FILE=str(file), PBS_PASSWORD_CMD="false")))
    told = access(server, secret="wrong", PBS_PASSWORD_CMD=f"echo {SECRET}")
    error_of(pbsfs("ls", env=told), 10)


def credentials(directory: Path, server: ReferenceServer) -> dict[str, str]:
    """An environment that has all it takes as systemd's credentials, and nothing else."""
    for name, text in (
        ("repository", server.repository(TOKEN)),
        ("password", SECRET),
        ("fingerprint", server.fingerprint),
    ):
        (directory / f"proxmox-backup-client.{name}").write_text(f"{text}\n")
    told = without(access(server), "PBS_REPOSITORY", "PBS_PASSWORD", "PBS_FINGERPRINT")
    return told | {"CREDENTIALS_DIRECTORY": str(directory)}


def test_systemds_credentials_are_enough(server: ReferenceServer, tmp_path: Path) -> None:
    assert shows_all(pbsfs("ls", env=credentials(tmp_path, server)))


def test_the_environment_goes_before_systemds_credentials(server: ReferenceServer, tmp_path: Path) -> None:
    told = credentials(tmp_path, server)
    assert shows_all(pbsfs("ls", env=told | access(server)))
    assert server.requests.matching("/access/ticket"), "it came with the environment's user"
    error_of(pbsfs("ls", env=told | {"PBS_PASSWORD": "wrong"}), 10)


def test_options_win_over_the_environment(server: ReferenceServer) -> None:
    right, wrong = ("--fingerprint", server.fingerprint), ("--fingerprint", "00" * 32)
    told = access(server, PBS_REPOSITORY="nobody@pam@nowhere.invalid:none", PBS_FINGERPRINT="11" * 32)
    assert shows_all(pbsfs("ls", "--repository", server.repository(USER), *right, env=told))
    error_of(pbsfs("ls", *wrong, env=access(server)), 12)
    other = server.repository(USER, store="other")
    assert "'other'" in error_of(pbsfs("ls", "--repository", other, env=access(server)), 16)


# --- failures


@dataclass(frozen=True)
class Failure:
    """`message`, `status`: as the documentation has them. `words`: what has to be in the line besides.

    `prepare` brings it about: it gives the command's arguments and environment. `at_start`: any command
    fails of it, so no command is given.
    """

    message: str
    status: int
    words: tuple[str, ...]
    prepare: Callable[[ReferenceServer, Stocked, Path], AbstractContextManager[Prepared]]
    at_start: bool
    name: str


Prepared = tuple[list[str], dict[str, str]]
Preparing = Callable[[ReferenceServer, Stocked, Path], Iterator[Prepared]]

FAILURES: list[Failure] = []


def failure(
    message: str, status: int, *words: str, at_start: bool = True
) -> Callable[[Preparing], Preparing]:
    def register(prepare: Preparing) -> Preparing:
        FAILURES.append(Failure(message, status, words, contextmanager(prepare), at_start, prepare.__name__))
        return prepare

    return register


@failure("no password for …", 2, f"no password for {USER}")
def no_password(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], without(access(server), "PBS_PASSWORD")


@failure("there is no namespace '…'", 3, "'none'")
def unknown_namespace(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield ["--ns", "none"], access(server)


@failure("… does not accept … and this password", 10, USER, "permission check failed.")
def wrong_password(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], access(server, secret="wrong")


@failure("… does not accept … and this password", 10, "nobody@pbs", "permission check failed.")
def unknown_user(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], access(server, "nobody@pbs", "secret")


@failure("… does not accept …!…: …", 10, TOKEN, "authentication failed - invalid credentials")
def wrong_token_secret(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], access(server, TOKEN, "wrong")


@failure("… does not accept …!…: …", 10, TOKEN, "user account or token disabled or expired.")
def withdrawn_token(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.remove(TOKEN)
    yield [], access(server, TOKEN)


@failure("… logs in with a second factor", 10, "two@pbs", "API token")
def second_factor(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.add_user("two@pbs", "secret", factors=Factors(server.clock))
    yield [], access(server, "two@pbs", "secret")


@failure(
    *("… does not allow … to do this: …missing Datastore.Audit…", 11, "some@pbs"),
    *("permission check failed - missing Datastore.Audit|Datastore.Backup", "/datastore/store1/prod"),
    at_start=False,
)
def missing_privilege(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.add_user("some@pbs", "secret", grants={f"/datastore/{STORE}": frozenset({"Datastore.Modify"})})
    yield ["ls", "--ns", "prod"], access(server, "some@pbs", "secret")


@failure(
    *("… does not allow … to do this: …missing Datastore.Read…", 11, "list@pbs", "/datastore/store1"),
    at_start=False,
)
def listing_only(server: ReferenceServer, _stocked: Stocked, path: Path) -> Iterator[Prepared]:
    server.add_user("list@pbs", "secret", grants={f"/datastore/{STORE}": frozenset({"Datastore.Audit"})})
    yield ["export", IMAGE, str(path / "copy")], access(server, "list@pbs", "secret")


@failure("the certificate is not trusted (…)", 12, "self-signed", "--fingerprint or PBS_FINGERPRINT")
def no_fingerprint(server: ReferenceServer, _stocked: Stocked, path: Path) -> Iterator[Prepared]:
    yield [], without(access(server, XDG_CONFIG_HOME=str(path)), "PBS_FINGERPRINT")


@failure("shows a certificate that is not the expected one", 12, "expected", "found", "00:00:00", "accept")
def wrong_fingerprint(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], access(server, PBS_FINGERPRINT="00" * 32)


@failure("the name '…' does not resolve", 13, "'nowhere.invalid'")
def unresolvable_name(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    # Without these, a machine without a name service tries for long.
    quick = {"RES_OPTIONS": "attempts:1 timeout:1", "LOCALDOMAIN": ""}
    yield [], access(server, PBS_REPOSITORY=f"{USER}@nowhere.invalid:{STORE}", **quick)


def at(server: ReferenceServer, port: int, **changes: str) -> dict[str, str]:
    """The environment for what is at another port."""
    return access(server, PBS_REPOSITORY=f"{USER}@127.0.0.1:{port}:{STORE}", **changes)


@failure("cannot connect to …", 14, "Connection refused")
def nobody_listens(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    with closed_port() as port:
        yield [], at(server, port)


@failure("the connection was closed before the answer was complete", 14)
def dropped_connection(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.faults.add(Drop(match="/access/ticket", times=None))
    yield [], access(server)


@failure("… does not speak TLS", 15)
def plain_http(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    with stranger(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n") as port:
        yield [], at(server, port)


@contextmanager
def another_tls_server(server: ReferenceServer, answer: bytes) -> Iterator[dict[str, str]]:
    made = certificate.make()
    with stranger(answer, made) as port:
        yield at(server, port, PBS_FINGERPRINT=made.fingerprint)


@failure("does not answer as", 15)
def tls_without_http(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    with another_tls_server(server, b"220 mail.example ESMTP\r\n") as told:
        yield [], told


@failure("the answer to … makes no sense", 15, "/version")
def answers_of_another_service(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    page = b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n<html></html>\n"
    with another_tls_server(server, page) as told:
        repository = told["PBS_REPOSITORY"].replace(USER, TOKEN)
        yield [], told | {"PBS_REPOSITORY": repository, "PBS_PASSWORD": SECRET}


@failure("check that host and port are those of", 15, "404 Not Found")
def web_server(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    page = b"<html><title>404 Not Found</title></html>\n"
    head = b"HTTP/1.1 404 Not Found\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(page)
    with another_tls_server(server, head + page) as told:
        yield [], told


@failure("has no datastore '…'", 16, "'none'", STORE)
def unknown_datastore(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield [], access(server, PBS_REPOSITORY=server.repository(USER, store="none"))


@failure("has no datastore '…'", 16, f"'{STORE}'", "none")
def no_privileges_at_all(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.add_user("new@pbs", "secret", grants={})
    yield [], access(server, "new@pbs", "secret")


@failure("has no realm '…'", 17, "'nowhere'", "pam, pbs", "permission check failed.")
def unknown_realm(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    realms = json.dumps({"data": [{"realm": "pam", "type": "pam"}, {"realm": "pbs", "type": "pbs"}]})
    server.faults.add(Status(match="/access/domains", status=200, text=realms, times=None))
    yield [], access(server, "reader@nowhere", PASSWORD)


@failure("…: status 5…: …", 4, "status 500", "disk full")
def failing_server(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    server.faults.add(Status(match="/namespace", status=500, text="disk full", times=None))
    yield [], access(server)


@failure("is locked on the server", 4, FIRST, "unable to acquire lock", at_start=False)
def locked_snapshot(server: ReferenceServer, _stocked: Stocked, path: Path) -> Iterator[Prepared]:
    assert str(made.snapshot()) == FIRST
    with server.locked(made.snapshot()):
        yield ["export", "--retry-timeout", "0", IMAGE, str(path / "copy")], access(server)


def _unavailable(server: ReferenceServer, text: str) -> Iterator[Prepared]:
    server.faults.add(Status(match="/namespace", status=400, text=text, times=None))
    yield ["--retry-timeout", "0", "--log-level", "error"], access(server)


@failure("is unavailable: … maintenance mode", 4)
def maintenance(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield from _unavailable(server, texts.MAINTENANCE[1])


@failure("is not mounted", 4)
def not_mounted(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield from _unavailable(server, texts.MAINTENANCE[4])


@failure("datastore is being deleted", 4)
def being_deleted(server: ReferenceServer, _stocked: Stocked, _path: Path) -> Iterator[Prepared]:
    yield from _unavailable(server, texts.DELETING)


@failure("chunk …: …", 6, IMAGE, at_start=False)
def damaged_chunk(server: ReferenceServer, _stocked: Stocked, path: Path) -> Iterator[Prepared]:
    own = stock(path / "datastore")
    digest = hashlib.sha256(own.contents[IMAGE][: 1 << 16]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 1000)
    with serving(own.path) as other:
        yield ["export", IMAGE, str(path / "copy")], access(other)


each_failure = pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
each_status = pytest.mark.parametrize(
    "case", {case.status: case for case in FAILURES if case.at_start}.values(), ids=lambda case: case.name
)


@each_failure
def test_every_failure_is_documented(case: Failure) -> None:
    assert is_documented(case.message, case.status)


def test_every_status_is_in_the_help() -> None:
    told = output_of(PBSFS, "--help")
    for case in FAILURES:
        assert re.search(rf"^ +{case.status} ", told, re.MULTILINE)


def assert_told(case: Failure, text: str, server: ReferenceServer) -> None:
    pattern = ".*".join(re.escape(part) for part in case.message.split("…"))
    assert re.search(pattern, text), text
    for words in case.words:
        assert words in text
    assert PASSWORD not in text
    assert SECRET not in text


@each_failure
def test_a_failure_is_one_line_with_its_own_status(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, case: Failure
) -> None:
    with case.prepare(server, stocked, tmp_path) as (arguments, told):
        command = ["ls", *arguments] if case.at_start else arguments
        done = pbsfs(*command, env=told)
        assert_told(case, error_of(done, case.status), server)
        assert done.stdout == ""


@pytest.mark.mount
@each_status
def test_a_mount_in_the_background_reports_the_same_failure(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, case: Failure
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    with case.prepare(server, stocked, tmp_path) as (arguments, told), cleaned_up(place):
        done = pbsfs("mount", *arguments, "--log-file", tmp_path / "log", place, env=told)
        assert_told(case, error_of(done, case.status), server)
        assert done.stdout == ""
        assert not mounted_at(place)


def test_nothing_is_sent_to_a_server_that_is_not_trusted(server: ReferenceServer, tmp_path: Path) -> None:
    error_of(pbsfs("ls", env=access(server, PBS_FINGERPRINT="00" * 32)), 12)
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), "PBS_FINGERPRINT")
    error_of(pbsfs("ls", env=told), 12)
    assert server.connections > 0
    assert server.requests.all() == []


def test_a_mismatch_shows_both_fingerprints(server: ReferenceServer) -> None:
    text = error_of(pbsfs("ls", env=access(server, PBS_FINGERPRINT="00" * 32)), 12)
    assert ":".join(["00"] * 32) in text
    assert server.fingerprint in text
    found = re.findall(r"(?:[0-9a-f]{2}:){31}[0-9a-f]{2}", text)
    assert shows_all(pbsfs("ls", "--fingerprint", found[1], env=access(server, PBS_FINGERPRINT="")))


# --- least privilege


def test_a_token_for_one_namespace_sees_that_and_is_told_what_is_left_out(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    server.add_token("reader@pbs!one", SECRET, grants={f"/datastore/{STORE}/prod": READER})
    told = access(server, "reader@pbs!one", SECRET)
    done = pbsfs("ls", "-R", env=told)
    assert done.returncode == 0
    assert IN_NAMESPACE in done.stdout.splitlines()
    assert all(line.startswith(("ns", "files")) for line in done.stdout.splitlines())
    (line,) = done.stderr.splitlines()
    assert "left out" in line
    assert "missing Datastore.Audit|Datastore.Backup on /datastore/store1" in line
    output_of(PBSFS, "export", "--log-level", "error", IN_NAMESPACE, tmp_path / "copy", env=told)
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IN_NAMESPACE]


# --- at a terminal


def test_a_password_is_asked_for_at_a_terminal_and_not_shown(server: ReferenceServer) -> None:
    told = without(access(server), "PBS_PASSWORD")
    question = f"password of {USER} at 127.0.0.1:{server.port}"
    status, shown = at_a_terminal([PBSFS, "ls"], [(question, PASSWORD)], told)
    assert status == 0, shown
    assert shown.splitlines()[-len(SHOWN) :] == SHOWN
    assert PASSWORD not in shown


def test_a_tokens_secret_is_asked_for_as_such(server: ReferenceServer) -> None:
    told = without(access(server, TOKEN), "PBS_PASSWORD")
    status, shown = at_a_terminal([PBSFS, "ls"], [(f"secret of {TOKEN}", SECRET)], told)
    assert (status, shown.splitlines()[-len(SHOWN) :]) == (0, SHOWN)


def test_a_wrong_password_at_a_terminal_is_not_asked_for_again(server: ReferenceServer) -> None:
    told = without(access(server), "PBS_PASSWORD")
    status, shown = at_a_terminal([PBSFS, "ls"], [("password of", "wrong")], told)
    assert status == 10
    assert "permission check failed." in shown


@pytest.mark.mount
def test_a_mount_in_the_background_asks_before_it_goes_there(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), "PBS_PASSWORD", "PBS_FINGERPRINT")
    with cleaned_up(place):
        log = tmp_path / "log"
        answers = [("remember it", "y"), ("password of", PASSWORD)]
        status, shown = at_a_terminal([PBSFS, "mount", "--log-file", log, place], answers, told)
        assert status == 0, shown
        assert (place / IMAGE).read_bytes() == stocked.contents[IMAGE]
        assert log.read_text() == ""
        assert pbsfs("umount", place).returncode == 0


@pytest.mark.parametrize("answer", ["n", ""])
def test_an_unknown_server_is_refused_unless_somebody_agrees(
    server: ReferenceServer, tmp_path: Path, answer: str
) -> None:
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), "PBS_FINGERPRINT")
    status, shown = at_a_terminal([PBSFS, "ls"], [("remember it", answer)], told)
    assert status == 12
    assert server.fingerprint in shown
    assert "is not trusted" in shown.splitlines()[-1]
    assert server.requests.all() == []
    assert os.listdir(tmp_path) == []


def test_an_agreed_fingerprint_is_remembered_where_the_vendors_client_looks(
    server: ReferenceServer, tmp_path: Path
) -> None:
    (file := tmp_path / "proxmox-backup" / "fingerprints").parent.mkdir()
    other = f"other.example {':'.join(['ab'] * 32)}\n"
    file.write_text(other)
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), "PBS_FINGERPRINT")
    status, shown = at_a_terminal([PBSFS, "ls"], [("remember it", "y")], told)
    assert (status, shown.splitlines()[-len(SHOWN) :]) == (0, SHOWN)
    assert file.read_text() == f"{other}127.0.0.1 {server.fingerprint}\n"
    assert os.listdir(file.parent) == ["fingerprints"]
    assert shows_all(pbsfs("ls", env=told))  # and nobody is asked again
    file.write_text(f"127.0.0.1 {':'.join(['ab'] * 32)}\n")
    assert "not the expected one" in error_of(pbsfs("ls", env=told), 12)


@pytest.mark.parametrize("missing", ["PBS_PASSWORD", "PBS_FINGERPRINT"])
def test_without_a_terminal_nobody_is_asked(server: ReferenceServer, tmp_path: Path, missing: str) -> None:
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), missing)
    status = {"PBS_PASSWORD": 2, "PBS_FINGERPRINT": 12}[missing]
    # Somebody who pipes in answers does not sit at a terminal.
    piped = (tmp_path / "answers").open("w+")
    with piped:
        piped.write(f"y\n{PASSWORD}\n")
        piped.seek(0)
        error_of(pbsfs("ls", env=told, stdin=piped), status)


# --- secrets


def everything_told_of(process: int) -> str:
    """What any process of the same user may learn of one: its command line, environment, mounts."""
    need_root("look into a process that keeps its memory to itself")
    names = ("cmdline", "environ", "mountinfo", "comm")
    return "\n".join(Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace") for name in names)


def pipes_from_others(process: int) -> list[str]:
    """Pipes that a process has one end of."""
    names = [os.readlink(descriptor) for descriptor in Path(f"/proc/{process}/fd").iterdir()]
    return [name for name, ends in Counter(names).items() if name.startswith("pipe:") and ends == 1]


@pytest.mark.mount
@each_way_in
def test_a_mount_in_the_background_shows_no_secrets(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, who: str
) -> None:
    (file := tmp_path / "secret").write_text(f"{WAYS_IN[who]}\n")
    for number, told in enumerate(
        (
            access(server, who),
            without(access(server, who), "PBS_PASSWORD") | {"PBS_PASSWORD_CMD": f"cat {file}"},
        )
    ):
        with mounted(told, tmp_path / f"m{number}", "--log-level", "debug") as mount:
            assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
            known = everything_told_of(mount.pid)
            assert str(mount.place) in known
            assert who in known  # so this is where a secret would be
            log = "\n".join(mount.log_lines())
            assert "/api2/json/" in log
            tickets = [word for word in log.split() if "PBS:" in word or "%3A%3A" in word]
            for text in (known, log):
                assert WAYS_IN[who] not in text
                assert PASSWORD not in text
                assert SECRET not in text
            assert tickets == []
            assert not pipes_from_others(mount.pid), "the one that the secret came through is closed"


@each_way_in
def test_a_log_of_debug_level_holds_no_secrets(server: ReferenceServer, tmp_path: Path, who: str) -> None:
    done = pbsfs("export", "--log-level", "debug", IMAGE, tmp_path / "copy", env=access(server, who))
    assert done.returncode == 0
    assert "/api2/json/" in done.stderr
    assert "session opened" in done.stderr
    for secret in (PASSWORD, SECRET, json.dumps(PASSWORD)[1:-1], "PBS:", "PBSAuthCookie", "PBSAPIToken"):
        assert secret not in done.stderr


def test_what_is_remembered_of_a_server_is_for_its_user_only_or_no_secret(
    server: ReferenceServer, tmp_path: Path
) -> None:
    told = without(access(server, XDG_CONFIG_HOME=str(tmp_path)), "PBS_FINGERPRINT")
    at_a_terminal([PBSFS, "ls"], [("remember it", "y")], told)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert PASSWORD not in files[0].read_text()
    assert not stat.S_IMODE(files[0].stat().st_mode) & 0o022, "nobody else may put a fingerprint there"


# --- the README


def quick_start() -> list[str]:
    """The commands of the README's first example."""
    block = re.search(r"```console\n(\$ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ") for line in block[1].splitlines() if line.startswith("$ ")]


@pytest.mark.mount
def test_the_readmes_quick_start_works_as_it_stands(tmp_path: Path) -> None:
    need_fuse()
    commands = quick_start()
    assert len(commands) == 6
    site = Node(b"site.conf", stat.S_IFREG | 0o644, data=b"server {}\n")
    root = Node(children=[Node(b"etc", children=[Node(b"nginx", children=[site])])])
    archive = write(root, split=False).main
    own = stock(tmp_path / "datastore")
    own.writer.add_snapshot(made.snapshot("web1", type="host"), {"root.pxar.didx": archive})
    place = tmp_path / "pbs"
    (tmp_path / ".pbs-token").write_text(f"{SECRET}\n")
    example = "reader@pbs!laptop@pbs.example.com:store1"
    text = "\n".join(commands)
    assert example in text
    with serving(own.path) as server:
        text = text.replace(example, server.repository(TOKEN))
        environment = without(
            access(server, HOME=str(tmp_path), PS1="next> ", TERM="dumb"),
            *("PBS_REPOSITORY", "PBS_PASSWORD", "PBS_FINGERPRINT", "XDG_CONFIG_HOME"),
        )
        environment["PATH"] = f"{Path(PBSFS).parent}:{os.environ['PATH']}"
        # As typed at a prompt, where '!' has a meaning that it does not have in scripts.
        typed = [("next> ", command) for command in text.splitlines()]
        typed.insert(3, ("remember it", "y"))
        with cleaned_up(place):
            typed = [("next> ", f"cd {tmp_path}"), *typed, ("next> ", "exit $?")]
            status, shown = at_a_terminal(["bash", "--norc", "-i"], typed, environment)
            assert status == 0, shown
            assert "drive-scsi0.img" in shown
            assert (tmp_path / "rescued.img").read_bytes() == own.contents[NEWER_IMAGE]
            assert (tmp_path / "nginx" / "site.conf").read_bytes() == site.data
            assert pbsfs("umount", place).returncode == 0


@pytest.mark.parametrize("text", [texts.AWAY, texts.PASSING_CHUNKS[0]])
def test_what_a_server_can_not_give_now_is_not_damage_to_verify_and_export(
    server: ReferenceServer, tmp_path: Path, text: str
) -> None:
    fault = server.faults.add(Status(match="/chunk", status=400, text=text, times=None))
    soon = ("--retry-timeout", "0.3", "--log-level", "error")
    told = access(server)
    assert text in error_of(pbsfs("verify", *soon, IMAGE, env=told), 4)
    copy = tmp_path / "copy"
    for options in ((), ("--on-damage", "zero")):
        assert text in error_of(pbsfs("export", *soon, *options, IMAGE, copy, env=told), 4)
        assert not copy.exists()
    assert fault.hits > 3


def test_a_command_waits_for_maintenance_to_end_and_says_so(server: ReferenceServer) -> None:
    server.faults.add(Status(match="/namespace", status=400, text=texts.MAINTENANCE[4], times=3))
    done = pbsfs("ls", env=access(server))
    assert (done.returncode, done.stdout.split()) == (0, SHOWN)
    first, second = done.stderr.splitlines()
    assert first.startswith("pbsfs: WARNING: opening ")
    assert first.endswith("datastore 'store1' is not mounted; trying again")
    assert second.endswith("available again")
