"""What a server's error answers mean, and the error of pbsfs for each: the one place that knows the texts.

A Proxmox Backup Server answers nearly every failure with status 400 and a line of text, so only the text
distinguishes lost data from a temporary fault. The rule: data is damaged only if the text says that it is
missing or broken. Every other failure to read data may be temporary, and pbsfs tries again. The texts are
those of proxmox-backup 3.2 to 4.2 (src/api2/reader, pbs-datastore, pbs-api-types/src/maintenance.rs). Used by
`http1`, `login`, `api` and `pool`. Pure; from any thread.
"""

from __future__ import annotations

import enum
import errno
import re

from pbsfs.base.errors import (
    AuthError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    SourceError,
    UnavailableError,
    UnknownDatastoreError,
    WrongServerError,
)
from pbsfs.base.text import one_line
from pbsfs.sources.http.client import Answer
from pbsfs.sources.server.repository import PBS, Repository

MAX_ERROR_TEXT = 2000
"""Characters that pbsfs shows of an error's text."""


class Meaning(enum.Enum):
    """What an error answer means."""

    DAMAGED = "stored data is missing or broken"
    MISSING = "the requested object does not exist"
    PASSING = "the request failed, and may succeed later"
    LOCKED = "the snapshot is locked by a backup, a removal or another task"
    MAINTENANCE = "the datastore is unavailable for now"
    DELETING = "the datastore is being deleted"
    FORBIDDEN = "the user lacks a privilege"
    NO_DATASTORE = "the datastore does not exist"
    NOT_ACCEPTED = "the server does not accept the password, ticket or token"
    NOT_PBS = "the answer is not one of a Proxmox Backup Server"
    REFUSED = "the request fails, now and later"


_NOT_PBS = (301, 302, 303, 307, 308, 405, 406, 411, 415, 501)
"""Statuses with which other web servers answer requests of pbsfs, and a Proxmox Backup Server never does."""

_UNAVAILABLE = re.compile(
    r"(?P<deleting>datastore is being deleted)"
    r"|(?:offline|S3 refresh) maintenance mode|datastore is being unmounted|^datastore '[^']*' is not mounted"
)
"""The first match counts: text that the administrator wrote follows it."""

_LOCKED = re.compile(r"^while reading snapshot\b|\bunable to acquire\b.*\block\b")
"""From 3.3.5 on, the text says only what the server was about to do, and does not mention the lock."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)\.?$|\b(?P<name>E[A-Z0-9]+): ")
"""A system error as Rust's standard library or its crate nix (`EMFILE: Too many open files`) writes it."""

_BROKEN = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)

_BAD_CHUNK = re.compile(
    r"could not fetch object with key |cannot find chunk with digest "
    r"|^data blob has wrong crc checksum|^unable to parse raw blob - wrong magic"
    r"|^(?:encrypted )?blob too small \(",
    re.IGNORECASE,
)
"""For datastores in an object store: the server checks what it fetches from there."""

_BAD_INDEX = re.compile(
    r"^Unable to open (?:fixed|dynamic) index \".*\" - "
    r"(?:got |unexpected |invalid |index too small|index length |failed to fill whole buffer)"
)

_DEBUG_DUMP = re.compile(r"\s*'?\bBackupDir \{.*\}'?")


def words_of(body: bytes, status: int) -> str:
    """An error answer's text, as one printable line; its status if it has no text."""
    text = one_line(body[: 4 * MAX_ERROR_TEXT].decode(errors="replace"), 4 * MAX_ERROR_TEXT)
    return _DEBUG_DUMP.sub("", text)[:MAX_ERROR_TEXT] or f"status {status}"


def refusal_of(answer: Answer) -> tuple[Meaning, str]:
    """The meaning and the text of an error answer to anything but a download."""
    words = words_of(answer.body, answer.status)
    return meaning_of(answer.status, words), words


