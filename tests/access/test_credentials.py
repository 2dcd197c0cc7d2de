"""Secrets: found where proxmox-backup-client's users keep them, and shown nowhere."""

from __future__ import annotations

import copy
import os
import pickle
import shlex
import socket
import sys
import traceback
from pathlib import Path

import pytest

from pbsfs.access.credentials import (
    MAX_SECRET,
    find_credential,
    find_secret,
    take_secrets,
)
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret

SECRET = "hunter2 with spaces"


def found(**environment: str) -> str | None:
    """The password that is found in this environment."""
    secret = find_secret("PBS_PASSWORD", "password", environment)
    return None if secret is None else secret.reveal()


def refusal(**environment: str) -> str:
    """Why no password is found where one is named; never by showing it."""
    with pytest.raises(UsageError) as caught:
        found(**environment)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert "hunter2" not in str(caught.value)
    return str(caught.value)


def descriptor(data: bytes) -> int:
    """A descriptor from which `data` can be read."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def printing(text: str) -> str:
    """A command line that prints `text`."""
    return shlex.join([sys.executable, "-c", f"print({text!r}, end='')"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    return path


# --- the forms


def test_a_variable_holds_the_secret_itself() -> None:
    assert found(PBS_PASSWORD=SECRET) == SECRET


def test_nothing_named_is_nothing_found() -> None:
    assert found() is None
    assert found(PBS_PASSWORDS=SECRET, PBS_ENCRYPTION_PASSWORD=SECRET, PASSWORD=SECRET) is None


def test_an_empty_variable_is_an_empty_secret() -> None:
    assert found(PBS_PASSWORD="", PBS_PASSWORD_FILE="/nonexistent") == ""


def test_the_first_form_that_is_set_wins_and_the_others_are_not_touched(file: Path) -> None:
    fd = descriptor(b"from the descriptor\n")
    everything = {
        "PBS_PASSWORD": "from the variable",
        "PBS_PASSWORD_FD": str(fd),
        "PBS_PASSWORD_FILE": str(file),
        "PBS_PASSWORD_CMD": printing("from the command"),
    }
    try:
        assert found(**everything) == "from the variable"
        assert is_open(fd)
        del everything["PBS_PASSWORD"]
        assert found(**everything) == "from the descriptor"
        del everything["PBS_PASSWORD_FD"]
        assert found(**everything) == SECRET
        del everything["PBS_PASSWORD_FILE"]
        assert found(**everything) == "from the command"
    finally:
        if is_open(fd):
            os.close(fd)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("line\n", "line"),
        ("line\r\n", "line"),
        ("first\nsecond\n", "first"),
        ("first\r\nsecond", "first"),
        ("\nsecond", ""),
        ("", ""),
        (" blanks stay \t\n", " blanks stay \t"),
        ("pässwörd €\n", "pässwörd €"),
        ("a\rb\n", "a\rb"),
    ],
)
def test_of_every_form_the_first_line_counts_without_its_end(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(text.encode())
    fd = descriptor(text.encode())

    assert found(PBS_PASSWORD=text) == line
    assert found(PBS_PASSWORD_FD=str(fd)) == line
    assert found(PBS_PASSWORD_FILE=str(path)) == line
    assert found(PBS_PASSWORD_CMD=f"cat {shlex.quote(str(path))}") == line


def test_a_descriptor_is_read_once_and_closed() -> None:
    fd = descriptor(f"{SECRET}\nmore\n".encode())

    assert found(PBS_PASSWORD_FD=str(fd)) == SECRET

    assert not is_open(fd)
    assert (
        refusal(PBS_PASSWORD_FD=str(fd))
        == "PBS_PASSWORD_FD: Bad file descriptor; check the name and who may use it"
    )


def test_a_descriptor_that_comes_in_pieces_is_read_to_the_end_of_the_line() -> None:
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with writing:
        for piece in (b"a", b"b", b"c\nd", b"e"):
            writing.send(piece)  # a read gives no more than one of them
        assert found(PBS_PASSWORD_FD=str(reading.detach())) == "abc"


@pytest.mark.parametrize("text", ["", "x", "-1", "+3", " 3", "3\n", "1_0", "0x3", "٣", "9" * 30, "3.0"])
def test_what_is_no_descriptor_is_refused(text: str) -> None:
    assert (
        refusal(PBS_PASSWORD_FD=text) == "PBS_PASSWORD_FD: does not name a descriptor or command; correct it"
    )


def test_a_descriptor_that_is_not_open_or_not_readable_is_refused(tmp_path: Path) -> None:
    action = "check the name and who may use it"
    assert refusal(PBS_PASSWORD_FD="987654") == f"PBS_PASSWORD_FD: Bad file descriptor; {action}"
    fd = os.open(tmp_path, os.O_RDONLY)
    assert refusal(PBS_PASSWORD_FD=str(fd)) == f"PBS_PASSWORD_FD: Is a directory; {action}"
    assert not is_open(fd)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nope"
    text = refusal(PBS_PASSWORD_FILE=str(missing))
    problem = f"PBS_PASSWORD_FILE: {missing}: No such file or directory"
    assert text == f"{problem}; check the name and who may use it"
    assert "Is a directory" in refusal(PBS_PASSWORD_FILE=str(tmp_path))
    assert refusal(PBS_PASSWORD_FILE="").startswith("PBS_PASSWORD_FILE: ")


def test_a_file_without_an_end_of_line_is_looked_at_up_to_a_limit() -> None:
    secret = found(PBS_PASSWORD_FILE="/dev/zero")
    assert secret is not None
    assert len(secret) <= 2 * MAX_SECRET


def test_a_command_is_split_as_a_shell_does_and_runs_without_one(tmp_path: Path) -> None:
    script = tmp_path / "with blank.py"
    script.write_text("import sys\nprint('|'.join(sys.argv[1:]))\n")

    command = f"{sys.executable} '{script}' 'two words' \"$HOME;\" a\\ b \"it's\""

    assert found(PBS_PASSWORD_CMD=command) == "two words|$HOME;|a b|it's"


def test_a_command_gets_nothing_to_read() -> None:
    assert found(PBS_PASSWORD_CMD="cat") == ""


def test_a_command_that_fails_is_told_of_by_its_status() -> None:
    failing = f"{sys.executable} -c 'print(\"{SECRET}\"); raise SystemExit(7)'"
    assert (
        refusal(PBS_PASSWORD_CMD=failing)
        == "PBS_PASSWORD_CMD: the command ended with status 7; run it in a shell to see why"
    )


def test_a_command_that_a_signal_ends_is_told_of() -> None:
    assert (
        refusal(PBS_PASSWORD_CMD="sh -c 'kill -9 $$'")
        == "PBS_PASSWORD_CMD: the command was ended by signal 9; run it in a shell to see why"
    )


def test_a_command_that_prints_without_end_is_killed() -> None:
    script = f"import signal; print('first', '.' * {MAX_SECRET}, sep='\\n', flush=True); signal.pause()"
    assert found(PBS_PASSWORD_CMD=shlex.join([sys.executable, "-c", script])) == "first"


def test_a_command_that_is_not_there_is_named() -> None:
    assert (
        refusal(PBS_PASSWORD_CMD="no-such-command --secret")
        == "PBS_PASSWORD_CMD: no-such-command: No such file or directory; check the name and who may use it"
    )


def test_a_command_line_that_makes_no_sense_is_refused() -> None:
    for command in ("", "   ", f"echo '{SECRET}"):
        assert (
            refusal(PBS_PASSWORD_CMD=command)
            == "PBS_PASSWORD_CMD: does not name a descriptor or command; correct it"
        )


def test_what_is_not_text_is_refused_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"hunter2 \xff\xfe\n")
    fd = descriptor(path.read_bytes())

    assert refusal(PBS_PASSWORD_FILE=str(path)) == "PBS_PASSWORD_FILE: is not UTF-8 text; write it as UTF-8"
    assert refusal(PBS_PASSWORD_FD=str(fd)) == "PBS_PASSWORD_FD: is not UTF-8 text; write it as UTF-8"
    assert refusal(PBS_PASSWORD_CMD=f"cat {path}") == "PBS_PASSWORD_CMD: is not UTF-8 text; write it as UTF-8"
    assert refusal(PBS_PASSWORD="hunter2\udcff") == "PBS_PASSWORD: is not UTF-8 text; write it as UTF-8"


# --- systemd's credentials


@pytest.mark.parametrize(
    ("variable", "name"), [("PBS_PASSWORD", "password"), ("PBS_ENCRYPTION_PASSWORD", "encryption-password")]
)
def test_a_credential_of_systemd_is_found_by_the_vendors_name(
    tmp_path: Path, variable: str, name: str
) -> None:
    (tmp_path / f"proxmox-backup-client.{name}").write_text(f"{SECRET}\r\nmore\n")

    secret = find_secret(variable, name, {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert secret is not None
    assert secret.reveal() == SECRET


@pytest.mark.parametrize("name", ["repository", "fingerprint"])
def test_what_is_no_secret_can_be_a_credential_too(tmp_path: Path, name: str) -> None:
    (tmp_path / f"proxmox-backup-client.{name}").write_text("a value\n")

    assert find_credential(name, {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "a value"
    assert find_credential(name, {"CREDENTIALS_DIRECTORY": ""}) is None
    assert find_credential(name, {}) is None


def test_every_form_of_the_variable_wins_over_a_credential(tmp_path: Path, file: Path) -> None:
    (tmp_path / "proxmox-backup-client.password").write_text("the credential")
    directory = {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    assert found(**directory) == "the credential"
    assert found(**directory, PBS_PASSWORD="") == ""
    assert found(**directory, PBS_PASSWORD_FILE=str(file)) == SECRET
    assert "No such file" in refusal(**directory, PBS_PASSWORD_FILE="/nonexistent")


def test_a_credential_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert found(CREDENTIALS_DIRECTORY=str(tmp_path)) is None
    assert found(CREDENTIALS_DIRECTORY=str(tmp_path / "nope")) is None


def test_a_credential_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "proxmox-backup-client.password"
    path.mkdir()
    assert refusal(CREDENTIALS_DIRECTORY=str(tmp_path)) == f"credential {path}: Is a directory; correct it"
    path.rmdir()
    path.write_bytes(b"hunter2 \xff")
    assert refusal(CREDENTIALS_DIRECTORY=str(tmp_path)) == f"credential {path}: is not UTF-8 text; correct it"


# --- what does not show it


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret(SECRET)

    assert secret.reveal() == SECRET
    for shown in (repr(secret), str(secret), f"{secret}", f"{[secret]!r}", f"{secret!s:>20}"):
        assert "hunter2" not in shown
    with pytest.raises(TypeError):
        vars(secret)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_copied_out(protocol: int) -> None:
    with pytest.raises(TypeError, match="not to be copied out"):
        pickle.dumps(Secret(SECRET), protocol)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not to be copied out"):
            copied(Secret(SECRET))


def test_a_traceback_with_all_its_variables_does_not_show_a_secret_that_was_found() -> None:
    def fails() -> None:
        secret = find_secret("PBS_PASSWORD", "password", {"PBS_PASSWORD": SECRET})
        raise ValueError(secret)

    with pytest.raises(ValueError, match="Secret") as caught:
        fails()

    trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [line for line in trace.format() if "SECRET" not in line]
    assert any("secret = Secret(" in line for line in frames)
    assert "hunter2" not in "".join(frames)


def test_secrets_leave_the_environment_before_any_process_is_started() -> None:
    secret = [f"PBS_{name}{form}" for name in SECRET_NAMES for form in ("", "_FD", "_FILE", "_CMD")]
    environment = dict.fromkeys([*secret, "PBS_REPOSITORY_FD", "PBS_REPOSITORY", "PATH"], "x")
    before = dict(environment)
    assert take_secrets(environment) == before
    assert set(environment) == {"PBS_REPOSITORY", "PATH"}


SECRET_NAMES = ("PASSWORD", "ENCRYPTION_PASSWORD", "MASTER_KEY_PASSWORD")


def test_a_command_is_not_what_the_service_manager_listens_to() -> None:
    command = f"{sys.executable} -c 'import os; print(sorted(os.environ))'"
    names = found(PBS_PASSWORD_CMD=command, NOTIFY_SOCKET="/run/notify", KEPT="1")
    assert names is not None
    assert "KEPT" in names
    assert "NOTIFY_SOCKET" not in names
