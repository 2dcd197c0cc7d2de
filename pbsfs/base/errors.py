"""The errors of pbsfs, and the errno and exit status of each.

Every error that pbsfs raises on purpose derives from `PbsfsError`; its text is one line that names
what was wrong and, where there is something to do, what to do. Two functions turn errors into
numbers: `errno_of` for the mount and NBD, `exit_status_of` for the command line.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class PbsfsError(Exception):
    """Base of all errors that pbsfs raises on purpose. The text is for the user."""

    errno: ClassVar[int] = errno.EIO
    exit_status: ClassVar[int] = 1
    action: ClassVar[str] = ""
    """What to do, for texts without it: see `with_action`."""


class UsageError(PbsfsError):
    """The caller asked for something that makes no sense: a bad name, option or combination."""

    errno = errno.EINVAL
    exit_status = 2


class NotFoundError(PbsfsError):
    """A namespace, group, snapshot or archive that does not exist."""

    errno = errno.ENOENT
    exit_status = 3
    action = "pbsfs ls shows what is there"


class SourceError(PbsfsError):
    """The place where the backups live can't be read: not a datastore, gone, or an I/O error.

    `retryable` says whether the same request may succeed later without a change by the user.
    """

    exit_status = 4
    action = "look at the log of the server, or at the kernel's log for a disk, then try again"

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class UnavailableError(SourceError):
    """The server answers, and says that it can't give this for now: a lock, or maintenance."""

    action = "try again later"

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class AuthError(SourceError):
    """The server does not accept the user, token, password or secret."""

    errno = errno.EACCES
    exit_status = 10


class ForbiddenError(SourceError):
    """The server knows the user, and does not allow the request."""

    errno = errno.EACCES
    exit_status = 11


class TrustError(SourceError):
    """The server's certificate is not one to trust."""

    exit_status = 12


class ResolveError(SourceError):
    """The server's name has no address."""

    exit_status = 13
    action = "check the name, and the network of this computer"

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class ConnectError(SourceError):
    """There is no connection to the server, or it was lost."""

    exit_status = 14
    action = "check the network and the server, then try again"

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class WrongServerError(SourceError):
    """What answers at this address is not a server of the kind that was named."""

    exit_status = 15
    action = "check the host and port"


class UnknownDatastoreError(SourceError):
    """The server does not have this datastore, or hides it from this user."""

    errno = errno.ENOENT
    exit_status = 16
    action = "check its name, and what this user may see"


class UnknownRealmError(AuthError):
    """The server does not have this realm."""

    exit_status = 17


class KeyRequiredError(PbsfsError):
    """Data is encrypted or signed, and its key was not given. `fingerprint`: of that key, if it is known."""

    errno = errno.EACCES
    exit_status = 5
    action = "give the file of the key with --keyfile"

    def __init__(self, message: str, *, fingerprint: str | None = None) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


class PasswordError(PbsfsError):
    """The password of a key is missing or wrong."""

    errno = errno.EACCES
    exit_status = 18


class KeyFileError(PbsfsError):
    """A file can't be read, or is not a key file."""

    errno = errno.EACCES
    exit_status = 19
    action = "name the right file"


class DamageError(PbsfsError):
    """Stored data fails a check: wrong magic, CRC, digest, length, kind, or syntax."""

    exit_status = 6
    action = "read another snapshot, and verify the datastore to see what else is damaged"


class UnsupportedError(DamageError):
    """Stored data has a form that pbsfs does not read, or may be damaged: pbsfs gives no byte of it."""


class PartialError(PbsfsError):
    """The copy was made as far as it could be: damaged data is missing in it, as the user asked for."""

    exit_status = 20


class MountError(PbsfsError):
    """The mount (or its end) is refused or failed."""

    exit_status = 7
    action = "correct that, then try again"


class OutputError(PbsfsError):
    """The destination of `export` can't be written."""

    exit_status = 8
    action = "name another place, or correct that"


class HelperError(PbsfsError):
    """A program that pbsfs needs (nbdkit, QEMU) is missing, unsuitable, or failed."""

    exit_status = 9


ALLOW_TASKS = "end other programs, or allow more tasks to this user or service (ulimit -u, TasksMax=)"
"""What to do where the system starts no more threads or processes."""

INTERRUPTED_EXIT_STATUS = 130
"""Exit status after SIGINT, as shells expect it (128 + 2)."""


def errno_of(error: BaseException) -> int:
    """The errno that a file system or NBD client sees for `error`.

    Errors of other kinds are EIO: the data could not be read.
    """
    return error.errno if isinstance(error, PbsfsError) else errno.EIO


def with_action(error: PbsfsError) -> str:
    """The text of an error, with what its kind says to do where the text does not (`PROBLEM; ACTION`)."""
    text = str(error)
    return text if not error.action or "; " in text else f"{text}; {error.action}"


def exit_status_of(error: BaseException) -> int:
    """The exit status of the command line for `error`."""
    return error.exit_status if isinstance(error, PbsfsError) else 1