def meaning_of(status: int, words: str) -> Meaning:
    """The meaning of an answer to a login, the request for a list, or the opening of a session."""
    if status == 401 or (status == 400 and words.startswith("authentication failed")):
        return Meaning.NOT_ACCEPTED  # 4.1.2 and 4.1.3 answer with 400
    if status == 403:
        return Meaning.FORBIDDEN
    if status == 404:
        return Meaning.MISSING
    if status in _NOT_PBS:
        return Meaning.NOT_PBS
    if status >= 500 or status in (408, 429):  # 408: from a proxy that waited for too long
        return Meaning.PASSING
    return _meaning_of_words(words) if status == 400 else Meaning.REFUSED


def meaning_of_file(status: int, words: str) -> Meaning:
    """The meaning of an answer to the download of an index or a blob."""
    if status == 400 and (_BAD_INDEX.match(words) or _os_error(words) in _BROKEN):
        return Meaning.DAMAGED
    return _meaning_of_data(status, words)


def meaning_of_chunk(status: int, words: str) -> Meaning:
    """The meaning of an answer to the request for a chunk that the downloaded index names."""
    if status != 400:
        return Meaning.PASSING if status == 404 else _meaning_of_data(status, words)
    # A system error counts if the server read the chunk itself, and not if the server's cache failed.
    error = _os_error(words) if words.startswith("reading file ") else None
    if error in (errno.ENOENT, *_BROKEN) or _BAD_CHUNK.search(words):
        return Meaning.DAMAGED
    meaning = _meaning_of_data(status, words)
    return Meaning.PASSING if meaning is Meaning.MISSING else meaning


def error_of(meaning: Meaning, status: int, words: str, repository: Repository) -> PbsfsError:
    """The error for an answer of `status` and `words` that has this `meaning`."""
    server, user = repository.address, repository.auth_id
    match meaning:
        case Meaning.NOT_ACCEPTED:
            return AuthError(f"{server} does not accept {user}: {words}; check the name and the secret")
        case Meaning.FORBIDDEN:
            return ForbiddenError(
                f"{server} does not allow {user} to do this: {words}; give it the role DatastoreReader, "
                "a token and its user both"
            )
        case Meaning.MISSING:
            return NotFoundError(f"{server}: {words}")
        case Meaning.DAMAGED:
            return DamageError(f"the server can't read it: {words}")
        case Meaning.NO_DATASTORE:
            return UnknownDatastoreError(f"{server}: {words}")
        case Meaning.MAINTENANCE:
            return UnavailableError(f"{server}: {words}")
        case Meaning.LOCKED:
            return UnavailableError(
                f"{server}: the snapshot is locked by a backup, a removal or another task: {words}"
            )
        case Meaning.NOT_PBS:
            return WrongServerError(f"{server} answers with status {status} ({words}); {PBS.check_address}")
        case Meaning.PASSING:
            return SourceError(f"{server}: status {status}: {words}", retryable=True)
        case Meaning.DELETING | Meaning.REFUSED:
            return SourceError(f"{server}: status {status}: {words}")


def _meaning_of_data(status: int, words: str) -> Meaning:
    meaning = meaning_of(status, words)
    if meaning is Meaning.REFUSED and status == 400 and not words.startswith("parameter verification failed"):
        return Meaning.PASSING
    return meaning


def _meaning_of_words(words: str) -> Meaning:
    if words.startswith("no such datastore "):
        return Meaning.NO_DATASTORE
    if words.startswith(("no permissions on", "backup owner check failed")):
        return Meaning.FORBIDDEN
    if found := _UNAVAILABLE.search(words):
        return Meaning.DELETING if found["deleting"] else Meaning.MAINTENANCE
    if _LOCKED.search(words):
        return Meaning.LOCKED
    error = _os_error(words)
    if error == errno.ENOENT or "does not exist" in words:
        return Meaning.MISSING
    return Meaning.REFUSED if error is None else Meaning.PASSING


def _os_error(words: str) -> int | None:
    """The errno of the system error in a text, if it has one."""
    found = _OS_ERROR.search(words)
    if found is None:
        return None
    return getattr(errno, found["name"], None) if found["name"] else int(found[1])
