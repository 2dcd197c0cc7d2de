"""Where users keep secrets, and settings in the same forms.

The rules are those of proxmox-backup-client: a variable, or with the suffix `_FD`, `_FILE` or `_CMD` a
descriptor, file or command that returns it. The first one that is set wins, and the first line of its
content counts. systemd's credentials come last. `pbsfs.access.references` reads the places that a profile
names by the same functions. Synchronous.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret
from pbsfs.runtime.service import NOTIFY_SOCKET

_NO_TEXT = "is not UTF-8 text"

PASSWORD_VARIABLE = "PBS_PASSWORD"  # noqa: S105 - a name
KEY_PASSWORD_VARIABLE = "PBS_ENCRYPTION_PASSWORD"  # noqa: S105 - a name
MASTER_PASSWORD_VARIABLE = "PBS_MASTER_KEY_PASSWORD"  # noqa: S105 - a name
ACCESS_KEY_VARIABLE = "AWS_ACCESS_KEY_ID"
SECRET_KEY_VARIABLE = "AWS_SECRET_ACCESS_KEY"  # noqa: S105 - a name
TOKEN_VARIABLE = "AWS_SESSION_TOKEN"  # noqa: S105 - a name
CONTAINER_TOKEN_VARIABLE = "AWS_CONTAINER_AUTHORIZATION_TOKEN"  # noqa: S105 - a name

CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"
_CREDENTIAL_PREFIX = "proxmox-backup-client."

MAX_SECRET = 64 << 10
"""Bytes of a file or of a command's output in which the first line has to end."""


def find_secret(variable: str, credential: str | None, environment: Mapping[str, str]) -> Secret | None:
    """The secret that `variable` (`PBS_PASSWORD`) names in one of its forms, or else a systemd credential.

    `credential`: its name there, without the vendor's prefix; None if there is none. Raises UsageError for a
    place that can't be read; the error names the place and never its content.
    """
    found = _find(variable, environment)
    if found is None and credential is not None:
        found = find_credential(credential, environment)
    return None if found is None else Secret(found)


def find_setting(variable: str, credential: str, environment: Mapping[str, str]) -> str | None:
    """The same for what is not a secret (`PBS_REPOSITORY`). What is empty is not set."""
    return _find(variable, environment) or find_credential(credential, environment) or None


def _find(variable: str, environment: Mapping[str, str]) -> str | None:
    """What the first form of `variable` that is set gives."""
    for suffix, read in _FORMS.items():
        name = variable + suffix
        value = environment.get(name)
        if value is not None:
            try:
                return first_line(read(value, environment))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                raise UsageError(f"{name}: {_reason(error)}") from None
    return None


