"""The tickets that `pbsfs login` keeps: one file for each user of a server, in the runtime directory.

A file lasts until the user of this machine logs out, and counts for the two hours for which servers accept a
ticket. It belongs to this user alone: pbsfs refuses directories and files that others may read, and symbolic
links. pbsfs does not use the file of tickets of proxmox-backup-client, which knows a server by its host
without a port. Called by `pbsfs.access.resolve` and by commands. Synchronous; several processes may call
it at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret, Ticket
from pbsfs.runtime.places import runtime_home
from pbsfs.sources.server.repository import Repository

log = logging.getLogger(__name__)

LIFETIME = 7200 - 60
"""Seconds for which a ticket counts: a minute less than servers accept it (proxmox-auth-api,
TICKET_LIFETIME), as in proxmox-backup-client."""

MAX_SIZE = 64 << 10
"""Bytes of a file; a ticket has some 500."""

MAX_FILES = 1000

_PREFIX, _SUFFIX = "login-", ".json"

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StoredLogin:
    """The login of `user` at `address` (`host:port`); `until`: seconds since the epoch."""

    user: str
    address: str
    until: float
    ticket: Ticket

    @property
    def until_text(self) -> str:
        """The end as a time of day, where the user is."""
        return time.strftime("%H:%M", time.localtime(self.until))


class Tickets:
    """The files of this user. `clock`: seconds since the epoch."""

    def __init__(self, environment: Mapping[str, str], clock: Clock = time.time) -> None:
        home = runtime_home(environment)
        self._path = None if home is None else home / "pbsfs"
        self._clock = clock

    def save(self, repository: Repository, ticket: Secret) -> StoredLogin:
        """Keeps a ticket that was issued now. Raises UsageError."""
        now = self._clock()
        facts = {
            "user": repository.user,
            "address": repository.address,
            "time": now,
            "ticket": ticket.reveal(),
        }
        if self._path is None:
            raise UsageError(
                "no place for the ticket: this user has no runtime directory; set XDG_RUNTIME_DIR to a "
                "directory that only you may enter, or use an API token"
            )
        with self._reporting(creating=True):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._path, 0o700)
            with self._directory() as directory:
                self._remove_expired(directory)
                _replace(directory, _name_of(repository), json.dumps(facts).encode())
        return StoredLogin(repository.user, repository.address, now + LIFETIME, Ticket(ticket.reveal()))

    def find(self, repository: Repository) -> StoredLogin | None:
        """The login at a server, if there is one that still counts.

        What is wrong with the files is a warning: the command may do without.
        """
        try:
            with self._reporting(), self._directory() as directory:
                return self._read(directory, _name_of(repository))
        except FileNotFoundError:
            return None
        except UsageError as error:
            log.warning("the login is not used: %s", error)
            return None

    def remove(self, repository: Repository) -> bool:
        """Removes the ticket of a login; whether there was one. Raises UsageError."""
        try:
            with self._reporting(), self._directory() as directory:
                os.unlink(_name_of(repository), dir_fd=directory)
        except FileNotFoundError:
            return False
        return True

    def all(self) -> list[StoredLogin]:
        """All logins that still count, by server and user; warns like `find`."""
        found = []
        try:
            with self._reporting(), self._directory() as directory:
                for name in _names(directory):
                    with contextlib.suppress(FileNotFoundError):  # another process has removed it
                        found.append(self._read(directory, name))
        except FileNotFoundError:
            return []
        except UsageError as error:
            log.warning("logins are not shown: %s", error)
        return sorted((login for login in found if login), key=lambda login: (login.address, login.user))

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int]:
        """A descriptor of the directory, which only this user may enter. Raises OSError, UsageError."""
        if self._path is None:
            raise FileNotFoundError
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._check(self._path, os.fstat(fd))
            yield fd
        finally:
            os.close(fd)

    def _check(self, path: Path, found: os.stat_result) -> None:
        if found.st_uid != os.geteuid():
            raise UsageError(f"{path}: belongs to another user; remove it, or set XDG_RUNTIME_DIR")
        if found.st_mode & 0o077:
            raise UsageError(f"{path}: other users may read it; remove it, and run pbsfs login again")

    @contextlib.contextmanager
    def _reporting(self, *, creating: bool = False) -> Iterator[None]:
        """Makes a UsageError of an OSError, except of a missing file that nobody creates."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not creating:
                raise
            if self._path is None or not isinstance(error.filename, str):
                place = self._path
            else:
                place = self._path / error.filename  # names in the directory are relative to it
            if isinstance(error, FileNotFoundError) and self._path is not None:
                place = self._path.parent
                action = "create it with mkdir -m 700"
            else:
                action = "remove it"
            raise UsageError(f"{place}: {error.strerror}; {action}, or set XDG_RUNTIME_DIR") from None

    def _read(self, directory: int, name: str) -> StoredLogin | None:
        """A file's login; None if it does not count any more. Raises OSError, UsageError."""
        assert self._path is not None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=directory), "rb") as file:
            found = os.fstat(file.fileno())
            path = self._path / name
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path}: not a regular file; remove it")
            self._check(path, found)
            data = file.read(MAX_SIZE + 1)
        try:
            facts = json.loads(data)
            user, address, ticket = (str(facts[key]) for key in ("user", "address", "ticket"))
            until = float(facts["time"]) + LIFETIME
            if not (ticket and ticket.isascii() and ticket.isprintable()):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UsageError(f"{path}: damaged; run pbsfs login again") from None
        # Also not after the clock was set back: the ticket may be older than it seems.
        if not 0 < until - self._clock() <= LIFETIME:
            return None
        return StoredLogin(user, address, until, Ticket(ticket))

    def _remove_expired(self, directory: int) -> None:
        for name in _names(directory):
            with contextlib.suppress(OSError, UsageError):
                if self._read(directory, name) is None:
                    os.unlink(name, dir_fd=directory)


def _names(directory: int) -> list[str]:
    names = (
        entry for entry in os.listdir(directory) if entry.startswith(_PREFIX) and entry.endswith(_SUFFIX)
    )
    return sorted(names)[:MAX_FILES]


def _name_of(repository: Repository) -> str:
    """The name of the file: of a hash, since the names of users and hosts may be too long for one."""
    text = f"{repository.user}\n{repository.address}"
    return f"{_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}{_SUFFIX}"


def _replace(directory: int, name: str, data: bytes) -> None:
    """Writes a file that only this user may read; a reader sees the old one or the new one."""
    new = f"{name}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600, dir_fd=directory)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory)
        raise