def find_credential(name: str, environment: Mapping[str, str]) -> str | None:
    """The first line of the systemd credential `name` (without the vendor's prefix), if there is one."""
    directory = environment.get(CREDENTIALS_DIRECTORY)
    if not directory:
        return None
    path = Path(directory) / (_CREDENTIAL_PREFIX + name)
    try:
        return first_line(read_file(str(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"credential {path}: {getattr(error, 'strerror', None) or error}; correct it"
        ) from None


def names_secret(variable: str, credential: str, environment: Mapping[str, str]) -> bool:
    """Whether the environment or a systemd credential has one; reads nothing. What is empty is not set."""
    return any(environment.get(variable + form) for form in FORMS) or has_credential(credential, environment)


def has_credential(name: str, environment: Mapping[str, str]) -> bool:
    """Whether there is such a systemd credential."""
    directory = environment.get(CREDENTIALS_DIRECTORY)
    return bool(directory) and os.path.lexists(Path(directory or "") / (_CREDENTIAL_PREFIX + name))


def _read_named_descriptor(text: str, _environment: Mapping[str, str]) -> bytes:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(text)
    return read_descriptor(int(text))


def read_descriptor(fd: int) -> bytes:
    """The same as `read_file` from a descriptor, which is closed then: no child may inherit it."""
    try:
        return _read_all(fd)
    finally:
        with contextlib.suppress(OSError):  # reading has already reported the error
            os.close(fd)


def read_file(path: str) -> bytes:
    """The beginning of a file, up to its first line break or MAX_SECRET bytes. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(21, "Is a directory")
        return _read_all(fd)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < MAX_SECRET and (more := os.read(fd, MAX_SECRET)):
        data += more
    return data


def _run_shell_words(command: str, environment: Mapping[str, str]) -> bytes:
    arguments = shlex.split(command)
    if not arguments:
        raise ValueError("no command")
    return run_command(arguments, environment)


def run_command(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float | None = None
) -> bytes:
    """What a command prints in `timeout` seconds. After MAX_SECRET bytes, it is killed: it may never end.

    Raises OSError, SubprocessError.
    """
    inherited = {name: value for name, value in environment.items() if name != NOTIFY_SOCKET}
    end = None if timeout is None else time.monotonic() + timeout
    # Its standard error is the user's; its output is the secret.
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=inherited
    ) as process:
        assert process.stdout is not None
        try:
            output = b""
            while more := _read_until(process.stdout.fileno(), end):
                output += more
                if len(output) >= MAX_SECRET:
                    process.kill()
                    return output[:MAX_SECRET]
            process.wait(None if end is None else max(0, end - time.monotonic()))
        except BaseException as error:
            process.kill()
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(arguments, timeout or 0) from None
            raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return output


def _read_until(fd: int, end: float | None) -> bytes:
    """What can be read next from a pipe. Raises TimeoutError at the `end`, on the monotonic clock."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(None if end is None else max(0, 1000 * (end - time.monotonic()))):
        raise TimeoutError
    return os.read(fd, MAX_SECRET)


_FORMS: dict[str, Callable[[str, Mapping[str, str]], bytes]] = {
    "": lambda value, _environment: value.encode("utf-8", "surrogateescape"),
    "_FD": _read_named_descriptor,
    "_FILE": lambda path, _environment: read_file(path),
    "_CMD": _run_shell_words,
}


FORMS = tuple(_FORMS)
"""The suffixes of a variable's name."""

SECRETS = (
    *(PASSWORD_VARIABLE, KEY_PASSWORD_VARIABLE, MASTER_PASSWORD_VARIABLE),
    *(ACCESS_KEY_VARIABLE, SECRET_KEY_VARIABLE, TOKEN_VARIABLE, CONTAINER_TOKEN_VARIABLE),
)


def take_secrets(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Removes the secrets, in all of their forms, from `environment`; returns what it was before.

    Called with `os.environ` before anything else, so that no process that is started later inherits them.
    Variables with the number of a descriptor go too: the number means nothing in another process.
    """
    before = dict(environment)
    secret = {name + form for name in SECRETS for form in FORMS}
    for name in before:
        if name in secret or (name.startswith("PBS_") and name.endswith("_FD")):
            del environment[name]
    return before


def others_can_write(found: os.stat_result) -> bool:
    """Whether other users than this one and root can write a file: pbsfs runs no command that it names.

    The bits of the group count, also for a group of one member: they show access control lists too.
    """
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def ended(error: subprocess.CalledProcessError) -> str:
    """How a command ended."""
    if error.returncode < 0:
        return f"was ended by signal {-error.returncode}"
    return f"ended with status {error.returncode}"


def first_line(data: bytes) -> str:
    """The first line as text, without its end. Raises ValueError."""
    line = data.split(b"\n", 1)[0].removesuffix(b"\r")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError(_NO_TEXT) from None


def _reason(error: Exception) -> str:
    """What is wrong with the place that a variable names, and what to do."""
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return f"{text}; check the name and who may use it"
    if isinstance(error, subprocess.CalledProcessError):
        return f"the command {ended(error)}; run it in a shell to see why"
    if str(error) == _NO_TEXT:
        return f"{error}; write it as UTF-8"
    return "does not name a descriptor or command; correct it"
